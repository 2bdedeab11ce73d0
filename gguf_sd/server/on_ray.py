"""Painters on a Ray cluster: replicas of Ray Serve, each with the models, behind this server's line.

Requests are checked, queued, batched and answered here; a replica gets pictures that are painted at once, and sends
back steps, looks and PNGs. Where a replica or its machine is lost, another paints what it painted; a ticket takes
each picture once. Model files must lie at the same path on every machine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.batch.on_ray import connected
from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions
from gguf_sd.server.shelf import Painter, Shelf, Watcher
from gguf_sd.server.tickets import Finished

if TYPE_CHECKING:
    from gguf_sd.request import Job

log = logging.getLogger(__name__)
TRIES = 5  # of painting pictures whose replica is lost
PAUSE = 2.0  # seconds before the next: a replica takes some to start anew
APPLICATION = "gguf-sd"


class _LeftError(Exception):
    """The server does not want these pictures any more."""


class Replica:
    """What runs in each replica. Events are pairs: ("step", (step, looks)), ("finished", (index, picture)) and
    ("error", sentence)."""

    def __init__(self, models: Mapping[str, Path], options: LoadOptions, cores: int):
        import torch

        torch.set_num_threads(cores)
        self.shelf = Shelf(models, options)

    async def paint(self, model: str, jobs: Sequence[Job], looks: Sequence[int]) -> AsyncIterator[tuple[str, Any]]:
        """Events as they happen, the painting being in a thread of its own, which ends when nobody listens."""
        events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
        loop, watch = asyncio.get_running_loop(), _Sender(looks)
        watch.send = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                self.shelf.paint(model, jobs, watch)
            except _LeftError:
                pass
            except GgufSdError as error:
                watch.send(("error", str(error)))
            finally:
                watch.send(None)

        painting = loop.run_in_executor(None, work)
        try:
            while (event := await events.get()) is not None:
                yield event
            await painting
        finally:
            watch.left.set()


class _Sender:
    def __init__(self, looks: Sequence[int]):
        self.looks, self.left = looks, threading.Event()
        self.send: Any = None

    def wanted(self) -> Sequence[int]:
        return self.looks

    def step(self, step: int, looks: Mapping[int, bytes]) -> None:
        if self.left.is_set():
            raise _LeftError
        self.send(("step", (step, looks)))

    def finished(self, index: int, picture: Finished) -> None:
        self.send(("finished", (index, picture)))


class RemotePainter:
    """Has pictures painted by whichever replica is free."""

    def __init__(self, handle: Any):
        self.handle = handle

    def paint(self, model: str, jobs: Sequence[Job], watcher: Watcher) -> None:
        """Looks are made where they are wanted from the beginning. Raises GgufSdError where painting fails, and where
        replicas were lost again and again."""
        from ray.exceptions import RayError, RayTaskError

        for attempt in range(1, TRIES + 1):
            try:
                self._paint(model, jobs, watcher)
                return
            except RayTaskError:  # the replica is there, and its code failed
                raise
            except RayError as error:
                log.warning("a replica was lost (%s); attempt %d of %d", type(error).__name__, attempt + 1, TRIES)
                time.sleep(PAUSE)
        raise GgufSdError(f"the cluster lost {TRIES} replicas that painted this; try again later")

    def _paint(self, model: str, jobs: Sequence[Job], watcher: Watcher) -> None:
        events = self.handle.options(stream=True).paint.remote(model, list(jobs), list(watcher.wanted()))
        try:
            for kind, value in events:
                if kind == "error":
                    raise GgufSdError(value)
                (watcher.step if kind == "step" else watcher.finished)(*value)
        except BaseException:
            events.cancel()
            raise


class Replicas:
    """Replicas on the cluster at an address (see :class:`gguf_sd.batch.on_ray.connected`), for the time of the block,
    which gets as many painters. Raises GgufSdError where Ray is not there."""

    def __init__(self, shelf: Shelf, options: LoadOptions, address: str, count: int, cores: int = 1):
        self.models = {name: model.path.resolve() for name, model in shelf.models.items()}
        self.options, self.count, self.cores = options.resolved(), count, cores
        self.cluster = connected(address)

    def __enter__(self) -> list[Painter]:
        self.cluster.__enter__()
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise GgufSdError("--ray needs Ray Serve: pip install 'gguf-sd[ray]'") from error
        actor: dict[str, Any] = {"num_cpus": self.cores}
        if self.options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0:
            actor["num_gpus"] = 1
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            num_replicas=self.count, max_ongoing_requests=1, ray_actor_options=actor, health_check_period_s=2
        )(Replica)
        application = deployment.bind(self.models, self.options, self.cores)
        handle = serve.run(application, name=APPLICATION, route_prefix=None)
        return [RemotePainter(handle) for _ in range(self.count)]

    def __exit__(self, *exception: object) -> None:
        from ray import serve

        serve.shutdown()
        self.cluster.__exit__(*exception)
