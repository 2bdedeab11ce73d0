"""Other programs that take part in a comparison: what each reads, which samplers it has, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.errors import GgufSdError

SDCPP_ENV = "GGUF_SD_SDCPP"  # the path of stable-diffusion.cpp's program, where --sdcpp does not give it

# Our samplers by the peers' names. Schedules are those that the same model has in each by default.
DIFFUSERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
SDCPP = {"euler": "euler", "euler_a": "euler_a", "heun": "heun", "dpmpp_2m": "dpm++2m", "lcm": "lcm"}


@dataclass(frozen=True)
class Peer:
    """``module``: which paints with it, by a function ``paint(task, folder) -> Result``; ``packages``: what it needs;
    ``reads``: whether it takes a model at a path."""

    module: str
    packages: tuple[str, ...]
    samplers: Mapping[str, str]
    reads: Callable[[Path], bool]
    what: str  # it reads
    devices: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")


PEERS = {
    "diffusers": Peer("gguf_sd.bench.peer_diffusers", ("diffusers",), DIFFUSERS, Path.is_dir, "diffusers folders"),
    "openvino": Peer(
        "gguf_sd.bench.peer_openvino",
        ("diffusers", "openvino"),
        DIFFUSERS,
        Path.is_dir,
        "diffusers folders",
        ("cpu",),
    ),
    "sdcpp": Peer(
        "gguf_sd.bench.peer_sdcpp",
        (),
        SDCPP,
        lambda path: not is_gguf(path) or not GGUFFile(path).reshaped,
        "checkpoints, diffusers folders and .gguf files in the linear layout",
        ("cpu", "cuda"),
    ),
}


def check_peers(names: Collection[str], models: Collection[Path], device: str, sdcpp: str) -> None:
    """Raises GgufSdError for peers that cannot take part, before any work. ``device``: the kind that is painted on;
    ``sdcpp``: path or name of stable-diffusion.cpp's program."""
    for name in names:
        if name not in PEERS:
            raise GgufSdError(f"no peer {name!r}; choose from {', '.join(PEERS)}")
        peer = PEERS[name]
        if missing := [package for package in peer.packages if find_spec(package) is None]:
            raise GgufSdError(f'the peer {name} needs {missing[0]}: pip install "gguf-sd[bench]"')
        if not any(peer.reads(path) for path in models):
            raise GgufSdError(f"{name} reads {peer.what}; name one of those too")
        if device not in peer.devices:
            raise GgufSdError(f"{name} runs on {' or '.join(peer.devices)} here, not on {device}; give --device cpu")
    if "sdcpp" in names:
        sdcpp_program(sdcpp)


def check_samplers(names: Collection[str], samplers: Collection[str]) -> None:
    """Raises GgufSdError for samplers that a peer does not have."""
    for name in names:
        for sampler in samplers:
            if sampler not in PEERS[name].samplers:
                choices = ", ".join(PEERS[name].samplers)
                raise GgufSdError(f"{name} has no sampler {sampler!r}; choose one by --sampler: {choices}")


def sdcpp_program(given: str) -> str:
    """stable-diffusion.cpp's program, as a name that is found in PATH or an absolute path; raises GgufSdError where
    there is none."""
    if not given:
        raise GgufSdError(f"the peer sdcpp is a program: give its path by --sdcpp or in {SDCPP_ENV}")
    if (found := shutil.which(given)) is None:
        raise GgufSdError(f"{given} is no program; the peer sdcpp needs stable-diffusion.cpp's sd-cli")
    return given if given == Path(given).name else str(Path(found).resolve())
