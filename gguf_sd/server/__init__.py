"""Many people at one device: `gguf-sd serve`."""
