"""What is kept where, and how it runs."""
