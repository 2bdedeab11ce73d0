"""The parts of on_gpu.sh in one file for programs, results.json, and one for people, summary.txt.

    python -m benchmarks.gpu.report PARTS RESULTS

PARTS holds a JSON file for each part, and ``status``, a line for each: name, exit status, seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

PARTS = ("machine", "check", "kernels", "tune", "picture", "stream", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    parts = {name: read(args.parts / f"{name}.json") for name in PARTS}
    lines = (args.parts / "status").read_text().splitlines()
    statuses = {
        name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in map(str.split, lines)
    }
    found = {"parts": statuses} | {name: part for name, part in parts.items() if part}
    (args.results / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(summary(parts, statuses, args.results)) + "\n"
    (args.results / "summary.txt").write_text(text)


def read(path: Path) -> dict[str, Any]:
    """Nothing for a part that left no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def summary(parts: dict[str, dict[str, Any]], statuses: dict[str, dict[str, int]], results: Path) -> list[str]:
    """Tables first; what it comes to, last."""
    machine = parts["machine"]
    lines: list[str] = []
    for name in PARTS[1:]:
        lines += [f"== {name}", *parts[name].get("summary", ["no results"]), ""]
    lines.append(f"== {machine.get('gpu')}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}")
    lines.append(f"{machine.get('date')}, commit {machine.get('commit')}, Python {machine.get('python')}")
    lines.append(", ".join(f"{name} {version or 'absent'}" for name, version in machine.get("versions", {}).items()))
    for name, part in statuses.items():
        lines.append(f"part {name}: {'done' if part['status'] == 0 else 'FAILED'} in {part['seconds']} s")
    for name in PARTS[1:]:
        lines += [target_line(target) for target in parts[name].get("targets", [])]
    if (results / "auto.json").is_file() and machine:
        table = Path(machine["table"])
        command = f"mkdir -p {shlex.quote(str(table.parent))} && cp {shlex.quote(str(results / 'auto.json'))} "
        lines.append(f"for mode auto to go by this: {command}{shlex.quote(str(table))}")
    return lines


def target_line(target: dict[str, Any]) -> str:
    """A target of the project, and whether it is met."""
    met = {True: "yes", False: "NO", None: "not measured"}[target["met"]]
    return f"{met}: {target['name']}" + (f" ({target['detail']})" if target["detail"] else "")


if __name__ == "__main__":
    main()
