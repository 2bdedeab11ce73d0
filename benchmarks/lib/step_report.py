"""What bench_step.py measured, in relation: to diffusers, to the floor, to the project's targets; and as a table."""

from __future__ import annotations

from typing import Any

GOAL = 1.3  # times as fast as diffusers in float16, eager
WEIGHTS_GOAL = {"sd15": 0.5e9, "sdxl": 1.5e9}  # bytes of Q4_0 weights on the device
COPIES_GOAL = 0.02  # share of a step's time on the GPU
RIVAL = "diffusers"
TOP = 8  # kernels shown

Entry = dict[str, Any]


def relate(entry: Entry, floor_ms: dict[str, float]) -> None:
    """Adds ratios to diffusers, and how much of the time the floor explains."""
    ms = entry["ms"]
    if RIVAL in ms:
        entry["times_as_fast_as_diffusers"] = {name: round(ms[RIVAL] / t, 3) for name, t in ms.items()}
    entry["floor_ms"] = {name: round(floor, 4) for name, floor in floor_ms.items()}
    entry["floor_fraction"] = {name: round(floor_ms[name] / t, 3) for name, t in ms.items()}


def targets(steps: dict[str, Entry]) -> list[dict[str, Any]]:
    """Whether each of the project's targets is met: true, false, or None where that was not measured."""
    ratios, weights, copies = {}, {}, {}
    finite: dict[str, bool] = {}
    for key, entry in steps.items():
        name, qtype = key.split()
        finite |= {f"{key} {contender}": ok for contender, ok in entry["finite"].items()}
        if qtype != "Q4_0":
            continue
        if ratio := entry.get("times_as_fast_as_diffusers", {}).get("auto graph"):
            ratios[name] = ratio
        model = name.split("-")[0]
        if model in WEIGHTS_GOAL and "fused" in entry["memory"]:
            weights[name] = entry["memory"]["fused"]["weights"]
        if (share := entry.get("profile", {}).get("copies_share")) is not None:
            copies[name] = share
    return [
        _target(
            f"Q4_0 step (auto, CUDA graph) at least {GOAL} times as fast as diffusers float16 eager",
            {name: f"{ratio:.2f}" for name, ratio in ratios.items()},
            [ratio >= GOAL for ratio in ratios.values()],
        ),
        _target(
            "Q4_0 UNet weights on the device within 0.5 GB (SD 1.5) and 1.5 GB (SDXL)",
            {name: f"{nbytes / 1e9:.3f} GB" for name, nbytes in weights.items()},
            [nbytes <= WEIGHTS_GOAL[name.split("-")[0]] for name, nbytes in weights.items()],
        ),
        _target(
            f"no layout copies: at most {COPIES_GOAL:.0%} of a fused step's time on the GPU",
            {name: f"{share:.1%}" for name, share in copies.items()},
            [share <= COPIES_GOAL for share in copies.values()],
        ),
        _target("every step is finite", {key: "is not" for key, ok in finite.items() if not ok}, list(finite.values())),
    ]


def _target(name: str, details: dict[str, str], met: list[bool]) -> dict[str, Any]:
    detail = ", ".join(f"{of} {value}" for of, value in details.items())
    return {"name": name, "met": all(met) if met else None, "detail": detail}


def lines(key: str, entry: Entry) -> list[str]:
    """A workload and type for people."""
    found = ["", f"{key}: {entry['gmac']:.0f} GMAC"]
    heads = ("ms", "x diffusers", "of floor", "weights GB", "step GB", "graph GB", "peak GB")
    found.append(f"  {'':18}" + "".join(f"{head:>12}" for head in heads))
    for name, t in entry["ms"].items():
        ratio = entry.get("times_as_fast_as_diffusers", {}).get(name)
        memory = entry["memory"][name]
        sizes = (memory.get(part) for part in ("weights", "step", "graph_driver", "peak"))
        cells = [f"{t:12.3f}", f"{ratio:12.2f}" if ratio else " " * 12, f"{entry['floor_fraction'][name]:12.1%}"]
        cells += [" " * 12 if size is None else f"{size / 1e9:12.3f}" for size in sizes]
        found.append(f"  {name:18}" + "".join(cells))
    if entry["prompt_ms"]:
        found.append("  prompt, once a picture, ms: " + _pairs(entry["prompt_ms"], ".3f"))
    if entry["errors"]:
        found.append("  errors: " + _pairs(entry["errors"], ".1e"))
    if compiled := entry.get("diffusers_compiled"):
        found.append(f"  diffusers compiled in {compiled['compile_seconds']} s, ms: {_pairs(compiled['ms'], '.3f')}")
    profile = entry.get("profile")
    if profile and profile["device_ms"] is not None:
        found.append(
            f"  a fused step's time on the GPU: {profile['device_ms']} ms, copies and changes of layout "
            f"{profile['copies_share']:.1%}, concatenations {profile['concatenations_share']:.1%}"
        )
        found += [f"    {kernel['ms']:8.3f} ms {kernel['kernel']}" for kernel in profile["top"][:TOP]]
    return found


def _pairs(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
