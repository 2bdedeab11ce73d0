"""Stable Diffusion checkpoints to GGUF."""
