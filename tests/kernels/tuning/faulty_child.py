"""The tuner's child process with kernels that hang, crash or are wrong on purpose; started by test_child.py.

FAULT is "hang", "crash", "wrong", "raise", "chatter" or "mute", and FAULTY the kernel that does so.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

if os.environ["FAULT"] == "mute":
    sys.exit("no driver that this can use")

from gguf_sd_kernels.triton.launcher import PreparedLaunch
from gguf_sd_kernels.tuning.child import main

real = PreparedLaunch.__call__


def call(start: PreparedLaunch, *operands: Any) -> None:
    fault = os.environ["FAULT"] if start.kernel.__name__ == os.environ["FAULTY"] else ""
    if fault == "chatter":
        print("a compiler's remark")
        os.write(1, b"{and of its backend\n")
    if fault == "hang":
        time.sleep(600)
    if fault == "crash":
        os._exit(139)
    if fault == "raise":
        raise RuntimeError("cannot be launched")
    real(start, *operands)
    if fault == "wrong":
        operands[start.names.index("out")].add_(1)


PreparedLaunch.__call__ = call  # type: ignore[method-assign, assignment]
main()
