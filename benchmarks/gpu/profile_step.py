"""Where the GPU's time in a step goes, by kernel: above all, how much of it moves data without computing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

TOP = 15
# Changes of layout and plain copies. The names of convolutions hold "nhwc" too, so that alone says nothing.
COPIES = re.compile(r"nchwToNhwc|nhwcToNchw|direct_copy|transpose_?(kernel|readwrite)|permute|Memcpy", re.IGNORECASE)
CONCATENATIONS = re.compile(r"CatArray", re.IGNORECASE)


def kernel_times(run: Callable[[], object]) -> Counter[str]:
    """Microseconds on the GPU of each kernel of a run; empty without one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:  # the CPU's operators claim the times of their kernels once more
            times[event.key] += event.self_device_time_total
    return times


def breakdown(times: Counter[str]) -> dict[str, Any]:
    """Total milliseconds, the shares of copies and of concatenations, and the kernels that take longest."""
    total = sum(times.values())

    def share(pattern: re.Pattern[str]) -> float | None:
        return round(sum(t for name, t in times.items() if pattern.search(name)) / total, 4) if total else None

    return {
        "device_ms": round(total / 1e3, 3) if total else None,
        "copies_share": share(COPIES),
        "concatenations_share": share(CONCATENATIONS),
        "top": [{"kernel": name[:120], "ms": round(t / 1e3, 3)} for name, t in times.most_common(TOP)],
    }
