"""The ops whose traffic is counted: inputs, byte budget, and what one writes without the op. A new op is one entry.

Sizes are those of ``Sizes``. Budgets are bytes by kernel argument, written down from the definition of the op alone.
An argument in ``tables`` is small and shared by many programs (indices, per-pixel statistics, parameters): of it the
distinct bytes of a launch are compared with the budget; of every other argument all accesses are, so that reading
something twice fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae import ops

BF16, F32, I64 = 2, 4, 8


class Sizes(NamedTuple):
    """A batch and a model: N images of side x side pixels in square patches, L patches, K visible, M masked, P values a
    patch, D encoder width, E decoder width."""

    N: int
    side: int
    patch: int
    D: int
    E: int
    ratio: float = 0.75

    @property
    def L(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def K(self) -> int:
        return int(self.L * (1 - self.ratio))

    @property
    def M(self) -> int:
        return self.L - self.K

    @property
    def P(self) -> int:
        return 3 * self.patch**2


VIT_B = Sizes(N=2, side=224, patch=16, D=768, E=512)
VIT_L = Sizes(N=2, side=224, patch=16, D=1024, E=512)
VIT_H = Sizes(N=2, side=224, patch=14, D=1280, E=512)


@dataclass(frozen=True)
class Op:
    """One op, in one direction.

    Attributes:
        make: builds the inputs and returns what is counted, without arguments.
        reads, writes: budgets in bytes, by kernel argument.
        eager: the same result in plain PyTorch, as ``make`` builds it: the function and its arguments. For a backward,
            the forward function: its gradient is counted.
        backward: whether this is a gradient.
        kernels: launches of our own kernels.
        tables: arguments that are shared and small.
        runs: bytes of the contiguous runs in which an argument is touched, where they are no multiple of a sector;
            a run of R bytes at any multiple of 16 bytes touches at most ``(R + 16 + 31) // 32`` sectors.
    """

    make: Callable[[Sizes], Callable[[], object]]
    reads: Callable[[Sizes], dict[str, int]]
    writes: Callable[[Sizes], dict[str, int]]
    eager: Callable[[Sizes], tuple[Callable, tuple]]
    backward: bool = False
    kernels: int = 1
    tables: frozenset[str] = frozenset()
    runs: Callable[[Sizes], dict[str, int]] = lambda s: {}


def masking_of(s: Sizes) -> ops.Masking:
    return ops.random_masking(s.N, s.L, s.ratio, seed=0)


def make_images(s: Sizes, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Channels last, as a decoder's NHWC buffer is."""
    pixels = torch.randint(0, 256, (s.N, s.side, s.side, 3), dtype=torch.uint8)
    return pixels.to(dtype).permute(0, 3, 1, 2)


def statistics() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def gradient_of(out: Tensor, *inputs: Tensor) -> Callable[[], object]:
    """The gradients of inputs, with an incoming gradient of the result's dtype."""
    grad = torch.ones((), dtype=out.dtype) if out.ndim == 0 else torch.randn(out.shape).to(out.dtype)
    return lambda: torch.autograd.grad(out, inputs, grad)


# Masking


def _random_masking(s):
    sample_ids = torch.arange(s.N) + 5
    return lambda: ops.random_masking(s.N, s.L, s.ratio, seed=1, epoch=2, sample_ids=sample_ids)


def _eager_masking(s):
    def function():
        noise = torch.rand(s.N, s.L)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = torch.ones(s.N, s.L)
        mask[:, : s.K] = 0
        return ids_shuffle[:, : s.K], ids_restore, torch.gather(mask, 1, ids_restore)

    return function, ()


# Patches


def patchify(images: Tensor, p: int) -> Tensor:
    n, c, h, w = images.shape
    return torch.einsum("nchpwq->nhwpqc", images.reshape(n, c, h // p, p, w // p, p)).reshape(n, -1, p * p * c)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


def _gather_patches(s):
    images, ids, affine = make_images(s), masking_of(s).ids_keep, statistics()
    return lambda: ops.gather_patches(images, ids, s.patch, *affine, torch.bfloat16)


def _eager_gather_patches(s):
    mean, std = (t.view(3, 1, 1) for t in statistics())

    def function(images, ids):
        return pick(patchify((images.float() / 255 - mean) / std, s.patch), ids).bfloat16()

    return function, (make_images(s), masking_of(s).ids_keep)


def _gather_patches_backward(s):
    images = make_images(s, torch.float32).requires_grad_()
    return gradient_of(ops.gather_patches(images, masking_of(s).ids_keep, s.patch), images)


def _eager_gather_patches_backward(s):
    images = make_images(s, torch.float32).requires_grad_()
    return lambda images, ids: pick(patchify(images, s.patch), ids), (images, masking_of(s).ids_keep)


# Tokens


def _tokens(s):
    return torch.randn(s.N, s.L, s.D).bfloat16().requires_grad_(), masking_of(s).ids_keep


def _gather_tokens(s):
    tokens, ids = _tokens(s)
    return lambda: ops.gather_tokens(tokens, ids)


def _gather_tokens_backward(s):
    tokens, ids = _tokens(s)
    return gradient_of(ops.gather_tokens(tokens, ids), tokens)


def _restore_inputs(s, *differentiable):
    """Visible tokens (bf16), mask token and positions (fp32), ids_restore; the class token is the one prefix token."""
    inputs = [torch.randn(s.N, 1 + s.K, s.E).bfloat16(), torch.randn(1, 1, s.E), torch.randn(1, 1 + s.L, s.E)]
    for i in differentiable:
        inputs[i].requires_grad_()
    return (*inputs, masking_of(s).ids_restore)


def _restore_tokens(s):
    visible, mask_token, positions, ids = _restore_inputs(s)
    return lambda: ops.restore_tokens(visible, mask_token, ids, positions, 1)


def _restore_backward(wanted):
    def make(s):
        visible, mask_token, positions, ids = _restore_inputs(s, wanted)
        out = ops.restore_tokens(visible, mask_token, ids, positions, 1)
        return gradient_of(out, (visible, mask_token)[wanted])

    return make


def _eager_restore(*differentiable):
    def function(visible, mask_token, positions, ids):
        n, rows = visible.shape[:2]
        missing = mask_token.expand(n, ids.shape[1] + 1 - rows, -1)
        x = pick(torch.cat([visible[:, 1:].float(), missing], dim=1), ids)
        return torch.cat([visible[:, :1].float(), x], dim=1) + positions

    return lambda s: (function, _restore_inputs(s, *differentiable))


# Loss


def _loss_inputs(s, full):
    pred = torch.randn(s.N, s.L if full else s.M, s.P).bfloat16().requires_grad_()
    masking = masking_of(s)
    return pred, make_images(s), masking.ids_mask, masking.mask


def _loss(full):
    def make(s):
        (pred, images, ids, _), affine = _loss_inputs(s, full), statistics()
        return lambda: ops.masked_patch_mse(pred, images, ids, s.patch, True, *affine)

    return make


def _loss_backward(full):
    def make(s):
        pred, images, ids, _ = _loss_inputs(s, full)
        return gradient_of(ops.masked_patch_mse(pred, images, ids, s.patch, True, *statistics()), pred)

    return make


def _eager_loss(full):
    def make(s):
        mean, std = (t.view(3, 1, 1) for t in statistics())

        def function(pred, images, ids, mask):
            target = patchify((images.float() / 255 - mean) / std, s.patch)
            if not full:
                target = pick(target, ids)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            loss = (pred.float() - target).square().mean(-1)
            return (loss * mask).sum() / mask.sum() if full else loss.mean()

        return function, _loss_inputs(s, full)

    return make


# A row of a patch, and of a token, is contiguous; it starts at a multiple of 16 bytes.
def _patch_row(s):
    return {"images": 3 * s.patch}


_LOSS = Op(
    make=_loss(full=False),
    reads=lambda s: {
        "pred": BF16 * s.N * s.M * s.P, "images": s.N * s.M * s.P, "ids": I64 * s.N * s.M,
        "scale": F32 * s.P, "shift": F32 * s.P,
    },
    writes=lambda s: {"loss": F32 * s.N * s.M},
    eager=_eager_loss(full=False),
    tables=frozenset({"ids", "scale", "shift", "grad"}),
    runs=_patch_row,
)  # fmt: skip

OPS: dict[str, Op] = {
    "random_masking": Op(
        make=_random_masking,
        reads=lambda s: {"sample_ids": I64 * s.N},
        writes=lambda s: {
            "ids_keep": I64 * s.N * s.K, "ids_mask": I64 * s.N * s.M, "ids_restore": I64 * s.N * s.L,
            "mask": F32 * s.N * s.L,
        },
        eager=_eager_masking,
        tables=frozenset({"sample_ids"}),
    ),
    "gather_patches": Op(
        make=_gather_patches,
        reads=lambda s: {
            "images": s.N * s.K * s.P, "ids": I64 * s.N * s.K, "scale": F32 * s.P, "shift": F32 * s.P,
        },
        writes=lambda s: {"out": BF16 * s.N * s.K * s.P},
        eager=_eager_gather_patches,
        tables=frozenset({"ids", "scale", "shift"}),
        runs=_patch_row,
    ),
    "gather_patches backward": Op(
        make=_gather_patches_backward,
        reads=lambda s: {"grad": F32 * s.N * s.K * s.P, "ids": I64 * s.N * s.K},
        writes=lambda s: {"grad_images": F32 * s.N * s.L * s.P},
        eager=_eager_gather_patches_backward,
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "gather_tokens": Op(
        make=_gather_tokens,
        reads=lambda s: {"tokens": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.K * s.D},
        eager=lambda s: (pick, _tokens(s)),
        tables=frozenset({"ids"}),
    ),
    "gather_tokens backward": Op(
        make=_gather_tokens_backward,
        reads=lambda s: {"in": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.L * s.D},
        eager=lambda s: (pick, _tokens(s)),
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens": Op(
        make=_restore_tokens,
        reads=lambda s: {
            "visible": BF16 * s.N * (1 + s.K) * s.E, "mask_token": F32 * s.E, "pos_embed": F32 * (1 + s.L) * s.E,
            "ids_restore": I64 * s.N * s.L,
        },
        writes=lambda s: {"out": F32 * s.N * (1 + s.L) * s.E},
        eager=_eager_restore(),
        tables=frozenset({"mask_token", "pos_embed", "ids_restore"}),
    ),
    "restore_tokens backward, visible": Op(
        make=_restore_backward(0),
        reads=lambda s: {"in": F32 * s.N * (1 + s.K) * s.E, "ids": I64 * s.N * s.L},
        writes=lambda s: {"out": BF16 * s.N * (1 + s.K) * s.E},
        eager=_eager_restore(0),
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens backward, mask token": Op(
        make=_restore_backward(1),
        # One partial sum for every 128 rows.
        reads=lambda s: {"grad": F32 * s.N * s.M * s.E, "ids_restore": I64 * s.N * s.L},
        writes=lambda s: {"partial": F32 * -(-s.N * s.L // 128) * s.E},
        eager=_eager_restore(1),
        backward=True,
        tables=frozenset({"ids_restore"}),
    ),
    "masked_patch_mse": _LOSS,
    "masked_patch_mse, full pred": replace(_LOSS, make=_loss(full=True), eager=_eager_loss(full=True)),
    "masked_patch_mse backward": replace(
        _LOSS,
        make=_loss_backward(full=False),
        reads=lambda s: _LOSS.reads(s) | {"grad": F32 * s.N * s.M},
        writes=lambda s: {"grad_pred": BF16 * s.N * s.M * s.P},
        backward=True,
    ),
    "masked_patch_mse backward, full pred": replace(
        _LOSS,
        make=_loss_backward(full=True),
        reads=lambda s: _LOSS.reads(s) | {"grad": F32 * s.N * s.M},
        writes=lambda s: {"grad_pred": BF16 * s.N * s.L * s.P},
        eager=_eager_loss(full=True),
        backward=True,
    ),
}  # fmt: skip
