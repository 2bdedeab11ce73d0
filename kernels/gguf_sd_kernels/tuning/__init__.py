"""Which launch a product gets."""
