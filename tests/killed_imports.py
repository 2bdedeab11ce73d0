"""What a process that is forked needs to have imported."""

import gguf_sd_convert.convert  # noqa: F401
