"""gguf-sd: Stable Diffusion in one quantised GGUF file."""
