"""What kernels move through memory, counted access by access in Triton's interpreter.

Nothing here believes a declared shape: every load and store that a kernel makes is seen, with its addresses and mask.

``accessed``  bytes that the loads (or stores) asked for, masked-out lanes excluded; an element that one load names in
              several lanes counts once, an element that two loads name counts twice. What a kernel reads again, in the
              same program or another, shows here.
``unique``    bytes of distinct elements, each counted once a launch: what a cache that forgets nothing would fetch.
``sectors``   distinct 32-byte sectors a launch, counted from the start of the tensor's storage, which CUDA's allocator
              aligns to 512 bytes: what DRAM can deliver no less than.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SECTOR = 32


@dataclass(frozen=True)
class Moved:
    """Bytes and sectors of one tensor in one direction."""

    accessed: int = 0
    unique: int = 0
    sectors: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.accessed + other.accessed, self.unique + other.unique, self.sectors + other.sectors)


@dataclass(frozen=True)
class Launch:
    """What one kernel launch read and wrote, by the names of the kernel's pointer arguments without ``_ptr``."""

    reads: dict[str, Moved]
    writes: dict[str, Moved]


class Traffic:
    """The launches since counting began."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def reads(self) -> dict[str, Moved]:
        """By argument name, summed over the launches."""
        return self._by_name("reads")

    def writes(self) -> dict[str, Moved]:
        return self._by_name("writes")

    def _by_name(self, direction: str) -> dict[str, Moved]:
        total: dict[str, Moved] = {}
        for launch in self.launches:
            for name, moved in getattr(launch, direction).items():
                total[name] = total.get(name, Moved()) + moved
        return total


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the loads, stores and launches of interpreted kernels.

    A kernel that touches memory of none of its arguments, or uses an atomic, fails before it does.
    """
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    traffic = Traffic()
    recorders: list[_Recorder] = []
    load, store, run = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpretedFunction.run,
    )

    def counted_load(self, pointers, mask, *rest, **keywords):
        recorders[-1].note("reads", pointers, mask)
        return load(self, pointers, mask, *rest, **keywords)

    def counted_store(self, pointers, value, mask, *rest, **keywords):
        recorders[-1].note("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest, **keywords)

    def counted_run(self, *args, grid, warmup, **keywords):
        bound = dict(zip(self.arg_names, args, strict=False)) | keywords
        tensors = {k.removesuffix("_ptr"): v for k, v in bound.items() if isinstance(v, Tensor)}
        recorders.append(_Recorder(self.__name__, tensors))
        # The interpreter copies storages about; that is its own affair.
        with _disable_current_modes():
            result = run(self, *args, grid=grid, warmup=warmup, **keywords)
        traffic.launches.append(recorders.pop().launch())
        return result

    def refuse(*_, **__):
        raise AssertionError("an atomic: its traffic is not counted, and sums would change from run to run")

    with ExitStack() as stack:
        for owner, name, replacement in (
            (InterpreterBuilder, "create_masked_load", counted_load),
            (InterpreterBuilder, "create_masked_store", counted_store),
            (InterpreterBuilder, "create_atomic_rmw", refuse),
            (InterpreterBuilder, "create_atomic_cas", refuse),
            (InterpretedFunction, "run", counted_run),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield traffic


class _Recorder:
    """The accesses of one launch, each assigned to the argument in whose storage it lies."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]):
        self.kernel = kernel
        self.starts = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
        self.ends = {name: self.starts[name] + tensor.untyped_storage().nbytes() for name, tensor in tensors.items()}
        self.found: dict[str, dict[tuple[str, int], list[np.ndarray]]] = {"reads": {}, "writes": {}}

    def note(self, direction: str, pointers, mask) -> None:
        addresses = np.unique(pointers.data[mask.data].astype(np.int64))
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, start in self.starts.items():
            if start <= addresses[0] and addresses[-1] + size <= self.ends[name]:
                self.found[direction].setdefault((name, size), []).append(addresses - start)
                return
        raise AssertionError(f"{self.kernel} touched memory outside of its arguments")

    def launch(self) -> Launch:
        return Launch(self._sum("reads"), self._sum("writes"))

    def _sum(self, direction: str) -> dict[str, Moved]:
        total: dict[str, Moved] = {}
        for (name, size), offsets in self.found[direction].items():
            distinct = np.unique(np.concatenate(offsets))
            # Elements are aligned to their size, so that none straddles two sectors.
            moved = Moved(sum(o.size for o in offsets) * size, distinct.size * size, np.unique(distinct // SECTOR).size)
            total[name] = total.get(name, Moved()) + moved
        return total
