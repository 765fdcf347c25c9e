"""Floating-point operations: those of a training step, by PyTorch's own counter on tensors that have shapes and no
values, and how many per second a device reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.ops import Masking


def count_flops(
    architecture: Mapping[str, Any], batch_size: int, mask_ratio: float, activation_checkpointing: str = "none"
) -> int:
    """FLOPs of the matrix products of one forward and backward on the training path (``full_pred=False``).

    A product of (m, k) and (k, n) counts 2 m k n. The backward of attention counts the four products that need doing,
    not the scores that fused kernels compute again. What the model skips is not counted: hidden patches in the
    encoder, the mask tokens' projections in the first decoder block except once per batch, visible patches in the last
    one. Norms, activations and the optimiser are not counted.

    Args:
        architecture: ``MaskedAutoencoderViT.architecture``.
        batch_size: masked images N; an image masked R times counts R times.
        mask_ratio: fraction of the patches that is masked.
        activation_checkpointing: "none" counts what MFU is defined by; "selective" and "full" add what the backward
            computes again.
    """
    return _count(_hashable(architecture), batch_size, mask_ratio, activation_checkpointing)


def count_classifier_flops(architecture: Mapping[str, Any], batch_size: int, frozen: Collection[str] = ()) -> int:
    """The same of a ``VisionTransformer`` with the parameters named ``frozen`` not trained."""
    return _count_classifier(_hashable(architecture), batch_size, frozenset(frozen))


def _hashable(architecture: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in architecture.items()}
    return tuple(sorted(values.items()))


@cache
def _count(architecture: tuple[tuple[str, Any], ...], batch_size: int, mask_ratio: float, checkpointing: str) -> int:
    from fastmae.model import build_model

    with torch.device("meta"):  # "sdpa", since custom operators are opaque to the counter
        model = build_model(dict(architecture) | {"attention": "sdpa"})
    model.set_activation_checkpointing(checkpointing)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        num_patches = model.num_patches
        keep = int(num_patches * (1 - mask_ratio))
        ids = [torch.empty(batch_size, k, dtype=torch.int64) for k in (keep, num_patches - keep, num_patches)]
        masking = Masking(*ids, torch.empty(batch_size, num_patches))
        return model(images, masking=masking, full_pred=False).pred.sum()

    return _counted(model, batch_size, loss)


@cache
def _count_classifier(architecture: tuple[tuple[str, Any], ...], batch_size: int, frozen: frozenset[str]) -> int:
    from fastmae.model.classifier import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(**dict(architecture) | {"attention": "sdpa"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return _counted(model, batch_size, lambda model, images: model(images).float().sum())


def _counted(model: nn.Module, batch_size: int, loss: Callable[[nn.Module, Tensor], Tensor]) -> int:
    counter = FlopCounterMode(display=False)
    # MATH: attention as its matrix products; the counter does not know the fused kernel of CPUs.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
        model = model.to_empty(device="cpu").train()
        loss(model, torch.empty(batch_size, model.in_chans, *model.img_size, dtype=torch.uint8)).backward()
    return counter.get_total_flops()


def matmul_flops(device: torch.device, dtype: torch.dtype, longest: float = 2e-3) -> float:
    """FLOP/s of a large square matrix product, which is what a device reaches at best; waits for the device.

    The median of three, after two that are not timed. The matrices have 8192 rows on a GPU. On a CPU they grow from 384
    rows to 1536 until a product takes ``longest`` seconds: where the CPU emulates a dtype, a large one would take
    seconds. PyTorch's present settings (TF32, threads) apply.
    """
    on_gpu, generator = device.type == "cuda", torch.Generator(device)  # the run's own draws what it would have drawn
    synchronize = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    for size in (8192,) if on_gpu else (384, 768, 1536):
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        out, seconds = torch.empty_like(a), []
        for _ in range(5):
            synchronize()
            begun = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize()
            seconds.append(time.perf_counter() - begun)
        if (median := statistics.median(seconds[2:])) > longest:
            break
    return 2 * size**3 / median


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """:func:`matmul_flops`, once per process; None where it cannot be measured."""
    try:
        return matmul_flops(device, dtype)
    except RuntimeError:  # out of memory, or no product of this dtype: MFU is left out
        return None
