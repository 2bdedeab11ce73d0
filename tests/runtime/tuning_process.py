"""A process that prepares a tiny UNet's kernels and runs its step; started by test_tuning_processes.py.

Arguments: the cache folder and seconds to tune. Prints JSON: the error against plain torch in float32, the kernels that
the step ran, what was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.random_weights import random_unet, unet_inputs
from gguf_sd.config import UNetConfig
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd.runtime.tuning import Tuning
from gguf_sd_kernels.triton.launcher import PreparedLaunch
from gguf_sd_kernels.tuning.child import run_in_child

CPU = torch.device("cpu")
CONFIG = UNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    transformer_layers=(0,),
    num_heads=(4,),
    context_dim=32,
    norm_groups=8,
)
FAULTY_CHILD = Path(__file__).parents[1] / "kernels/tuning/faulty_child.py"
QUIET_SECONDS = 10.0  # after which a kernel counts as hung

real = PreparedLaunch.__call__
ran: set[str] = set()


def noted(start: PreparedLaunch, *operands: Any) -> None:
    ran.add(start.kernel.__name__)
    real(start, *operands)


class InFaultyChild(Tuning):
    """In a child whose kernels do what FAULT and FAULTY say."""

    def run(self, job: Any, device: torch.device) -> Any:
        return run_in_child(job, device, (sys.executable, str(FAULTY_CHILD)), QUIET_SECONDS)


@torch.inference_mode()
def main(folder: str, seconds: str) -> None:
    torch.manual_seed(1)
    inputs = unet_inputs(CONFIG, 1, 2, torch.float16, CPU)
    want = random_unet(CONFIG, "Q4_0", torch.float32, CPU)(*(x.float() for x in inputs)).double()
    unet = random_unet(CONFIG, "Q4_0", torch.float16, CPU)
    use_kernels(unet, "auto")
    tuned = InFaultyChild(float(seconds), quiet=True, folder=Path(folder)).prepare(unet, 1, 2, 2, torch.float16)
    PreparedLaunch.__call__ = noted  # type: ignore[method-assign, assignment]
    error = (unet(*inputs).double() - want).norm() / want.norm()
    print(json.dumps({"error": float(error), "ran": sorted(ran), "measured": len(tuned.measured)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
