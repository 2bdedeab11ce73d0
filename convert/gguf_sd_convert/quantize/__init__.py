"""Which type a tensor gets, and its blocks."""
