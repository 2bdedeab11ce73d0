"""A file of prompts to a folder of pictures: `gguf-sd batch`."""
