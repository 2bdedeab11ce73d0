"""What is laid over a model: LoRA and its relatives, and textual-inversion embeddings."""
