"""Cases of files: models, weights, settings, tokenizers, pictures, and what is added to a model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from gguf_sd.adapters.embedding_files import EmbeddingFile, check_embedding_files
from gguf_sd.adapters.embeddings import load_embeddings
from gguf_sd.adapters.lora import Lora, active
from gguf_sd.adapters.read_lora import check_loras, layer_factors
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.part_files import PartPaths
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.cli.inspect import inspect, table
from gguf_sd.config import SD15
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image, to_rgb
from gguf_sd.imaging.png_metadata import read_parameters, written_by_us
from gguf_sd.prompt.find_tokenizer import read_tokenizer
from gguf_sd.prompt.tokenizer import Tokenizer
from gguf_sd_convert.calibrate.imatrix import read_imatrix
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.prepare import source_config
from gguf_sd_convert.sources.checkpoints import open_checkpoint
from tests.fuzz import file_mutators as files
from tests.fuzz import material
from tests.fuzz.gguf_mutator import mutated, mutated_json, take_apart
from tests.fuzz.text_mutator import mutated_text

FOLDER_FILES = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "safety_checker/config.json",
                "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "model_index.json",
                "unet/diffusion_pytorch_model.safetensors.index.json")  # fmt: skip


class FileCases:
    """Over files that are made once in ``work`` from a tiny diffusers folder with its checker."""

    def __init__(self, source: Path, work: Path):
        self.work = work
        self.whole = work / "whole.gguf"
        convert(source, self.whole, ConvertOptions(type="q4_0"))
        self.parts, model = take_apart(self.whole), ModelFile.open(self.whole)
        self.config, self.text = model.config, model.config.text[0]
        self.json = json.loads(model.file.metadata["tokenizer.huggingface.json"])
        self.folder = work / "folder"
        shutil.copytree(source, self.folder)
        raw = (source / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        self.header = {name: header[name] for name in list(header)[:40]}
        state = {"a": torch.ones(2, 3), "b": torch.arange(6).t(), "c": torch.nn.Parameter(torch.zeros(4).half())}
        content = {"state_dict": state, "step": 3, "names": ["x", ("y", 0.5)]}
        self.members, self.legacy = material.archive_members(content), material.legacy_bytes(content)
        self.table = files.instructions(self.members["m/data.pkl"])
        words: Any = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.ones(2, 32)},
            "name": "x",
            "step": 1,
        }
        self.words, self.old_words = material.archive_members(words), material.legacy_bytes(words)
        self.words_table = files.instructions(self.words["m/data.pkl"])
        self.words_header, _ = material.safetensors_parts({"emb_params": torch.ones(2, 32)})
        self.lora_state = material.lora_tensors(self.config)
        self.lora_header, self.lora_data = material.safetensors_parts(self.lora_state)
        self.eighth = replace(self.config, vae=SD15.vae)  # ControlNets are for models that shrink pictures by 8
        self.control_parts = material.control_file(work)
        self.imatrix_parts = material.imatrix_file(work, self.config)
        self.kinds: dict[str, Callable[[random.Random], None]] = {
            "gguf": self.gguf, "safetensors": self.safetensors, "ckpt": self.ckpt, "folder": self.settings,
            "tokenizer": self.tokenizer, "picture": self.picture, "parts": self.borrowed, "lora": self.lora,
            "embedding": self.embedding, "control": self.control, "imatrix": self.imatrix,
        }  # fmt: skip

    @contextmanager
    def file(self, content: bytes, suffix: str, rng: random.Random, size: int | None = None) -> Iterator[Path]:
        """A file of a name of its own, so that nothing is known of it; zeros make it up to ``size`` bytes."""
        path = self.work / f"m{rng.getrandbits(40):x}{suffix}"
        with open(path, "wb") as file:
            file.write(content)
            if size is not None:
                file.truncate(max(size, 0))
        try:
            yield path
        finally:
            path.unlink()

    def gguf(self, rng: random.Random) -> None:
        with self.file(mutated(self.parts, rng), ".gguf", rng) as path:
            ModelFile.open(path).tokenizer().encode("a (red:1.2) cat", self.text)
            if rng.random() < 0.1:
                table(inspect(path, tensors=True))

    def borrowed(self, rng: random.Random) -> None:
        """Parts of a whole model out of a file, and the file as a source."""
        with self.file(mutated(self.parts, rng), ".gguf", rng) as path:
            use = rng.randrange(3)
            if use == 0:
                ModelFile.open(self.whole, PartPaths(clip_l=path)).check_whole()
            elif use == 1:
                VAEFile.open(path)
            else:
                source_config(path, ConvertOptions(type="same", layout="auto"))

    def safetensors(self, rng: random.Random) -> None:
        head, size = files.mutated_safetensors(self.header, rng)
        with self.file(head, ".safetensors", rng, size) as path:
            for entry in list(open_checkpoint(path).entries.values())[:3]:
                assert tuple(entry.load().shape) == entry.shape
            table(inspect(path))

    def ckpt(self, rng: random.Random) -> None:
        raw = files.mutated_archive(self.members, self.table, rng)
        if rng.random() < 0.2:
            raw = files.damaged(files.damaged(self.legacy, rng), rng)
        with self.file(raw, ".ckpt", rng) as path:
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

    def tokenizer(self, rng: random.Random) -> None:
        text = mutated_json(self.json, rng)
        if rng.random() < 0.5:
            Tokenizer(text, "m.gguf").encode(mutated_text(rng)[:2000], self.text)
        else:
            with self.file(files.damaged(text.encode("utf-8", "surrogatepass"), rng), ".json", rng) as path:
                read_tokenizer(path, 49408)

    def picture(self, rng: random.Random) -> None:
        with self.file(files.mutated_picture(rng), ".png", rng) as path:
            written_by_us(path)
            with suppress(GgufSdError):
                to_rgb(open_image(path))
            read_parameters(path)

    def lora(self, rng: random.Random) -> None:
        raw, size = save(files.mutated_state(self.lora_state, rng)), None
        if rng.random() < 0.4:
            head, size = files.mutated_safetensors(self.lora_header, rng)
            raw = head + (b"" if rng.random() < 0.2 else self.lora_data)
        with self.file(raw, ".safetensors", rng, size) as path:
            loras = [Lora(path, 0.5)]
            check_loras(loras, self.config)
            for target, factors in layer_factors(active(loras, "unet"), "unet", self.config):
                assert factors.delta(target.shape).shape == torch.Size(target.shape)

    def embedding(self, rng: random.Random) -> None:
        use, size = rng.randrange(5), None
        if use == 4:
            raw = save(files.mutated_state({"emb_params": torch.ones(2, 32)}, rng))
        elif use == 0:
            raw, size = files.mutated_safetensors(self.words_header, rng)
        elif use == 1:
            raw = files.damaged(files.damaged(self.old_words, rng), rng)
        else:
            raw = files.mutated_archive(self.words, self.words_table, rng)
        with self.file(raw, ".safetensors" if use in (0, 4) else ".pt", rng, size) as path:
            found = [EmbeddingFile(path)]
            check_embedding_files(found)
            for embedding in load_embeddings(found, self.config):
                assert all(vectors.shape[1] == self.text.hidden_size for vectors in embedding.vectors)

    def control(self, rng: random.Random) -> None:
        with self.file(mutated(self.control_parts, rng), ".gguf", rng) as path:
            file = ControlFile.open(path)
            file.check_fits(self.eighth)
            assert file.name is not None

    def imatrix(self, rng: random.Random) -> None:
        with self.file(mutated(self.imatrix_parts, rng), ".gguf", rng) as path:
            read_imatrix(path, self.config)
