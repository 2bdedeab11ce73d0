"""Our models as parts of other libraries, each imported by its own module alone."""
