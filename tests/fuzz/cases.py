"""Single cases of every kind of input from outside: a seed makes one, and it ends in success or in GgufSdError."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.part_files import PartPaths
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.cli.inspect import inspect, table
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image
from gguf_sd.imaging.png_metadata import parse_parameters, read_parameters, written_by_us
from gguf_sd.prompt.find_tokenizer import read_tokenizer
from gguf_sd.prompt.prompts import parse, unsupported
from gguf_sd.prompt.tokenizer import Tokenizer
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.prepare import source_config
from gguf_sd_convert.sources.checkpoints import open_checkpoint
from tests.fuzz import file_mutators as files
from tests.fuzz.gguf_mutator import mutated, mutated_json, take_apart
from tests.fuzz.text_mutator import mutated_settings, mutated_text

Case = Callable[[random.Random], None]
FOLDER_FILES = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "safety_checker/config.json",
                "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "model_index.json",
                "unet/diffusion_pytorch_model.safetensors.index.json")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of the processor; ``refused`` is the sentence, empty where all went well."""

    kind: str
    seed: int
    seconds: float
    refused: str


class Cases:
    """The kinds of cases, over files that are made once in ``work`` from a tiny diffusers folder with its checker."""

    def __init__(self, source: Path, work: Path):
        self.work = work
        whole = work / "whole.gguf"
        convert(source, whole, ConvertOptions(type="q4_0"))
        self.parts, model = take_apart(whole), ModelFile.open(whole)
        self.tokenizer, self.text = model.tokenizer(), model.config.text[0]
        self.json = json.loads(model.file.metadata["tokenizer.huggingface.json"])
        self.folder = work / "folder"
        shutil.copytree(source, self.folder)
        raw = (source / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        self.header = {name: header[name] for name in list(header)[:40]}
        buffer = io.BytesIO()
        state = {"a": torch.ones(2, 3), "b": torch.arange(6).t(), "c": torch.nn.Parameter(torch.zeros(4).half())}
        torch.save({"state_dict": state, "step": 3, "names": ["x", ("y", 0.5)]}, buffer)
        with zipfile.ZipFile(buffer) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        self.members = {f"m/{name.partition('/')[2]}": data for name, data in members.items()}
        self.table = files.instructions(self.members["m/data.pkl"])
        self.kinds: dict[str, Case] = {
            "gguf": self.gguf, "safetensors": self.safetensors, "ckpt": self.ckpt, "folder": self.settings,
            "tokenizer": self.own_tokenizer, "picture": self.picture, "text": self.texts, "parts": self.borrowed,
        }  # fmt: skip

    def run(self, kind: str, seed: int) -> Outcome:
        """Anything but GgufSdError escapes: it is what is looked for."""
        started, refused = time.process_time(), ""
        try:
            self.kinds[kind](random.Random(seed))
        except GgufSdError as error:
            refused = str(error)
            if len(refused) > 2000 or "\n" in refused:
                raise AssertionError(f"no sentence: {refused[:3000]!r}") from error
        return Outcome(kind, seed, time.process_time() - started, refused)

    def gguf(self, rng: random.Random) -> None:
        path = self.work / "m.gguf"
        path.write_bytes(mutated(self.parts, rng))
        ModelFile.open(path).tokenizer().encode("a (red:1.2) cat", self.text)
        if rng.random() < 0.1:
            table(inspect(path, tensors=True))

    def borrowed(self, rng: random.Random) -> None:
        """Parts of a whole model out of a file, and the file as a source."""
        path = self.work / "m.gguf"
        path.write_bytes(mutated(self.parts, rng))
        use = rng.randrange(3)
        if use == 0:
            ModelFile.open(self.work / "whole.gguf", PartPaths(clip_l=path)).check_whole()
        elif use == 1:
            VAEFile.open(path)
        else:
            source_config(path, ConvertOptions(type="same", layout="auto"))

    def safetensors(self, rng: random.Random) -> None:
        path = self.work / "m.safetensors"
        head, size = files.mutated_safetensors(self.header, rng)
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(max(size, 0))
        for entry in list(open_checkpoint(path).entries.values())[:3]:
            assert tuple(entry.load().shape) == entry.shape
        table(inspect(path))

    def ckpt(self, rng: random.Random) -> None:
        path = self.work / "m.ckpt"
        path.write_bytes(files.mutated_archive(self.members, self.table, rng))
        for entry in open_checkpoint(path).entries.values():
            assert tuple(entry.load().shape) == entry.shape
        table(inspect(path))

    def settings(self, rng: random.Random) -> None:
        path = self.folder / rng.choice(FOLDER_FILES)
        whole = path.read_bytes() if path.exists() else None
        text = mutated_json(json.loads(whole) if whole else {"weight_map": {"a": "b", "c": "d"}}, rng)
        path.write_bytes(files.damaged(text.encode("utf-8", "surrogatepass"), rng))
        try:
            source_config(self.folder, ConvertOptions())
        finally:
            path.write_bytes(whole) if whole is not None else path.unlink()

    def own_tokenizer(self, rng: random.Random) -> None:
        text = mutated_json(json.loads(json.dumps(self.json)), rng)
        if rng.random() < 0.5:
            Tokenizer(text, "m.gguf").encode(mutated_text(rng)[:2000], self.text)
        else:
            path = self.work / "tokenizer.json"
            path.write_bytes(files.damaged(text.encode("utf-8", "surrogatepass"), rng))
            read_tokenizer(path, 49408)

    def picture(self, rng: random.Random) -> None:
        path = self.work / "p.png"
        path.write_bytes(files.mutated_picture(rng))
        written_by_us(path)
        with suppress(GgufSdError):
            open_image(path)
        read_parameters(path)

    def texts(self, rng: random.Random) -> None:
        prompt = mutated_text(rng)
        assert all(part.text is None or part.text for part in parse(prompt))
        list(unsupported(prompt))
        with suppress(ValueError):
            parse_parameters(mutated_settings(rng))
        short = prompt[:3000].encode("utf-8", "ignore").decode()
        self.tokenizer.encode(short, self.text)
