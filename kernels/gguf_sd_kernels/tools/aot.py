"""Compiles every kernel and launch for GPUs that are not there, and reads what the machine code says.

    python -m gguf_sd_kernels.tools.aot                 # every launch, type and target
    python -m gguf_sd_kernels.tools.aot --sample 40     # some of them, of every target
    python -m gguf_sd_kernels.tools.aot --target 90 --summary benchmarks/results/aot.json    # a target's line there

Checked: no stack (a spill), shared memory within the card's, the matrix instruction the card is bought for, and
that the compiler is silent (inline PTX "compiles" for AMD, printing an error).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

from gguf_sd_kernels.tools.aot_cases import Case, cases
from gguf_sd_kernels.tuning.fingerprint import kernels_version

# Shared memory a thread block may have, KiB. CUDA C programming guide, technical specifications per compute
# capability; AMD: 64 KiB of local data share a work group.
SHARED_KIB = {
    "75": 64,
    "80": 163,
    "86": 99,
    "89": 99,
    "90": 227,
    "100": 227,
    "120": 99,
    "gfx942": 64,
    "gfx1100": 64,
}
# The instructions each target multiplies matrices with: of float16 and bfloat16, of int8. sm_90 runs tiles of fewer
# than 64 rows through those of sm_80. sm_100 has UTCIMMA for int8, but Triton makes mma.sync of it.
MATRIX_INSTRUCTIONS = {
    "80": {"float": "HMMA", "int8": "IMMA"},
    "86": {"float": "HMMA", "int8": "IMMA"},
    "89": {"float": "HMMA", "int8": "IMMA"},
    "90": {"float": "HGMMA", "int8": "IGMMA"},
    "100": {"float": "UTCHMMA", "int8": "IMMA"},
    "120": {"float": "HMMA", "int8": "IMMA"},
    "gfx942": {"float": "v_mfma_f32", "int8": "v_mfma_i32"},
    "gfx1100": {"float": "v_wmma_f32", "int8": "v_wmma_i32"},
}


@dataclass(frozen=True)
class Built:
    """What one compilation gave; ``faults`` is empty where all is well."""

    case: str
    target: str
    registers: int
    shared: int  # bytes
    stack: int  # bytes a thread
    instructions: int
    loop_instructions: int  # in the longest loop
    loop_matrix: int  # of them matrix instructions
    faults: tuple[str, ...]


def build(case: Case, target: str) -> Built:
    """Compiles ``case`` for ``target``, "80" to "120" (compute capability * 10) or "gfx942"; inspects the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gguf_sd_kernels.triton.launcher import OPTIONS

    kernel = case.kernel()
    signature, attrs = {}, {}
    for i, param in enumerate(kernel.params):
        signature[param.name] = "constexpr" if param.name in case.constants else case.types[param.name]
        if signature[param.name].startswith("*") or param.name in case.multiples_of_16:
            attrs[(i,)] = [["tt.divisibility", 16]]
    amd = target.startswith("gfx")
    gpu = (
        GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32) if amd else GPUTarget("cuda", int(target), 32)
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    with _captured_stderr() as printed:
        compiled = triton.compile(
            source, target=gpu, options=OPTIONS | {"num_warps": case.warps, "num_stages": case.stages}
        )
    shared = compiled.metadata.shared
    built = _inspect_amd(compiled.asm["amdgcn"]) if amd else _inspect_cuda(compiled.asm["cubin"])
    wanted = ""
    if case.matrix:
        narrow = target == "90" and case.matrix_rows < 64
        wanted = MATRIX_INSTRUCTIONS["80" if narrow else target][case.matrix]
    loop, matrix = _main_loop(built.code, wanted)
    faults = []
    if built.stack:
        faults.append(f"{built.stack} bytes of stack")
    if shared > SHARED_KIB[target] * 1024:
        faults.append(f"{shared} bytes of shared memory, {SHARED_KIB[target]} KiB are there")
    if wanted and wanted not in built.text:
        faults.append(f"no {wanted}")
    if printed:
        faults.append(f"compiler printed: {' '.join(printed)[:300]}")
    return Built(case.name, target, built.registers, shared, built.stack, len(built.code), loop, matrix, tuple(faults))


@dataclass(frozen=True)
class _Machine:
    text: str
    code: list[str]  # instructions and labels
    registers: int
    stack: int


def _inspect_cuda(cubin: bytes) -> _Machine:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], check=True, capture_output=True, text=True
            ).stdout

        usage = run("cuobjdump", "--dump-resource-usage")
        text = run("nvdisasm", "-c")
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    code = [line.strip() for line in text.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_x_\d+:)", line)]
    return _Machine(text, code, registers, stack)


def _inspect_amd(text: str) -> _Machine:
    body = text.partition("s_endpgm")[0]
    code = [
        line.partition(";")[0].strip() for line in body.splitlines() if re.match(r"\s+[a-z]+_\w+|\.LBB\d+_\d+:", line)
    ]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    return _Machine(text, code, registers, stack)


def _main_loop(code: list[str], matrix: str) -> tuple[int, int]:
    """(instructions, matrix instructions) of the loop with most matrix instructions, else of the longest."""
    labels: dict[str, int] = {}
    loops = [(0, 0, 0)]
    for i, line in enumerate(code):
        if line.endswith(":"):
            labels[line[:-1]] = i
        elif (jump := re.search(r"\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L\w+)", line)) and jump[1] in labels:
            body = [x for x in code[labels[jump[1]] : i + 1] if not x.endswith(":")]
            count = sum(matrix in x for x in body) if matrix else 0
            loops.append((count, -len(body) if count else len(body), len(body)))
    count, _, length = max(loops)
    return length, count


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """The lines that anything in this process, C++ included, writes to standard error."""
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _build(job: tuple[Case, str]) -> Built:
    return build(*job)


def build_all(jobs: list[tuple[Case, str]], processes: int) -> Iterator[Built]:
    """Compiles in parallel, in a cache that is thrown away."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield from pool.map(_build, jobs)


def sample(jobs: list[tuple[Case, str]], count: int) -> list[tuple[Case, str]]:
    """``count`` of the jobs, in equal numbers of every target and there of every kernel; the same ones each time."""
    draw = random.Random(0)
    by_target: dict[str, dict[str, list[tuple[Case, str]]]] = {}
    for case, target in draw.sample(jobs, len(jobs)):
        by_target.setdefault(target, {}).setdefault(case.function, []).append((case, target))
    return _in_turn([_in_turn(list(by_kernel.values())) for by_kernel in by_target.values()])[:count]


def _in_turn(lists: list[list[tuple[Case, str]]]) -> list[tuple[Case, str]]:
    """The first of every list, then the second of every list, …"""
    return [job for row in zip_longest(*lists) for job in row if job]


def summarise(results: Sequence[Built], path: Path) -> None:
    """Puts a line for each target into a JSON file, in place of that target's last one."""
    from triton import __version__ as triton_version

    lines = json.loads(path.read_text()) if path.exists() else {}
    for target in dict.fromkeys(r.target for r in results):
        built = [r for r in results if r.target == target]
        lines[target] = {
            "compiled": len(built),
            "with_faults": sum(bool(r.faults) for r in built),
            "most_registers": max(r.registers for r in built),
            "most_shared_bytes": max(r.shared for r in built),
            "kernels": kernels_version(),
            "triton": triton_version,
            "date": datetime.now(UTC).date().isoformat(),
        }
    path.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(SHARED_KIB), help="default: all")
    parser.add_argument("--only", default="", help="a part of the case's name")
    parser.add_argument("--sample", type=int, help="how many compilations, over all targets; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file to write results to")
    parser.add_argument("--summary", type=Path, help="JSON file that gets a line for each target; of whole targets")
    args = parser.parse_args()
    if args.summary and (args.only or args.sample):
        parser.error("--summary is of whole targets, without --only and --sample")
    jobs = [(case, t) for t in args.target or SHARED_KIB for case in cases(t) if args.only in case.name]
    if args.sample:
        jobs = sample(jobs, args.sample)
    results = []
    print(f"{'target':8}{'regs':>5}{'shared':>8}{'stack':>6}{'code':>6}{'loop':>6}{'mma':>5}  case")
    for r in build_all(jobs, args.processes):
        results.append(r)
        print(
            f"{r.target:8}{r.registers:5}{r.shared:8}{r.stack:6}{r.instructions:6}{r.loop_instructions:6}"
            f"{r.loop_matrix:5}  {r.case}{'  FAULT: ' + '; '.join(r.faults) if r.faults else ''}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    if args.summary:
        summarise(results, args.summary)
    faults = sum(bool(r.faults) for r in results)
    print(f"{len(results)} compiled, {faults} with faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
