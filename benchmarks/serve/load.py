"""Many clients at one small queue: is every request answered or refused, how long does it take, does memory grow?

    python -m benchmarks.serve.load --json benchmarks/results/serve-load.json

Starts `gguf-sd serve` on this machine with the demo model, then has ``--clients`` threads send ``--requests`` requests
in all, each as soon as the one before is answered, or two seconds after a refusal (429), which is an answer, too.
Latencies are those of requests that were painted; the server's own memory is read from its /metrics, first after a
tenth of the requests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"http://127\.0\.0\.1:[0-9]+")
PAUSE = 2.0  # seconds that a client waits after a refusal: less than it is told, so that the queue stays full
PROMPTS = ("a red circle", "a blue square on a grey background", "a green ring above a yellow cross")


@dataclass
class Load:
    """What came of the requests. Seconds of painted ones, by their order; bytes of the server while they came."""

    codes: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


@contextmanager
def server(queue: int, batch: int) -> Iterator[str]:
    """Runs the program on a free port; its address."""
    arguments = ["serve", "--port", "0", "--queue", str(queue), "--batch", str(batch), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "gguf_sd", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = ADDRESS.search(process.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        yield found[0]
    finally:
        process.terminate()
        code = process.wait(60)
        print(f"the server ended with {code}")


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def memory(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        found = re.search(r'memory_bytes\{kind="process"\} (\S+)', answer.read().decode())
    return int(float(found[1])) if found else 0


def run(url: str, requests: int, clients: int, steps: int) -> Load:
    load, numbers, lock = Load(), iter(range(requests)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "steps": steps, "seed": number}
            started = time.perf_counter()
            code, answer, headers = post(f"{url}/v1/images/generations", body)
            took = time.perf_counter() - started
            with lock:
                load.codes[code] += 1
                if code == 200:
                    load.seconds.append(took)
                if not fits(code, answer, headers):
                    load.wrong.append(f"{code}: {str(answer)[:200]}")
                if number % max(requests // 10, 1) == 0 and number:
                    load.memory.append(memory(url))
            if code == 429:
                time.sleep(PAUSE)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.memory.append(memory(url))
    return load


def fits(code: int, answer: dict[str, Any], headers: Any) -> bool:
    """Whether an answer is a picture, or a refusal as it should be."""
    if code == 200:
        return bool(answer["data"][0]["b64_json"].startswith("iVBOR"))
    return code == 429 and int(headers["Retry-After"]) >= 1 and "try again" in answer["error"]["message"]


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "most": max(seconds), "least": min(seconds)}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=int, default=200)
    add("--clients", type=int, default=20)
    add("--queue", type=int, default=8, help="requests that may wait (8)")
    add("--batch", type=int, default=4, help="pictures painted at once (4)")
    add("--steps", type=int, default=10)
    add("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    started = time.perf_counter()
    with server(args.queue, args.batch) as url:
        post(f"{url}/v1/images/generations", {"prompt": "a red circle", "steps": 2, "n": args.batch})  # loads the model
        began = time.perf_counter()
        load = run(url, args.requests, args.clients, args.steps)
        seconds = time.perf_counter() - began
    growth = load.memory[-1] - load.memory[0]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "load": round(os.getloadavg()[0], 2),
        "torch": version("torch"),
        "settings": {name: getattr(args, name) for name in ("requests", "clients", "queue", "batch", "steps")},
        "answers": {str(code): count for code, count in sorted(load.codes.items())},
        "wrong": load.wrong,
        "seconds": round(seconds, 1),
        "pictures_per_second": round(load.codes[200] / seconds, 2),
        "latency": percentiles(load.seconds),
        "memory_mb": [round(nbytes / 1e6, 1) for nbytes in load.memory],
        "memory_growth_mb": round(growth / 1e6, 1),
    }
    print(json.dumps(result, indent=2), f"\nin all {time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    answered = sum(load.codes.values()) == args.requests and not load.wrong
    sys.exit(0 if answered and growth < 50e6 else 1)


if __name__ == "__main__":
    main()
