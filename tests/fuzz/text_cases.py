"""Cases of texts: prompts, recorded settings, files of prompts, comparisons, names of the Hub."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gguf_sd.batch.items import make_groups, make_items
from gguf_sd.batch.manifest import Manifest
from gguf_sd.batch.rows import COLUMNS, read_rows
from gguf_sd.bench.spec import Contestant, Spec
from gguf_sd.checkpoint.hub_files import wanted_files
from gguf_sd.checkpoint.hub_names import hub_name
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.cli.controls import given_controls
from gguf_sd.cli.main import _parser
from gguf_sd.cli.recorded import make_request, recorded_vae
from gguf_sd.cli.recorded_adapters import recorded_adapters
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.png_metadata import parse_parameters
from gguf_sd.prompt.prompts import parse, unsupported
from gguf_sd.request import prepare
from tests.fuzz.file_mutators import damaged
from tests.fuzz.gguf_mutator import mutated_json, nasty
from tests.fuzz.text_mutator import mutated_settings, mutated_text

RECORDED = {
    "Steps": "2", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "3", "Size": "64x64",
    "Model hash": "0123456789", "Model": "m", "Lora hashes": '"a: 0123456789ab"', "TI hashes": '"b: 0123456789ab"',
    "VAE hash": "0123456789", "VAE": "vae.safetensors", "Clip skip": "1", "Original size": "64x64", "Crop": "1x2",
    "Mask blur": "4", "Paste original": "True", "Denoising strength": "0.5",
    "ControlNet 0": '"Model: c [01234567], Weight: 1, Guidance Start: 0, Guidance End: 1, Image: x.png"',
    "Precision": "float32", "Version": "gguf-sd 0.1.0", "Hires upscale": "2", "First pass size": "64x64",
}  # fmt: skip
ELSEWHERE = ("ControlNet 0", "Mask blur", "Denoising strength")  # need files that are not there
VALUES = ("", "nan", "-1", "0", "1e999", "9" * 400, "9" * 5000, "x", "64x", "x64", "64x64x64", "0x0",
          "\u0663", "1_0", "True", '"a: b"', '"', "../../etc/passwd", "/dev/zero", "a\0b", "\x1b[2J", "\ud800",
          "<lora:a:1>", "auto", "-0", " 1 ", "None")  # fmt: skip
ROW = {
    "prompt": "a cat", "negative_prompt": "dog", "steps": 2, "guidance": 7.5, "sampler": "euler", "schedule": "karras",
    "seed": 1, "width": 64, "height": 64, "count": 2, "clip_skip": 1, "original_size": [64, 64], "crop": [0, 0],
    "strength": 0.5, "resize": "fit", "mask_blur": 4, "paste": True, "safety": "off", "loras": ["a.safetensors:0.5"],
    "image": "a.png", "mask": "b.png", "name": "x",
}  # fmt: skip
NAMES = (
    "org", "repo", "/", "//", "..", ".", "https://", "http:/", "huggingface.co", "hf.co", "evil.example", "blob", "%ff",
    "resolve", "tree", "main", "refs/pr/1", "%2e%2e", "%00", "\0", "?x=1", "#y", "@", ":", "[", "]", "::1", "\\", " ",
    "é", "a" * 90, "a" * 2000, "unet", "vae", "text_encoder", "model_index.json", "config.json", ".gguf", "model",
    ".safetensors", "-00001-of-00002", "diffusion_pytorch_model", ".fp16", ".safetensors.index.json", ".ckpt", "\u202e",
    "\ud800", "user:pw@",
)  # fmt: skip


class TextCases:
    def __init__(self, whole: Path, work: Path):
        model = ModelFile.open(whole)
        self.work, self.config, self.text = work, model.config, model.config.text[0]
        self.tokenizer = model.tokenizer()
        self.picture = work / "seen.png"
        arguments = ["generate", str(whole), "--from", str(self.picture)]
        self.arguments = vars(_parser(arguments).parse_args(arguments))
        contestants = (Contestant("a", "a.gguf"), Contestant("b", "b.gguf", "diffusers"))
        spec = Spec(contestants, ("a cat",), ({"steps": 2},), recorded={"torch": "2"})
        self.toml = spec.to_toml().splitlines()
        self.kinds: dict[str, Callable[[random.Random], None]] = {
            "text": self.texts, "recorded": self.recorded, "rows": self.rows, "bench": self.bench, "hub": self.hub,
        }  # fmt: skip

    def texts(self, rng: random.Random) -> None:
        prompt = mutated_text(rng)
        assert all(part.text is None or part.text for part in parse(prompt))
        list(unsupported(prompt))
        with suppress(ValueError):
            parse_parameters(mutated_settings(rng))
        short = prompt[:3000].encode("utf-8", "ignore").decode()
        self.tokenizer.encode(short, self.text)

    def recorded(self, rng: random.Random) -> None:
        """What `generate --from` makes of the text in a picture."""
        pairs = {key: RECORDED[key] for key in rng.sample(list(RECORDED), rng.randrange(len(RECORDED)))}
        pairs = {"Steps": "2"} | {
            key: value for key, value in pairs.items() if key not in ELSEWHERE or rng.random() < 0.1
        }
        for key in rng.sample(list(pairs), min(len(pairs), rng.choice((1, 1, 2)))):
            pairs[key] = rng.choice((*VALUES, mutated_text(rng)[:500])).replace("\n", " ")
        prompt = "a cat" if rng.random() < 0.7 else mutated_text(rng)[:5000]
        text = f"{prompt}\nNegative prompt: dog\n" + ", ".join(f"{key}: {value}" for key, value in pairs.items())
        args = argparse.Namespace(**self.arguments)
        try:
            found = parse_parameters(text)
        except ValueError:
            raise GgufSdError("the text is none") from None
        found |= recorded_adapters(args, found, args.model)
        args.controls = given_controls(args, found.get("controls_used", ()), args.model)
        request = make_request(args, found)
        recorded_vae(args, found, args.model)
        prepare(request, self.config)

    def rows(self, rng: random.Random) -> None:
        suffix = rng.choice((".csv", ".csv", ".jsonl", ".jsonl", ".txt"))
        if suffix == ".txt":
            text = mutated_text(rng)
        elif suffix == ".jsonl":
            some = dict(rng.sample(list(ROW.items()), rng.randrange(1, len(ROW))))
            text = "\n".join(mutated_json(some, rng) for _ in range(rng.randrange(1, 4)))
        else:
            columns = rng.sample([*COLUMNS, *COLUMNS, "x", ""], rng.randrange(1, 8))
            lines = [columns, *([self._cell(rng, name) for name in columns] for _ in range(rng.randrange(4)))]
            text = "\r\n".join(",".join(line) for line in lines)
        path = self.work / f"rows{suffix}"
        path.write_bytes(damaged(text.encode("utf-8", "surrogatepass"), rng))
        items = make_items(read_rows(path), {"steps": 2}, 3)
        make_groups(items, 2)
        manifest = Manifest(self.work / "pictures", items, "m")
        if rng.random() < 0.005:
            self._resume(manifest, rng)

    def _cell(self, rng: random.Random, name: str) -> str:
        value = rng.choice(VALUES) if rng.random() < 0.3 else str(ROW.get(name, ""))
        return value.replace(",", ";") if rng.random() < 0.95 else value

    def _resume(self, manifest: Manifest, rng: random.Random) -> None:
        manifest.folder.mkdir(exist_ok=True)
        file, key = next(iter(manifest.keys.items()))
        line = {"row": 1, "picture": 1, "file": file, "key": key, "sha256": "0" * 64, "bytes": 3, "prompt": "a"}
        text = "\n".join(mutated_json(line, rng) for _ in range(3))
        manifest.path.write_bytes(damaged(text.encode("utf-8", "surrogatepass"), rng))
        with manifest.open(resume=True):
            pass

    def bench(self, rng: random.Random) -> None:
        lines = list(self.toml)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(lines))
            key, equals, _ = lines[at].partition(" = ")
            values = (
                json.dumps(nasty(rng)),
                "1979-05-27",
                "9" * 5000,
                "[" * 3000,
                "{" * 50,
                "{a={b=[1]}}",
                "inf",
                '"""',
                "",
            )
            what = rng.randrange(4)
            if what == 0 and equals:
                lines[at] = f"{key} = {rng.choice(values)}"
            elif what == 1:
                del lines[at]
            elif what == 2:
                lines.insert(
                    at, rng.choice((*lines, "[a.b.c]", "[[prompts]]", "x = 1", "[recorded]", "contestants = 3"))
                )
            elif equals:
                lines[at] = f"{key} = {rng.choice(values)}"
            if not lines:
                break
        path = self.work / "bench.toml"
        path.write_bytes(damaged("\n".join(lines).encode("utf-8", "surrogatepass"), rng))
        spec = Spec.from_toml(path)
        assert spec.to_toml()

    def hub(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            name = "".join(rng.choice(NAMES) for _ in range(rng.randrange(1, 9)))
            found = hub_name(name)
            assert found is None or (found.repo.count("/") == 1 and ".." not in found.path.split("/"))
        else:
            names = ["".join(rng.choice((*NAMES, "/", "/")) for _ in range(rng.randrange(1, 6))) for _ in range(9)]
            names += rng.sample(["model_index.json", "unet/config.json", "vae/config.json", "config.json", "a.gguf"], 2)
            wanted, model = wanted_files(names, "org/repo")
            assert set(wanted) <= set(names)
            assert model is None or model in wanted
