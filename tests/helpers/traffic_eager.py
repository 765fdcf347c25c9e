"""What PyTorch moves through memory, operator by operator: each reads its inputs and writes its outputs.

A lower bound on what a GPU would move: an operator may run several kernels (a sort), or read an input twice (a
normalisation), but none can move less, caches aside. Free are views and allocations. Operators that gather are charged
what they pick, not what they pick from; broadcast (stride 0) dimensions count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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
        bytes, launches: in all. by_op, launches_by_op: by operator.
        flops: of matrix products (``mm``, ``addmm``, ``bmm``, ``baddbmm``), two for a multiply-add.
    """

    def __init__(self, formulas: dict | None = None, opens: Callable[[torch._ops.OpOverload], bool] = is_ours):
        super().__init__()
        self.formulas, self.opens = formulas or {}, opens
        self.bytes, self.launches, self.flops = 0, 0, 0
        self.by_op: Counter[str] = Counter()
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
        self.by_op[str(func)] += moved
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
