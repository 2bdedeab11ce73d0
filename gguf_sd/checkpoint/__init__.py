"""What lies in a file: reading it, telling what it is, and filling a model from it."""
