"""`python -m gguf_sd` is `gguf-sd`."""

import sys

from gguf_sd.cli.main import main

sys.exit(main())
