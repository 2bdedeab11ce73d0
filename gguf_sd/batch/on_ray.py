"""The same groups of pictures on Ray Data: an actor for each GPU, or for each N cores, holds the model.

Actors paint, the caller writes: a folder need not be shared. A group whose actor or node is lost is painted again by
another; since equal groups give equal bytes, and the manifest takes each picture once, nothing differs from a run
without Ray. The model's file must lie at the same path on every machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_sd.batch.items import Item, as_json, from_json
from gguf_sd.batch.painter import Painter, Result
from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions

LOCAL = "local"  # address of a cluster that is started here, and ends with the run
MAX_BLOCKS = 5000


@dataclass(frozen=True)
class RayRun:
    """What painters are made of, and where."""

    model: Path
    options: LoadOptions
    batch: int
    shared: Mapping[str, Any]
    address: str = LOCAL
    cores: int = 1

    @property
    def resources(self) -> dict[str, float]:
        """Of one painter."""
        import ray

        gpu = self.options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        return {"num_cpus": self.cores, "num_gpus": 1} if gpu else {"num_cpus": self.cores}

    @property
    def painters(self) -> int:
        """As many as the cluster has room for now, at least one."""
        import ray

        have, one = ray.cluster_resources(), self.resources
        fits = [have.get("CPU", 0) // self.cores] + [have.get("GPU", 0)] * ("num_gpus" in one)
        return max(1, int(min(fits)))


class RayPainter:
    """The actor of Ray Data's map_batches: groups as texts in, results out."""

    def __init__(self, run: RayRun):
        import torch

        if not run.model.exists():
            raise GgufSdError(f"{run.model} is not on this machine of the cluster; copy it there, to the same path")
        torch.set_num_threads(run.cores)
        self.painter = Painter(run.model, run.options, run.batch, run.shared)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        results = [result for group in batch["group"] for result in self.painter.paint(from_json(str(group)))]
        return {
            "item": [as_json([result.item]) for result in results],
            "png": [result.png for result in results],
            "facts": [json.dumps(result.facts) for result in results],
            "error": [result.error for result in results],
        }


def paint_on_ray(groups: Sequence[Sequence[Item]], run: RayRun) -> Iterator[Result]:
    """A result for each item, as they come. Raises GgufSdError where Ray is not installed, or there is no cluster at
    the address."""
    with connected(run.address):
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller has its own
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        dataset = ray.data.from_items(
            [{"group": as_json(group)} for group in groups], override_num_blocks=min(len(groups), MAX_BLOCKS)
        )
        painted = dataset.map_batches(
            RayPainter,
            fn_constructor_args=(run,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=run.painters),
            **run.resources,
        )
        for row in painted.iter_rows():
            (item,) = from_json(row["item"])
            yield Result(item, row["png"], json.loads(row["facts"]), row["error"])


class connected:  # noqa: N801  a context manager, called like a function
    """Ray, at an address: ``local`` starts a cluster here that ends with the block; one that this process is connected
    to already is used as it is. Raises GgufSdError where that cannot be."""

    def __init__(self, address: str):
        self.address, self.ours = address, False

    def __enter__(self) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise GgufSdError("--ray needs Ray: pip install 'gguf-sd[ray]'") from error
        if ray.is_initialized():
            return
        try:
            where = {"address": "local", "include_dashboard": False} if self.address == LOCAL else {}
            ray.init(**(where or {"address": self.address}), log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise GgufSdError(f"no Ray cluster at {self.address}: {reason}") from error
        self.ours = True

    def __exit__(self, *exception: object) -> None:
        if self.ours:
            import ray

            ray.shutdown()
