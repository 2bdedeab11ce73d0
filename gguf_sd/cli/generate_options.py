"""The options of `gguf-sd generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from gguf_sd.cli.controls import add_control_options
from gguf_sd.cli.hub_models import add_revision

# Other programs' spellings of the same thing; --help lists them once, below the options.
ALIASES: dict[str, tuple[str, ...]] = {
    "--guidance": ("--cfg-scale", "--guidance-scale"),
    "--sampler": ("--sampling-method",),
    "--schedule": ("--scheduler",),
    "--steps": ("--num-inference-steps",),
    "--width": ("-W",),
    "--height": ("-H",),
    "--init-image": ("-i", "--init-img"),
    "--count": ("-b", "--batch-count"),
    "--batch": ("--batch-size",),
    "--seed": ("-s",),
    "--vae-tile": ("--vae-tile-size",),
    "--max-memory": ("--max-vram",),
    "--clip-l": ("--clip_l",),
    "--clip-g": ("--clip_g",),
    "MODEL": ("-m", "--model", "--diffusion-model"),
}


# Other programs' words for where the weights are, and what they are to us: see gguf_sd.runtime.memory.PLACEMENTS.
PLACEMENT_FLAGS = {"--medvram": "staged", "--offload-to-cpu": "staged", "--lowvram": "streamed"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that may come from a picture (--from) or from the model are None where they are not given."""
    add = parser.add_argument
    add("model", nargs="?", type=Path, help="a .gguf file; or a checkpoint or diffusers folder, converted into the "
        "cache first; or org/repo, org/repo/file.gguf or a link of the Hugging Face Hub, fetched first (default: the "
        "built-in demo model)")  # fmt: skip
    add_revision(parser)
    add("--from", type=Path, dest="settings", metavar="PNG", help="take the settings from a picture; others given here "
        "override them")  # fmt: skip
    add("-p", "--prompt", help="what to paint; (x:1.2) weighs x, BREAK starts a new chunk, <lora:name:0.8> adds a LoRA "
        "from --lora-dir")  # fmt: skip
    add("-n", "--negative-prompt", help="what to keep away from; needs guidance above 1")
    add("-o", "--output", type=Path, help="PNG to write; several get -1, -2, … (default: the next free out-0001.png)")
    add("--resume", action="store_true", help="go on where an earlier run of the same command stopped: keep the "
        "pictures of --output that are there and whole, paint the others")  # fmt: skip
    add("--force", action="store_true", help="let --output replace a file that gguf-sd did not write")
    add_adapters(parser)
    add_sampling(parser)
    _add_picture(parser)
    add_control_options(parser)
    add_engine(parser)
    add("--quiet", action="store_true", help="no progress bars and notes: only the paths and seeds")
    add("--plan", action="store_true", help="show what would be where in memory, and paint nothing")
    add("--json", action="store_true", help="print settings, files and times as JSON")
    _add_aliases(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lora", action="append", dest="loras", metavar="FILE[:WEIGHT]", help="a LoRA, LoHa or LoKr to add, and how "
        "much of it (1); may be given several times")  # fmt: skip
    add("--lora-dir", type=Path, help="folder of the LoRAs that the prompt names")
    add("--embedding", action="append", dest="embeddings", metavar="[NAME=]FILE", help="a textual-inversion embedding; "
        "NAME, or else the file's name, stands for it in the prompts; may be given several times")  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, help="sampling steps")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 or less does without (and is twice as fast)")
    add("--sampler", help="pndm, ddim, ddpm, euler, euler_a, heun, lms, dpm2, dpm2_a, dpmpp_2m, dpmpp_2m_sde, "
        "dpmpp_3m_sde, dpmpp_sde, dpmpp_2s_a, unipc, lcm, tcd, or another program's name")  # fmt: skip
    add("--schedule", help="model, karras, exponential, beta, normal, simple, sgm_uniform, ays, trailing, leading, "
        "linspace")  # fmt: skip
    add("--seed", type=int, help="seed of the first picture; the next ones count up (default, and -1: random)")
    add("--width", type=int, help="pixels, a multiple of 8 (default: --init-image's, else the model's)")
    add("--height", type=int, help="pixels, a multiple of 8")
    add("--count", type=int, help="pictures in all (1)")
    add("--batch", type=int, help="pictures painted at once: faster on a GPU, more memory (1)")
    add("--clip-skip", type=int, help="text encoder layers counted from the end: 1 takes the last, 2 the last but one")
    add("--original-size", type=_pair, metavar="WxH", help="SDXL: the size that the picture seems to have had")
    add("--crop", type=_pair, metavar="XxY", help="SDXL: pixels cut off on the left and the top (0x0)")


def _add_picture(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--init-image", type=Path, dest="image", help="picture to start from (image-to-image)")
    add("--strength", type=float, help="how much of it may change, up to 1 (0.8; 1 with --mask)")
    add("--resize", help="how it, and its mask with it, is brought to size: crop, fit or stretch (crop)")
    add("--mask", type=Path, help="repaint the picture only where this one is transparent, or else white (inpainting)")
    add("--mask-blur", type=int, help="pixels over which the mask's edge is softened, inwards (4)")
    add("--paste", action=argparse.BooleanOptionalAction, help="put the picture back around the mask, or keep what "
        "the model made of it (--paste)")  # fmt: skip
    add("--safety", help="what happens to pictures that the model's safety checker flags: blur, warn or off (blur)")
    add("--preview", type=int, default=0, metavar="N", help="write OUTPUT.preview.png every N steps (0 = never)")


def add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--vae", type=Path, help="another autoencoder: TAESD, or a full VAE file or folder")
    add("--clip-l", type=Path, metavar="FILE", help="text encoder CLIP-L, for a MODEL that is a UNet alone: .gguf or "
        ".safetensors, of it alone or of a whole model")  # fmt: skip
    add("--clip-g", type=Path, metavar="FILE", help="SDXL's second text encoder, the same way")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--dtype", help="auto, float32, float16, bfloat16: what the UNet computes in (auto)")
    add("--weights", default="auto", help="auto, quantized (small) or resident (dequantised once: faster, larger)")
    add(
        "--max-memory",
        metavar="SIZE",
        help="what painting may take, of a GPU's memory or, on a CPU, the whole process "
        "of the system's: 1GiB, 800MB, 1.5 (GiB); default: GGUF_SD_MAX_MEMORY, else what is free less a margin",
    )
    add("--vae-tile", metavar="SIZE", default="auto", help="decode and encode pictures in tiles of so many latent "
        "pixels (8 pixels) along an edge: slower, in less memory, the same picture; or auto, on, off (auto: as memory "
        "allows)")  # fmt: skip
    add("--vae-tiling", action="store_const", const="on", dest="vae_tile", default=argparse.SUPPRESS,
        help="--vae-tile on: the largest tiles that memory allows")  # fmt: skip
    add("--kernels", default="auto", help="how quantised layers compute: fused, dequantize, int8 or resident (Triton, "
        "on a GPU), torch (auto: on a GPU the fastest of fused and dequantize, else torch)")  # fmt: skip
    add("--tune", default="45", metavar="SECONDS|off", help="how long kernels are measured on a GPU that is new to a "
        "model, once (45)")  # fmt: skip
    add("--cuda-graph", default="auto", help="replay UNet steps from CUDA graphs: on, off (auto: with Triton kernels)")
    add(
        "--type",
        type=str.lower,
        help="quantisation of a MODEL that is no GGUF: f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 (q8_0)",
    )
    add("--tokenizer", type=Path, help="tokenizer for a model that carries none: a folder or a BPE merges file")


def _add_aliases(parser: argparse.ArgumentParser) -> None:
    """Hidden options that set what ours set."""
    for name, aliases in ALIASES.items():
        if name == "MODEL":
            parser.add_argument(*aliases, type=Path, dest="model_option", help=argparse.SUPPRESS)
            continue
        ours = parser._option_string_actions[name]
        parser.add_argument(
            *aliases, type=ours.type or str, dest=ours.dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    for flag, placement in PLACEMENT_FLAGS.items():
        parser.add_argument(flag, action="store_const", const=placement, dest="placement", help=argparse.SUPPRESS)
    listed = "; ".join(f"{' and '.join(aliases)} for {name}" for name, aliases in ALIASES.items())
    parser.epilog = (
        f"Other programs' spellings are understood too: {listed}. --medvram and --offload-to-cpu load each part for "
        "its stage, --lowvram layer by layer, whatever memory there is."
    )


def _pair(text: str) -> tuple[int, int]:
    """'1024x768' as two numbers; argparse turns the ValueError into a sentence."""
    first, _, second = text.partition("x")
    return int(first), int(second)


_pair.__name__ = "pair, such as 1024x768"
