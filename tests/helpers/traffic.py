"""What moves through memory: of kernels, of PyTorch's operators, and of what torch.compile would make of them.

:func:`counted_traffic` sees every load and store of kernels in Triton's interpreter, with its addresses and mask:

``accessed``  bytes that the loads (or stores) asked for, masked-out lanes excluded; an element that one load names in
              several lanes counts once, an element that two loads name counts twice. What a kernel reads again, in the
              same program or another, shows here.
``unique``    bytes of distinct elements, each counted once per launch: what a cache that forgets nothing would fetch.
``sectors``   distinct 32-byte sectors per launch, counted from the start of the tensor's storage, which CUDA's
              allocator aligns to 512 bytes: what DRAM can deliver no less than.

:class:`EagerTraffic` charges each operator its inputs and outputs. A lower bound on what a GPU would move: an operator
may run several kernels (a sort), or read an input twice (a normalisation), but none can move less, caches aside. Free
are views and allocations. Operators that gather are charged what they pick, not what they pick from; broadcast
(stride 0) dimensions count once.

:func:`compiled_traffic` reads the schedule that Inductor makes for its Triton code, stopped before any code is made.
It runs without a GPU: the graphs are traced on the CPU, scheduled by Inductor's rules for Triton
(``config.cpu_backend = "triton"``) and then run eagerly. Bytes are Inductor's own count of the distinct buffers that
each scheduled kernel reads and writes. A lower bound: Inductor's kernels for long rows read their input once for each
pass over it, and on a GPU it splits reductions to a scalar into two launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SECTOR = 32


@dataclass(frozen=True)
class Moved:
    """Bytes and sectors of one tensor in one direction."""

    accessed: int = 0
    unique: int = 0
    sectors: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.accessed + other.accessed, self.unique + other.unique, self.sectors + other.sectors)


class Traffic:
    """What the launches since counting began read and wrote, by the names of the kernels' pointer arguments without
    ``_ptr``."""

    def __init__(self) -> None:
        self.launches = 0
        self.reads: dict[str, Moved] = {}
        self.writes: dict[str, Moved] = {}


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
        traffic.launches += 1
        recorder = recorders.pop()
        recorder.add("reads", traffic.reads)
        recorder.add("writes", traffic.writes)
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

    def add(self, direction: str, total: dict[str, Moved]) -> None:
        for (name, size), offsets in self.found[direction].items():
            distinct = np.unique(np.concatenate(offsets))
            # Elements are aligned to their size, so that none straddles two sectors.
            moved = Moved(sum(o.size for o in offsets) * size, distinct.size * size, np.unique(distinct // SECTOR).size)
            total[name] = total.get(name, Moved()) + moved


_aten = torch.ops.aten
_FREE = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten._unsafe_view,
    _aten.lift_fresh, _aten.is_same_size, _aten.set_, _aten.sym_size, _aten.sym_numel, _aten.is_pinned,
    _aten.promote_types,
    # Checks of values, which the ops make on the CPU only.
    _aten.aminmax, _aten._local_scalar_dense, _aten.isnan, _aten.any, _aten.item,
}  # fmt: skip
_FILLING = {
    _aten.fill_, _aten.zero_, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.zeros_like, _aten.ones_like,
    _aten.full_like, _aten.rand_like, _aten.randn_like,
}  # fmt: skip
_PICKING = {_aten.gather, _aten.index, _aten.index_select, _aten.embedding}
# Destination, indices, source. What lands is written, and read before where it is added.
_PLACING = {
    _aten.scatter_: 2, _aten.scatter: 2, _aten.index_put_: 2, _aten.index_copy_: 2,
    _aten.scatter_add_: 3, _aten.scatter_add: 3, _aten.index_add_: 3, _aten.index_add: 3,
}  # fmt: skip


_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}


def is_ours(func: torch._ops.OpOverload) -> bool:
    return func.namespace == "fastmae"


class EagerTraffic(TorchDispatchMode):
    """Counts bytes and launches of the operators that run inside.

    Args:
        formulas: by operator, a function of it, its arguments and its result that gives the bytes, for those whose
            inputs are not all read; the operators inside such a one are not counted.
        opens: whether to look into an operator: what it calls is counted in its stead. By default into all of ours.

    Attributes:
        bytes, launches: in all. launches_by_op: by operator.
        flops: of matrix products (``mm``, ``addmm``, ``bmm``, ``baddbmm``), two for a multiply-add.
    """

    def __init__(self, formulas: dict | None = None, opens: Callable[[torch._ops.OpOverload], bool] = is_ours):
        super().__init__()
        self.formulas, self.opens = formulas or {}, opens
        self.bytes, self.launches, self.flops = 0, 0, 0
        self.launches_by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula: Callable | None = self.formulas.get(func)
        if formula is None and self.opens(func):
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            key = key if func.has_kernel_for_dispatch_key(key) else torch._C.DispatchKey.CPU
            with self:
                return func._op_dk(key, *args, **kwargs)
        if formula is None and func.namespace == "aten" and _is_composite(func):
            # Arrives whole where autograd is off, as inside our ops.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self._count(func, formula(func, args, kwargs, out))
        elif not (
            func.namespace == "prim" or func.is_view or func.overloadpacket in _FREE or _aliases(func, args, out)
        ):
            self._count(func, _moved(func, args, kwargs, out))
        if func.overloadpacket in _PRODUCTS:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def _count(self, func, moved: int) -> None:
        self.bytes += moved
        self.launches += 1
        self.launches_by_op[str(func)] += 1


def _is_composite(func: torch._ops.OpOverload) -> bool:
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _aliases(func, args, out) -> bool:
    """Whether nothing moved: the result lies in an argument's memory and the schema writes to none."""
    if func._schema.is_mutable or not isinstance(out, Tensor):
        return False
    storages = {_storage(t) for t in tree_leaves(args) if isinstance(t, Tensor)}
    return _storage(out) in storages


def _moved(func, args, kwargs, out) -> int:
    inputs, outputs = _tensors((args, kwargs)), _tensors(out)
    packet = func.overloadpacket
    if packet in _FILLING:
        return sum(map(nbytes, outputs))
    if packet is _aten.copy_:
        return nbytes(inputs[0]) + nbytes(inputs[1])
    if packet in _PICKING:
        return 2 * sum(map(nbytes, outputs)) + sum(map(nbytes, inputs[1:]))
    if packet in _PLACING:
        copied = 0 if func._schema.is_mutable else 2 * nbytes(inputs[0])
        return copied + _PLACING[packet] * nbytes(inputs[-1]) + sum(map(nbytes, inputs[1:-1]))
    return sum(map(nbytes, inputs)) + sum(map(nbytes, outputs))


def _tensors(tree) -> list[Tensor]:
    found, seen = [], set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            seen.add(id(leaf))
            found.append(leaf)
    return found


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Scheduled(NamedTuple):
    """One graph: forward or backward."""

    bytes: int
    launches: int


def compiled_traffic(function: Callable[..., Tensor], *args: Tensor) -> list[Scheduled]:
    """The schedules of ``function(*args)``, and of its backward where an argument requires a gradient."""
    from torch._inductor import compile_fx, config

    found: list[Scheduled] = []

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=_scheduler_into(found))

    torch._dynamo.reset()
    with config.patch(cpu_backend="triton"):
        out = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
        outs: Sequence[Tensor] = out if isinstance(out, tuple | list) else (out,)
        outs = [o for o in outs if o.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    torch._dynamo.reset()
    return found


def _scheduler_into(found: list[Scheduled]) -> Callable:
    from functorch.compile import make_boxed_func
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import record_original_output_strides, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    def schedule(graph_module, example_inputs, is_backward=False, is_inference=False, **_):
        record_original_output_strides(graph_module)
        view_to_reshape(graph_module)
        with V.set_fake_mode(detect_fake_mode(example_inputs)), V.set_debug_handler(DebugContext()):
            post_grad_passes(graph_module, is_inference)
            graph = GraphLowering(
                graph_module, example_inputs=example_inputs, is_backward=is_backward, is_inference=is_inference
            )
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*example_inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                moved, _, _ = graph.count_bytes()
                kernels = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
                found.append(Scheduled(int(moved), len(kernels)))
        return make_boxed_func(graph_module.forward)

    return schedule
