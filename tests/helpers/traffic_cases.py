"""The ops whose traffic is counted: inputs, byte budget, and what one writes without the op. A new op is one entry.

Budgets are bytes by kernel argument, written down from the definition of the op alone. An argument in ``tables`` is
small and shared by many programs (indices, per-pixel statistics, parameters): of it the distinct bytes of a launch are
compared with the budget; of every other argument all accesses are, so that reading something twice fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from patch_cases import patchify, take
from torch import Tensor

from fastmae import ops
from fastmae.ops._attention_triton import forward_tile
from fastmae.ops.gelu_linear import gelu_linear
from fastmae.ops.norm_linear import norm_linear

BF16, F32, I64 = 2, 4, 8


class Sizes(NamedTuple):
    """A batch and a model: N images of side x side pixels in square patches, L patches, K visible, M masked, P values
    per patch, D encoder width, E decoder width."""

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

    @property
    def heads(self) -> int:
        """Of the encoder; the decoder has 16."""
        return 12 if self.D == 768 else 16


VIT_B = Sizes(N=2, side=224, patch=16, D=768, E=512)
VIT_L = Sizes(N=2, side=224, patch=16, D=1024, E=512)
VIT_H = Sizes(N=2, side=224, patch=14, D=1280, E=512)


def masking_of(s: Sizes) -> ops.Masking:
    return ops.random_masking(s.N, s.L, s.ratio, seed=0)


def gradient_of(outs: Tensor | Sequence[Tensor], *inputs: Tensor) -> Callable[[], object]:
    """The gradients of inputs, with incoming gradients of the results' dtypes."""
    outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
    grads = [torch.ones(out.shape).to(out.dtype) for out in outs]
    return lambda: torch.autograd.grad(outs, inputs, grads, allow_unused=True)


class Pair(NamedTuple):
    """The op and what one writes in plain PyTorch instead: two functions of the same inputs."""

    ours: Callable
    plain: Callable
    inputs: tuple


@dataclass(frozen=True)
class Op:
    """One op, in one direction.

    Attributes:
        pair: builds inputs and functions.
        reads, writes: budgets in bytes, by kernel argument.
        backward: whether what is counted is the gradient of the inputs that require one.
        tables: arguments that are shared and small.
        runs: bytes of the contiguous runs in which an argument is touched, where they are no multiple of a sector;
            a run of R bytes at any multiple of 16 bytes touches at most ``(R + 16 + 31) // 32`` sectors.
        again: bytes of an argument that are read more than once by design: counted, and in no budget.
    """

    pair: Callable[[Sizes], Pair]
    reads: Callable[[Sizes], dict[str, int]]
    writes: Callable[[Sizes], dict[str, int]]
    backward: bool = False
    tables: frozenset[str] = frozenset()
    runs: Callable[[Sizes], dict[str, int]] = lambda s: {}
    again: Callable[[Sizes], dict[str, int]] = lambda s: {}

    def call(self, s: Sizes, plain: bool = False) -> Callable[[], object]:
        """What is counted, without arguments, on inputs that are there already."""
        ours, theirs, inputs = self.pair(s)
        call = partial(theirs if plain else ours, *inputs)
        return gradient_of(call(), *(x for x in inputs if x.requires_grad)) if self.backward else call


# Masking and patches


def _masking(s):
    sample_ids = torch.arange(s.N) + 5

    def plain():
        ids_shuffle = torch.argsort(torch.rand(s.N, s.L), dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = torch.ones(s.N, s.L)
        mask[:, : s.K] = 0
        return ids_shuffle[:, : s.K], ids_restore, torch.gather(mask, 1, ids_restore)

    return Pair(lambda: ops.random_masking(s.N, s.L, s.ratio, seed=1, epoch=2, sample_ids=sample_ids), plain, ())


def _images(s):
    """Channels last, as a decoder's NHWC buffer is, with mean and std for the ops and for PyTorch."""
    images = torch.randint(0, 256, (s.N, s.side, s.side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    affine = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # As in every step but the first, the tables that the ops make of mean and std are there.
    ops.gather_patches(images[:1], torch.zeros(1, 1, dtype=torch.int64), s.patch, *affine)
    mean, std = (t.view(3, 1, 1) for t in affine)
    return images, affine, lambda images: patchify((images.float() / 255 - mean) / std, (s.patch, s.patch))


def _patches(s):
    images, affine, patches = _images(s)
    return Pair(
        lambda images, ids: ops.gather_patches(images, ids, s.patch, *affine, torch.bfloat16),
        lambda images, ids: take(patches(images), ids).bfloat16(),
        (images, masking_of(s).ids_keep),
    )


def _float_patches(s):
    images = _images(s)[0].float().requires_grad_()
    return Pair(
        lambda images, ids: ops.gather_patches(images, ids, s.patch),
        lambda images, ids: take(patchify(images, (s.patch, s.patch)), ids),
        (images, masking_of(s).ids_keep),
    )


def _loss(full):
    def pair(s):
        (images, affine, patches), masking = _images(s), masking_of(s)
        pred = torch.randn(s.N, s.L if full else s.M, s.P).bfloat16().requires_grad_()

        def ours(pred, images, ids, mask):
            return ops.masked_patch_mse(pred, images, ids, s.patch, True, *affine)

        def plain(pred, images, ids, mask):
            target = patches(images)
            if not full:
                target = take(target, ids)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            loss = (pred.float() - target).square().mean(-1)
            return (loss * mask).sum() / mask.sum() if full else loss.mean()

        return Pair(ours, plain, (pred, images, masking.ids_mask, masking.mask))

    return pair


# Tokens


def _tokens(s):
    tokens = torch.randn(s.N, s.L, s.D).bfloat16().requires_grad_()
    return Pair(ops.gather_tokens, take, (tokens, masking_of(s).ids_keep))


def _restore(*differentiable):
    """Visible tokens (bf16), mask token and positions (fp32), ids_restore; the class token is the one prefix token."""

    def plain(visible, mask_token, positions, ids):
        n, rows = visible.shape[:2]
        missing = mask_token.expand(n, ids.shape[1] + 1 - rows, -1)
        x = take(torch.cat([visible[:, 1:].float(), missing], dim=1), ids)
        return torch.cat([visible[:, :1].float(), x], dim=1) + positions

    def pair(s):
        inputs = [torch.randn(s.N, 1 + s.K, s.E).bfloat16(), torch.randn(1, 1, s.E), torch.randn(1, 1 + s.L, s.E)]
        for i in differentiable:
            inputs[i].requires_grad_()
        ours = lambda visible, token, positions, ids: ops.restore_tokens(visible, token, ids, positions, 1)  # noqa: E731
        return Pair(ours, plain, (*inputs, masking_of(s).ids_restore))

    return pair


# Blocks: what surrounds the matrix products, which eager and compiled are spared. Forward the product before adds the
# bias for nothing; its gradient is a pass in the backward.


def _in_bf16(op, *arguments, weight_cast):
    with torch.autocast("cpu", torch.bfloat16):
        return op(*arguments, weight_cast=weight_cast)


def _norm_linear(with_bias):
    """The encoder's residual stream (fp32), a branch (bf16) with its bias, the norm's parameters, a weight and its
    copy in bf16."""

    def plain(x, branch, branch_bias, norm_weight, norm_bias, *_):
        x = x + (branch + branch_bias.bfloat16() if with_bias else branch)
        return x, F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6).bfloat16()

    def pair(s):
        x, branch = torch.randn(s.N, 1 + s.K, s.D), torch.randn(s.N, 1 + s.K, s.D).bfloat16()
        vectors = [torch.randn(s.D) for _ in range(3)]
        inputs = [t.requires_grad_() for t in (x, branch, *vectors, torch.randn(s.D, s.D))]
        ours = lambda *inputs: _in_bf16(norm_linear, *inputs[:6], weight_cast=inputs[6])  # noqa: E731
        return Pair(ours, plain, (*inputs, inputs[-1].detach().bfloat16()))

    return pair


def _gelu_linear(with_bias):
    """The hidden values of the encoder's MLP (bf16), their bias, the second weight and its copy in bf16."""

    def pair(s):
        inputs = torch.randn(s.N, 1 + s.K, 4 * s.D).bfloat16(), torch.randn(4 * s.D), torch.randn(s.D, 4 * s.D)
        ours = lambda *inputs: _in_bf16(gelu_linear, *inputs[:3], weight_cast=inputs[3])  # noqa: E731
        plain = lambda h, bias, *_: F.gelu(h + bias.bfloat16() if with_bias else h)  # noqa: E731
        return Pair(ours, plain, (*(t.requires_grad_() for t in inputs), inputs[2].detach().bfloat16()))

    return pair


def _rows(s):
    """Tokens that an encoder's block sees."""
    return s.N * (1 + s.K)


def _partial_sums(s, width):
    """One row of fp32 sums for every 16 tokens (for up to 128 where a batch is large)."""
    return F32 * -(-_rows(s) // 16) * width


def _attention(where, *, backward=False):
    """Queries, keys and values are packed: all three are read, and their gradients written, where the first starts.

    In float16, whose bytes are those of bfloat16, since the interpreter's products of the latter are wrong.
    """

    def sizes(s):
        return (1 + s.K, s.heads, s.D) if where == "encoder" else (1 + s.L, 16, s.E)

    def plain(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def pair(s):
        length, heads, width = sizes(s)
        qkv = torch.randn(s.N, length, 3, heads, width // heads).half().requires_grad_()
        return Pair(lambda qkv: ops.attention_qkvpacked(qkv, "triton"), plain, (qkv,))

    def rows(s):
        length, _, width = sizes(s)
        return BF16 * s.N * length * width

    def lse(s):
        length, heads, _ = sizes(s)
        return F32 * s.N * heads * length

    def again(s):
        """Every block of queries reads all keys and values."""
        length = sizes(s)[0]
        blocks = -(-length // forward_tile(length, length, BF16).queries)
        return {"q": 2 * (blocks - 1) * rows(s)}

    if backward:
        reads = lambda s: {"q": 3 * rows(s), "grad": rows(s), "lse": lse(s)}  # noqa: E731
        return Op(pair, reads, lambda s: {"dq": 3 * rows(s)}, backward=True)
    return Op(pair, lambda s: {"q": 3 * rows(s)}, lambda s: {"out": rows(s), "lse": lse(s)}, again=again)


# A row of a patch, and of a token, is contiguous; it starts at a multiple of 16 bytes.
def _patch_row(s):
    return {"images": 3 * s.patch}


_LOSS = Op(
    pair=_loss(full=False),
    reads=lambda s: {
        "pred": BF16 * s.N * s.M * s.P, "images": s.N * s.M * s.P, "ids": I64 * s.N * s.M,
        "mean": F32 * 3, "std": F32 * 3,
    },
    writes=lambda s: {"loss": F32 * s.N * s.M},
    tables=frozenset({"ids", "mean", "std", "grad"}),
    runs=_patch_row,
)  # fmt: skip
_LOSS_BACKWARD = replace(
    _LOSS,
    reads=lambda s: _LOSS.reads(s) | {"grad": F32 * s.N * s.M},
    writes=lambda s: {"grad_pred": BF16 * s.N * s.M * s.P},
    backward=True,
)

OPS: dict[str, Op] = {
    "random_masking": Op(
        pair=_masking,
        reads=lambda s: {"sample_ids": I64 * s.N},
        writes=lambda s: {
            "ids_keep": I64 * s.N * s.K, "ids_mask": I64 * s.N * s.M, "ids_restore": I64 * s.N * s.L,
            "mask": F32 * s.N * s.L,
        },
        tables=frozenset({"sample_ids"}),
    ),
    "gather_patches": Op(
        pair=_patches,
        reads=lambda s: {"images": s.N * s.K * s.P, "ids": I64 * s.N * s.K, "mean": F32 * 3, "std": F32 * 3},
        writes=lambda s: {"out": BF16 * s.N * s.K * s.P},
        tables=frozenset({"ids", "mean", "std"}),
        runs=_patch_row,
    ),
    "gather_patches backward": Op(
        pair=_float_patches,
        reads=lambda s: {"grad": F32 * s.N * s.K * s.P, "ids": I64 * s.N * s.K},
        writes=lambda s: {"grad_images": F32 * s.N * s.L * s.P},
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "gather_tokens": Op(
        pair=_tokens,
        reads=lambda s: {"tokens": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.K * s.D},
        tables=frozenset({"ids"}),
    ),
    "gather_tokens backward": Op(
        pair=_tokens,
        reads=lambda s: {"in": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.L * s.D},
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens": Op(
        pair=_restore(),
        reads=lambda s: {
            "visible": BF16 * s.N * (1 + s.K) * s.E, "mask_token": F32 * s.E, "pos_embed": F32 * (1 + s.L) * s.E,
            "ids_restore": I64 * s.N * s.L,
        },
        writes=lambda s: {"out": F32 * s.N * (1 + s.L) * s.E},
        tables=frozenset({"mask_token", "pos_embed", "ids_restore"}),
    ),
    "restore_tokens backward, visible": Op(
        pair=_restore(0),
        reads=lambda s: {"in": F32 * s.N * (1 + s.K) * s.E, "ids": I64 * s.N * s.L},
        writes=lambda s: {"out": BF16 * s.N * (1 + s.K) * s.E},
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens backward, mask token": Op(
        pair=_restore(1),
        # One partial sum for every 128 rows.
        reads=lambda s: {"grad": F32 * s.N * s.M * s.E, "ids_restore": I64 * s.N * s.L},
        writes=lambda s: {"partial": F32 * -(-s.N * s.L // 128) * s.E},
        backward=True,
        tables=frozenset({"ids_restore"}),
    ),
    "masked_patch_mse": _LOSS,
    "masked_patch_mse, full pred": replace(_LOSS, pair=_loss(full=True)),
    "masked_patch_mse backward": _LOSS_BACKWARD,
    "masked_patch_mse backward, full pred": replace(
        _LOSS_BACKWARD, pair=_loss(full=True), writes=lambda s: {"grad_pred": BF16 * s.N * s.L * s.P}
    ),
    "norm_linear": Op(
        pair=_norm_linear(with_bias=False),
        reads=lambda s: {
            "x": F32 * _rows(s) * s.D, "branch": BF16 * _rows(s) * s.D,
            "branch_bias": F32 * s.D, "weight": F32 * s.D, "bias": F32 * s.D,
        },
        writes=lambda s: {
            "x_new": F32 * _rows(s) * s.D, "normed": BF16 * _rows(s) * s.D,
            "mean": F32 * _rows(s), "rstd": F32 * _rows(s),
        },
        tables=frozenset({"branch_bias", "weight", "bias"}),
    ),
    "norm_linear backward": Op(
        pair=_norm_linear(with_bias=True),
        reads=lambda s: {
            "grad_normed": BF16 * _rows(s) * s.D, "grad_x_new": F32 * _rows(s) * s.D, "x_new": F32 * _rows(s) * s.D,
            "mean": F32 * _rows(s), "rstd": F32 * _rows(s), "weight": F32 * s.D, "bias": F32 * s.D,
        },
        writes=lambda s: {
            "grad_x": F32 * _rows(s) * s.D, "grad_branch": BF16 * _rows(s) * s.D, "normed": BF16 * _rows(s) * s.D,
            "partial": 3 * _partial_sums(s, s.D),
        },
        backward=True,
        tables=frozenset({"weight", "bias"}),
    ),
    "gelu_linear": Op(
        pair=_gelu_linear(with_bias=False),
        reads=lambda s: {"h": BF16 * _rows(s) * 4 * s.D, "bias": F32 * 4 * s.D},
        writes=lambda s: {"out": BF16 * _rows(s) * 4 * s.D},
        tables=frozenset({"bias"}),
    ),
    "gelu_linear backward": Op(
        pair=_gelu_linear(with_bias=True),
        reads=lambda s: {"grad": BF16 * _rows(s) * 4 * s.D, "h": BF16 * _rows(s) * 4 * s.D, "bias": F32 * 4 * s.D},
        writes=lambda s: {
            "grad_h": BF16 * _rows(s) * 4 * s.D, "activated": BF16 * _rows(s) * 4 * s.D,
            "partial": _partial_sums(s, 4 * s.D),
        },
        backward=True,
        tables=frozenset({"bias"}),
    ),
    "attention, encoder": _attention("encoder"),
    "attention, encoder backward": _attention("encoder", backward=True),
    "attention, decoder": _attention("decoder"),
    "attention, decoder backward": _attention("decoder", backward=True),
}  # fmt: skip
