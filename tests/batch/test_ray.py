"""The same batch, and the same server, on a Ray cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch.conftest import Batch

ray = pytest.importorskip("ray", reason="needs gguf-sd[ray]")
pytestmark = pytest.mark.slow
ROWS = "\n".join(
    json.dumps({"prompt": f"a {what} cat", "width": 32 + 8 * (i % 3)}) for i, what in enumerate("abcd" * 6)
)
ROWS += '\n{"prompt": "a cat", "sampler": "nonsense"}\n'


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that paints nothing, and two nodes that can run a painter each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[2] / x) for x in ("", "kernels", "convert"))
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_node_is_lost_and_nothing_else(batch: Batch, tmp_path: Path, cluster: Any) -> None:
    assert batch("p.jsonl", ROWS, "here", "--batch", "2") == 1
    both, nodes = cluster
    manifest = tmp_path / "there" / "manifest.jsonl"
    seen: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not seen:
            if manifest.exists() and len(painted := manifest.read_text().splitlines()) > 3:
                seen.append(len(painted))
                both.remove_node(nodes[0], allow_graceful=False)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    assert batch("p.jsonl", ROWS, "there", "--batch", "2", "--ray", both.address) == 1
    killer.join()
    assert 3 < seen[0] < 25, "it was killed in the middle"
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 26)), "each row once"


def our_processes(title: str) -> list[int]:
    """Processes that this test has started, or that those have, whose command line has ``title`` in it."""
    parents: dict[int, int] = {}
    painters = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid, stat = int(folder.name), (folder / "stat").read_text()
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
            if title in (folder / "cmdline").read_text():
                painters.append(pid)
        except OSError:  # it has ended
            continue

    def ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return list(filter(ours, painters))


def test_an_actor_is_killed(batch: Batch, tmp_path: Path, cluster: Any) -> None:
    """Processes that paint are killed as the system would where memory runs out."""
    assert batch("p.jsonl", ROWS, "here", "--batch", "2") == 1
    manifest = tmp_path / "there" / "manifest.jsonl"
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not killed:
            if manifest.exists() and len(manifest.read_text().splitlines()) > 3:
                for pid in our_processes("MapWorker")[:1]:
                    os.kill(pid, 9)
                    killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    assert batch("p.jsonl", ROWS, "there", "--batch", "2", "--ray", cluster[0].address) == 1
    killer.join()
    assert killed
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
