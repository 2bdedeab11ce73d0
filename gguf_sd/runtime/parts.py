"""What of a model is loaded: text encoders, UNet, VAE and safety checker, the UNet's CUDA graphs, and ControlNets.

Nothing else loads parts or lets them go. A part is loaded when it is first asked for. It stays or goes afterwards as
its placement says, and is loaded anew when it is asked for in another way (another dtype, weights dequantised or
not, other kernels).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import nn

from gguf_sd.adapters.lora import Active
from gguf_sd.adapters.read_lora import layer_factors
from gguf_sd.adapters.side_path import attach, detach, side_bytes
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.models.controlnet import ControlNet
from gguf_sd.models.int8 import use_int8, use_int8_decoder
from gguf_sd.models.safety import SafetyChecker
from gguf_sd.models.text import TextEncoder
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.unet import UNet, UNetEncoder
from gguf_sd.models.vae import Autoencoder
from gguf_sd.runtime import library_pages
from gguf_sd.runtime.cuda_graph import NO_GRAPHS, CudaCapture, GraphedUNet, Graphing
from gguf_sd.runtime.host_heap import frugally
from gguf_sd.runtime.kernel_modes import make_resident, use_kernels
from gguf_sd.runtime.memory import give_back, held_bytes
from gguf_sd.runtime.stages import Meter
from gguf_sd.runtime.streaming import Streamed, StreamedUNet, load_streamed
from gguf_sd.sampling.guidance import Denoise


@dataclass(frozen=True)
class LoadedAs:
    """The decisions that a part was loaded by; ``weights`` and ``kernels`` concern the UNet and
    ControlNets alone."""

    dtype: torch.dtype
    weights: str = ""  # quantized, resident or int8
    kernels: str = ""  # see gguf_sd.runtime.kernel_modes.choose_kernels
    placement: str = "resident"  # of gguf_sd.runtime.memory.PLACEMENTS
    loras: tuple[Active, ...] = ()  # beside the weights: they come and go without loading anew
    control: ControlFile | None = None  # where a ControlNet lies
    encodes: bool = True  # of a VAE: whether it is loaded with its encoder

    def fits(self, wanted: LoadedAs) -> bool:
        """Whether what was loaded by these serves ``wanted``, once its LoRAs are exchanged: a staged part differs from
        a resident one only in when it goes."""
        streamed = (self.placement == "streamed") == (wanted.placement == "streamed")
        return streamed and replace(self, placement=wanted.placement, loras=wanted.loras) == wanted


@dataclass
class _Loaded:
    part: nn.Module
    how: LoadedAs
    streamed: Streamed | None = None  # what brings its weights, where they are not held
    graphs: GraphedUNet | None = None  # of a UNet

    def nbytes(self, device: torch.device) -> int:
        part = self.streamed.nbytes + side_bytes(self.part) if self.streamed else held_bytes(self.part, device)
        return part + (self.graphs.nbytes if self.graphs else 0)


class Parts:
    """The loaded parts of one model on one device. Borrowing is safe from several threads; what is borrowed is not
    meant to be run by two of them at a time."""

    def __init__(self, model: ModelFile, device: torch.device, vae_file: VAEFile | None = None):
        self.model, self.device, self.vae_file = model, device, vae_file
        self.loads: Counter[str] = Counter()  # how often each part was read from the file, by name
        self.streamed: dict[str, Meter] = {}  # of the parts that were streamed since, by name
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.RLock()

    @contextmanager
    def text(
        self, index: int, dtype: torch.dtype, placement: str = "resident", loras: tuple[Active, ...] = ()
    ) -> Iterator[TextEncoder]:
        """Lends text encoder number ``index``."""
        with self._borrowed(f"text {index}", LoadedAs(dtype, placement=placement, loras=loras)) as loaded:
            yield cast(TextEncoder, loaded.part)

    @contextmanager
    def vae(
        self, dtype: torch.dtype, placement: str = "resident", weights: str = "", encodes: bool = True
    ) -> Iterator[Autoencoder | TinyAutoencoder]:
        """Lends the VAE: that of ``vae_file`` where one was given, else the model's; with ``weights`` int8 its decoder
        computes in 8 bits, whole pictures alone; without ``encodes`` it is the decoder alone, where the model's."""
        how = LoadedAs(dtype, weights, placement=placement, encodes=encodes)
        # Its maps are few and large: that their memory goes back at once costs nothing, and leaves no holes.
        with frugally(self.device), self._borrowed("vae", how) as loaded:
            yield cast(Autoencoder | TinyAutoencoder, loaded.part)

    @contextmanager
    def safety(self, dtype: torch.dtype, placement: str = "resident") -> Iterator[SafetyChecker]:
        """Lends the safety checker. Raises GgufSdError where the model has none."""
        with self._borrowed("safety", LoadedAs(dtype, placement=placement)) as loaded:
            yield cast(SafetyChecker, loaded.part)

    @contextmanager
    def unet(self, how: LoadedAs, graphing: Graphing = NO_GRAPHS) -> Iterator[Denoise]:
        """Lends the UNet; unless ``graphing`` is off, behind its CUDA graphs, which live as long as it does."""
        with self._borrowed("unet", how) as loaded:
            unet = cast(UNet, loaded.part)
            if loaded.streamed:  # in no graph: what it replays is of the device alone
                yield StreamedUNet(unet, self.streamed["unet"])
                return
            if graphing.mode == "off":
                yield unet
                return
            if loaded.graphs is None:
                loaded.graphs = GraphedUNet(unet, CudaCapture(self.device))
            yield loaded.graphs.lend(graphing)

    @contextmanager
    def control(self, index: int, how: LoadedAs) -> Iterator[ControlNet]:
        """Lends ControlNet number ``index`` of a job, ``how.control``."""
        with self._borrowed(f"control {index}", how) as loaded:
            yield cast(ControlNet, loaded.part)

    @property
    def nbytes(self) -> int:
        """Bytes that loaded parts and graphs take on the device, see :func:`gguf_sd.runtime.memory.held_bytes`."""
        with self._lock:
            return sum(loaded.nbytes(self.device) for loaded in self._loaded.values())

    @property
    def graph_bytes(self) -> int:
        """Bytes that the UNet's CUDA graphs take on the device."""
        with self._lock:
            return sum(loaded.graphs.nbytes for loaded in self._loaded.values() if loaded.graphs)

    @property
    def names(self) -> set[str]:
        """What is loaded now: text 0, text 1, unet, vae, safety, control 0, …."""
        with self._lock:
            return set(self._loaded)

    def drop(self, name: str) -> None:
        """Lets a part go, with its graphs; nothing happens where it is not loaded."""
        with self._lock:
            if (loaded := self._loaded.pop(name, None)) is None:
                return
            (loaded.how.control or self.model).file.forget_pages()
            del loaded
        give_back(self.device)

    def drop_all(self, but: frozenset[str] = frozenset()) -> None:
        """Lets every part go but those of the kinds given (text, unet, vae, safety, control)."""
        for name in self.names:
            if name.partition(" ")[0] not in but:
                self.drop(name)

    def drop_controls(self, count: int) -> None:
        """Lets ControlNets go beyond the first ``count``, which a plan does not know of."""
        for name in self.names:
            kind, _, index = name.partition(" ")
            if kind == "control" and int(index) >= count:
                self.drop(name)

    @contextmanager
    def _borrowed(self, name: str, how: LoadedAs) -> Iterator[_Loaded]:
        try:
            yield self._get(name, how)
        finally:
            if how.placement != "resident":
                self.drop(name)

    def _get(self, name: str, how: LoadedAs) -> _Loaded:
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is None or not loaded.how.fits(how):
                del loaded  # with drop(), its last reference: the old part goes before the new one comes
                self.drop(name)
                give_back(self.device, bool(self.streamed))  # of the part before, whose borrower has let go by now
                self.loads[name] += 1
                with torch.inference_mode(False), torch.no_grad():  # the same tensors whoever comes first
                    self._loaded[name] = self._loaded_anew(name, replace(how, loras=()))
                if self.device.type == "cpu":
                    library_pages.forget()  # of what was imported for it
            if self._loaded[name].how.loras != how.loras:
                self._adapt(self._loaded[name], name, how)
            return self._loaded[name]

    def _loaded_anew(self, name: str, how: LoadedAs) -> _Loaded:
        if how.placement != "streamed" or name == "vae":  # whose weights are few, and read for every tile
            return _Loaded(self._load(name, how), how)
        meter = self.streamed.setdefault(name, Meter())
        streamed = load_streamed(how.control or self.model, name, self.device, how.dtype, how.kernels, meter)
        return _Loaded(streamed.part, how, streamed)

    def _adapt(self, loaded: _Loaded, name: str, how: LoadedAs) -> None:
        """Lays other LoRAs beside a part's weights, which stay where they are."""
        detach(loaded.part)
        loaded.graphs, loaded.how = None, replace(how, loras=())
        with torch.inference_mode(False), torch.no_grad():
            changes = layer_factors(how.loras, name, self.model.config)
            try:
                attach(loaded.part, changes, how.dtype, self.device)
            except BaseException:
                detach(loaded.part)
                raise
        loaded.how = how

    def _load(self, name: str, how: LoadedAs) -> nn.Module:
        part: nn.Module
        if name == "unet" or how.control is not None:
            return self._load_unet(how)
        if name == "vae":
            own, given = partial(self.model.load_vae, encodes=how.encodes), self.vae_file
            part = given.load(how.dtype) if given else own(how.dtype)
            if how.weights == "int8" and isinstance(part, Autoencoder):
                use_int8_decoder(part, how.dtype)
        elif name == "safety":
            part = self.model.load_safety(how.dtype)
        else:
            part = self.model.load_text(int(name.removeprefix("text ")), how.dtype)
        return part.to(self.device)

    def _load_unet(self, how: LoadedAs) -> UNetEncoder:
        """The UNet, or a ControlNet."""
        file = (how.control or self.model).file
        unet = (how.control.load(how.dtype) if how.control else self.model.load_unet(how.dtype)).to(self.device)
        if how.weights == "resident":
            make_resident(unet, how.dtype, how.kernels)
        elif how.weights == "int8":
            with frugally(self.device):  # what layers were, and are encoded through, goes back at once
                use_int8(unet, how.dtype)
        if how.weights != "quantized":
            file.forget_pages()
        if how.kernels != "torch":
            use_kernels(unet, how.kernels)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()  # the blocks as they came from the file
        return unet
