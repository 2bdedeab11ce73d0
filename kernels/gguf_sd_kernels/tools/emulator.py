"""Executes the machine code of AMD's RDNA 3 on the CPU: the emulator of the public tinygrad repository, from a
checkout of it (``test/mockgpu/amd/emu.py``), with what it gets wrong mended here, in memory.

Device pointers are host pointers: the emulated memory is this process's. Mended, each seen with Triton's code:

- A DPP instruction whose destination is its source reads lanes that it has already overwritten. Here such
  instructions read a copy of the registers.
- The DPP control ``row_xmask`` (0x160 on) is taken for another. Triton 3.9 uses it in reductions.
- ``v_permlanex16`` ignores a literal third operand.
- Lanes that are switched off read local memory all the same, wherever their registers point. Here any address can be
  read.
- Waves of a work group share one scratch area. Here each wave has its own.
- Buffer instructions (MUBUF) are not emulated. ``buffer_gl0_inv`` and ``buffer_gl1_inv`` do nothing here, as no cache
  is modelled; loads and stores are avoided by compiling with ``AMDGCN_USE_BUFFER_OPS=0``, as
  :mod:`gguf_sd_kernels.tools.emulated_gpu` does.

It needs clang, which compiles each form of instruction once.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf_sd_kernels.tools.code_object import CodeObject

USER_KERNARG_POINTER = 1 << 3  # KERNEL_CODE_PROPERTIES: registers 0 and 1 hold the kernarg segment's address
USER_REGISTERS = 0x7F  # KERNEL_CODE_PROPERTIES: all that take user registers
LDS_UNIT = 512  # bytes; COMPUTE_PGM_RSRC2 counts local memory so, from bit 15 on
# What emulated instructions take, as the emulator numbers it.
IDENTITY = 0xE4  # DPP control quad_perm [0, 1, 2, 3]
SCALARS, VECTORS, LOCAL, SCRATCH, SNAPSHOT = 0, 1, 3, 4, 5


@dataclass(frozen=True)
class Target:
    """A GPU's architecture: its name, the emulator's name for its instructions, and the lanes of a wave."""

    architecture: str
    instructions: str
    wave: int

    @property
    def arguments_in_registers(self) -> bool:
        """Whether a kernel may find its first arguments in registers, and begins behind 256 bytes that load them
        where that is not done."""
        return self.instructions == "cdna"


TARGETS = {
    "gfx1100": Target("gfx1100", "rdna3", 32),
    "gfx1201": Target("gfx1201", "rdna4", 32),
    "gfx942": Target("gfx942", "cdna", 64),
}


class Emulator:
    """The emulator of the checkout in ``folder``, of ``target``; one a process. Raises ValueError where it is none,
    RuntimeError without clang."""

    def __init__(self, folder: Path, target: Target = TARGETS["gfx1100"]):
        if not (folder / "test/mockgpu/amd/emu.py").is_file():
            raise ValueError(f"{folder} is no checkout of tinygrad with test/mockgpu/amd/emu.py")
        if not shutil.which("clang"):
            raise RuntimeError("the emulator needs clang, which is not installed")
        sys.path.insert(0, str(folder.resolve()))
        for name in [name for name in sys.modules if name.partition(".")[0] == "test"]:
            del sys.modules[name]  # Python's own package of that name
        self.emu: Any = importlib.import_module("test.mockgpu.amd.emu")
        self.target = target
        self._scratch: dict[int, ctypes.Array[ctypes.c_char]] = {}  # by the wave's scalar registers
        self._scratch_bytes = 0
        _mend_row_xmask(self.emu)
        _mend_literals(self.emu)
        if target.instructions == "rdna3":
            _mend_cache_instructions(self.emu)
        if target.instructions == "rdna4":
            _mend_global_cache_instructions(self.emu)
        if target.instructions == "cdna":
            _mend_row_bcast(self.emu)
        self._mend_dpp_and_scratch()
        self._keep_decoded()

    def run(self, code: CodeObject, grid: tuple[int, int, int], threads: int, lds: int, kernargs: bytes) -> None:
        """Runs ``grid`` work groups of ``threads``, one after another, with ``lds`` bytes of local memory each.

        Raises ValueError for a kernel that wants its registers set up in a way that is not done here.
        """
        registers = code.properties & USER_REGISTERS
        if registers != USER_KERNARG_POINTER or (code.preload and not self.target.arguments_in_registers):
            raise ValueError(f"only the kernarg pointer is put into registers, the kernel wants {code.properties:#x}")
        image = self._image(code)
        arguments = ctypes.create_string_buffer(kernargs, len(kernargs) + 16)
        self._scratch, self._scratch_bytes = {}, code.scratch * self.target.wave
        rsrc2 = code.rsrc2 & ~(0x1FF << 15) | -(-lds // LDS_UNIT) << 15
        size = len(code.image) - code.entry
        start = ctypes.addressof(image) + code.entry
        kernarg_address = ctypes.addressof(arguments)
        self.emu.run_asm(
            start, size, *grid, threads, 1, 1, kernarg_address, rsrc2, code.scratch, self.target.instructions
        )

    @cached_property
    def _images(self) -> dict[CodeObject, ctypes.Array[ctypes.c_char]]:
        return {}

    def _image(self, code: CodeObject) -> ctypes.Array[ctypes.c_char]:
        """The code in memory, kept: what was decoded is kept by its address."""
        if code not in self._images:
            self._images[code] = ctypes.create_string_buffer(code.image, len(code.image) + 64)
        return self._images[code]

    def _keep_decoded(self) -> None:
        """Decodes each instruction once, not once a launch."""
        known: dict[int, Any] = {}
        decode = self.emu._decode_at

        def decode_at(address: int, arch: str) -> Any:
            if address not in known:
                known[address] = decode(address, arch)
            return known[address]

        self.emu._decode_at = decode_at

    def _mend_dpp_and_scratch(self) -> None:
        emu = self.emu
        read_swizzled, get_runner = emu._load_dpp16_src0, emu._get_runner
        size = 256 * self.target.wave
        snapshot = emu.UOp.param(SNAPSHOT, emu.dtypes.uint32, (size,))

        def read_snapshot(context: Any, *args: Any) -> Any:
            registers, context.vgpr = context.vgpr, snapshot
            try:
                return read_swizzled(context, *args)
            finally:
                context.vgpr = registers

        def runner(code: bytes, arch: str = "rdna3") -> Any:
            program, runtime = get_runner(code, arch)
            slots = list(program.arg.globals)
            if SNAPSHOT in slots and VECTORS in slots:
                return program, _Runtime(
                    _on_snapshot(runtime.fxn, slots.index(VECTORS), slots.index(SNAPSHOT), 4 * size)
                )
            if LOCAL in slots:
                return program, _Runtime(self._on_whole_local_memory(runtime.fxn, slots.index(LOCAL)))
            if SCRATCH in slots:
                return program, _Runtime(self._on_own_scratch(runtime.fxn, slots.index(SCALARS), slots.index(SCRATCH)))
            return program, runtime

        emu._load_dpp16_src0, emu._get_runner = read_snapshot, runner

    @cached_property
    def _local(self) -> mmap.mmap:
        """All that 32 bits address, of which pages are there once written; work groups run one after another."""
        return mmap.mmap(-1, (1 << 32) + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _on_whole_local_memory(self, function: Callable[..., Any], local: int) -> Callable[..., None]:
        address = ctypes.c_uint64(ctypes.addressof(ctypes.c_char.from_buffer(self._local)))

        def run(*pointers: ctypes.c_uint64) -> None:
            function(*pointers[:local], address, *pointers[local + 1 :])

        return run

    def _on_own_scratch(self, function: Callable[..., Any], scalars: int, scratch: int) -> Callable[..., None]:
        def run(*pointers: ctypes.c_uint64) -> None:
            area = self._scratch.setdefault(
                pointers[scalars].value, ctypes.create_string_buffer(self._scratch_bytes or 1)
            )
            own = ctypes.c_uint64(ctypes.addressof(area))
            function(*pointers[:scratch], own, *pointers[scratch + 1 :])

        return run


class _Runtime:
    """What the emulator asks of a compiled instruction."""

    def __init__(self, fxn: Callable[..., None]):
        self.fxn = fxn


def _on_snapshot(function: Callable[..., Any], registers: int, snapshot: int, size: int) -> Callable[..., None]:
    """``size`` in bytes, of all registers."""
    copy = ctypes.create_string_buffer(size)
    address = ctypes.c_uint64(ctypes.addressof(copy))

    def run(*pointers: ctypes.c_uint64) -> None:
        ctypes.memmove(copy, pointers[registers].value, size)
        function(*pointers[:snapshot], address, *pointers[snapshot + 1 :])

    return run


def _mend_row_xmask(emu: Any) -> None:
    """The controls 0x160 to 0x16f: each lane reads the one of its row whose number differs in these bits."""
    control = emu._dpp16_ctrl

    def dpp16_control(lane: Any, dpp: int, *masks: Any) -> Any:
        if dpp & 0x1F0 != 0x160:
            return control(lane, dpp, *masks)
        _, enabled, valid = control(lane, IDENTITY, *masks)
        return lane.cast(emu.dtypes.int) ^ emu.UOp.const(dpp & 0xF, emu.dtypes.int), enabled, valid

    emu._dpp16_ctrl = dpp16_control


def _mend_literals(emu: Any) -> None:
    compile_lanes, read = emu._Ctx.compile_lane_pcode, emu._Ctx.rsrc_dyn

    def compile_lane_pcode(context: Any, op: Any, instruction: Any) -> Any:
        literal = context.optional_field(instruction, "literal")

        def read_source(self: Any, offset: Any, lane: Any, bits: int = 32, known: Any = None, *args: Any) -> Any:
            return read(self, offset, lane, bits, literal if known is None else known, *args)

        emu._Ctx.rsrc_dyn = read_source
        try:
            return compile_lanes(context, op, instruction)
        finally:
            emu._Ctx.rsrc_dyn = read

    emu._Ctx.compile_lane_pcode = compile_lane_pcode


def _mend_cache_instructions(emu: Any) -> None:
    def compile_buffer(instruction: Any, context: Any) -> Any:
        if instruction.op.name not in ("BUFFER_GL0_INV", "BUFFER_GL1_INV"):
            raise NotImplementedError(f"{instruction.op.name}: compile with AMDGCN_USE_BUFFER_OPS=0")
        return emu.UOp.sink(*context.inc_pc())

    importlib.import_module("tinygrad.renderer.amd")._load_formats()["rdna3"].append(emu.ir3.MUBUF)
    emu._INST_HANDLERS[emu.ir3.MUBUF] = compile_buffer


def _mend_global_cache_instructions(emu: Any) -> None:
    compile_memory = emu._INST_HANDLERS[emu.ir4.VGLOBAL]

    def compile_global(instruction: Any, context: Any) -> Any:
        if instruction.op.name in ("GLOBAL_INV", "GLOBAL_WB", "GLOBAL_WBINV"):
            return emu.UOp.sink(*context.inc_pc())
        return compile_memory(instruction, context)

    emu._INST_HANDLERS[emu.ir4.VGLOBAL] = compile_global


def _mend_row_bcast(emu: Any) -> None:
    """The controls 0x142 and 0x143: each row but the first reads the last lane of the one before; the upper half reads
    lane 31."""
    control = emu._dpp16_ctrl

    def dpp16_control(lane: Any, dpp: int, *masks: Any) -> Any:
        if dpp not in (0x142, 0x143):
            return control(lane, dpp, *masks)
        number = lane.cast(emu.dtypes.int)
        _, enabled, _ = control(lane, IDENTITY, *masks)
        first = emu.UOp.const(16 if dpp == 0x142 else 32, emu.dtypes.int)
        source = (number // first) * first - emu.UOp.const(1, emu.dtypes.int)
        return source, enabled, number >= first

    emu._dpp16_ctrl = dpp16_control
