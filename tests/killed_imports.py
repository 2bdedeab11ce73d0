"""What a process that is forked needs to have imported."""

import gguf_sd.cli.generate
import gguf_sd.cli.inspect
import gguf_sd.pipeline  # noqa: F401
import gguf_sd_convert.convert  # noqa: F401
