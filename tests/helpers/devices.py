"""CUDA tensors without a GPU: they have a shape and a device, and no values. An operation on tensors of two devices
raises, and so does what waits for the device: reading a value, a boolean mask as index, a blocking copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class _Copies(TorchDispatchMode):
    """Lists copies between devices that make the host wait: blocking ones, and those from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self._pinned: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        pins = function is aten._pin_memory.default
        result = arguments[0].clone() if pins else function(*arguments, **options)
        if pins or options.get("pin_memory"):
            storage = result.untyped_storage()
            self._pinned[storage._cdata] = storage
        if function in (aten._to_copy.default, aten.copy_.default):
            source, *rest = arguments[function is aten.copy_.default :]
            runs_beside = (any(rest) or options.get("non_blocking")) and source.untyped_storage()._cdata in self._pinned
            if source.device != result.device and not runs_beside:
                self.waiting.append(f"{tuple(source.shape)} from {source.device} to {result.device}")
        return result


def _to_cuda(model: nn.Module, device: torch.device | str) -> nn.Module:
    assert torch.device(device).type == "cuda"
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


@contextmanager
def fake_cuda(autocast: torch.dtype | None = None) -> Iterator[list[str]]:
    """Context in which tensors and models can be on "cuda". ``backward`` does nothing: autograd needs a real device.

    Gives the list of copies that the host waits for, which must be empty in the end. A test clears it behind what may
    wait.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _Copies() as copies,
        patch.object(Tensor, "backward", lambda self: None),
        patch.object(nn.Module, "to", _to_cuda),
    ):
        # PyTorch's own context manager does nothing without a GPU.
        torch.set_autocast_enabled("cuda", autocast is not None)
        torch.set_autocast_dtype("cuda", autocast or torch.float16)
        try:
            yield copies.waiting
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert not copies.waiting
