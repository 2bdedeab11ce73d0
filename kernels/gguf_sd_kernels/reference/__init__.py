"""Plain torch: decoders and products, and what the other implementations are tested against."""
