"""Compiles Triton kernels for GPUs that are not here, and reads from the result what decides their speed.

The arguments are specialised as Triton's launcher would specialise them (16-byte alignment of pointers, divisibility by
16 and equality to 1 of integers), so that the code is the code that a launch with those arguments would run. Works in a
process whose kernels are compiled, not interpreted: mark tests with ``needs_compiler``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
import triton
from triton import knobs
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may use, from the vendors' documentation."""

needs_compiler = pytest.mark.skipif(knobs.runtime.interpret, reason="kernels are interpreted in this process")


@dataclass(frozen=True)
class Compiled:
    """What a kernel costs on a target.

    Attributes:
        registers: vector registers a thread (on AMD: VGPRs, accumulation registers included).
        stack: bytes of stack or private segment a thread.
        spills: instructions that touch local memory (AMD: vector registers spilled).
        shared: bytes of shared memory a block.
        loads, stores: instructions to global memory by width in bits; not weighted by how often they run.
        text: the SASS or the GCN assembly.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    loads: Counter
    stores: Counter
    text: str = field(repr=False)


def assert_fits(compiled: Compiled, target: str, *, max_registers: int = 255) -> None:
    """No spill, no stack, shared memory within the target's limit, registers within the kernel's own budget."""
    assert compiled.stack == 0, compiled
    assert compiled.spills == 0, compiled
    assert compiled.shared <= SHARED_LIMIT[target], compiled
    assert 0 < compiled.registers <= max_registers, compiled


def _read_nvidia(result) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    instructions = re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)\b", sass)

    def widths(name: str) -> Counter:
        return Counter(_sass_width(suffix) for mnemonic, suffix in instructions if mnemonic == name)

    spills = sum(1 for mnemonic, _ in instructions if mnemonic in ("LDL", "STL"))
    return Compiled(usage["REG"], usage["STACK"], spills, result.metadata.shared, widths("LDG"), widths("STG"), sass)


def _sass_width(suffix: str) -> int:
    parts = suffix.split(".")
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((sizes[part] for part in parts if part in sizes), 32)


_GCN_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def _read_amd(result) -> Compiled:
    text = result.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

    def widths(name: str) -> Counter:
        found = re.findall(rf"\b(?:global|buffer|flat)_{name}_(dword(?:x(\d))?|[us]?byte|[us]?short)", text)
        return Counter(32 * int(count or 1) if size.startswith("dword") else _GCN_BITS[size] for size, count in found)

    spills = number("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", text))
    stack = number("private_segment_fixed_size")
    return Compiled(number("vgpr_count"), stack, spills, result.metadata.shared, widths("load"), widths("store"), text)


@dataclass(frozen=True)
class Launch:
    """A kernel launch as an op makes it."""

    kernel: JITFunction
    args: tuple
    keywords: dict

    def compile(self, target: str) -> Compiled:
        """As this launch on the target would; Triton looks at nothing but dtype and address of tensors."""
        kernel, gpu = self.kernel, TARGETS[target]
        backend = make_backend(gpu)
        options = {key: value for key, value in self.keywords.items() if key not in kernel.arg_names}
        constexprs = {key: value for key, value in self.keywords.items() if key in kernel.arg_names}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*self.args, **constexprs)
        types, values = [kind for kind, _ in specialization], list(bound.values())
        keys = ["" if kind == "constexpr" else key for kind, key in specialization]
        constants = find_paths_if(types, lambda _, kind: kind == "constexpr")
        attributes = find_paths_if(keys, lambda _, key: isinstance(key, str))
        source = ASTSource(
            kernel,
            dict(zip(kernel.arg_names, types, strict=True)),
            {path: get_iterable_path(values, path) for path in constants},
            {path: backend.parse_attr(get_iterable_path(keys, path)) for path in attributes},
        )
        result = triton.compile(source, target=gpu, options={"num_warps": 4, **options})
        return _read_nvidia(result) if gpu.backend == "cuda" else _read_amd(result)


def record_launches(monkeypatch: pytest.MonkeyPatch, *op_modules) -> list[Launch]:
    """From here on the ops of these modules take their Triton path and append to this list instead of launching.

    What the ops return is unwritten memory.
    """
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernels):
            self.kernels = kernels

        def __getattr__(self, name):
            kernel = getattr(self.kernels, name)
            launch = lambda *args, **keywords: launches.append(Launch(kernel, args, keywords))  # noqa: E731
            return defaultdict(lambda: launch)  # by grid

    for module in op_modules:
        monkeypatch.setattr(module, "_kernels", Recorder(module._kernels))
        for decides in ("takes_triton", "fuses"):
            if hasattr(module, decides):
                monkeypatch.setattr(module, decides, lambda *_: True)
    return launches
