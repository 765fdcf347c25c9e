"""Memory that is in use while a step runs, counted storage by storage on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Knows which storages that were seen inside are still in use. What an op makes for itself alone is not seen.

    Args:
        every_op: count after every operator, for ``peak``.

    Attributes:
        peak: the most bytes that were in use after an operator; may be set to 0 to begin anew.
    """

    def __init__(self, every_op: bool = False):
        super().__init__()
        self.every_op, self.peak = every_op, 0
        self._storages: dict[int, StorageWeakRef] = {}

    def see(self, *tensors: Tensor) -> None:
        """Count these too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def bytes(self, but: tuple[Tensor, ...] = ()) -> int:
        """In use now; storages that were freed by resizing, as FSDP does, are empty."""
        known, total = {tensor.untyped_storage()._cdata for tensor in but}, 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            elif key not in known:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(*(t for t in tree_leaves(out) if type(t) is Tensor))
        if self.every_op:
            self.see(*(t for t in tree_leaves((args, kwargs)) if type(t) is Tensor))
            self.peak = max(self.peak, self.bytes())
        return out
