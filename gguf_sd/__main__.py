"""`python -m gguf_sd` is `gguf-sd`."""

from gguf_sd.cli.main import run

run()
