"""Inputs of the ops whose traffic is counted, the calls, and what one writes in plain PyTorch instead.

Functions named ``eager_*`` return the plain function and its arguments; of a backward, those of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from patch_cases import patchify, take
from torch import Tensor

from fastmae import ops
from fastmae.ops.gelu_linear import gelu_linear
from fastmae.ops.norm_linear import norm_linear


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

    @property
    def heads(self) -> int:
        """Of the encoder; the decoder has 16."""
        return 12 if self.D == 768 else 16


VIT_B = Sizes(N=2, side=224, patch=16, D=768, E=512)
VIT_L = Sizes(N=2, side=224, patch=16, D=1024, E=512)
VIT_H = Sizes(N=2, side=224, patch=14, D=1280, E=512)


def masking_of(s: Sizes) -> ops.Masking:
    return ops.random_masking(s.N, s.L, s.ratio, seed=0)


def make_images(s: Sizes, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Channels last, as a decoder's NHWC buffer is."""
    pixels = torch.randint(0, 256, (s.N, s.side, s.side, 3), dtype=torch.uint8)
    return pixels.to(dtype).permute(0, 3, 1, 2)


def statistics() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def known_statistics(images: Tensor, s: Sizes) -> tuple[Tensor, Tensor]:
    """As in every step but the first: the tables that the ops make of them are there."""
    affine = statistics()
    ops.gather_patches(images[:1], torch.zeros(1, 1, dtype=torch.int64), s.patch, *affine)
    return affine


def gradient_of(outs: Tensor | Sequence[Tensor], *inputs: Tensor) -> Callable[[], object]:
    """The gradients of inputs, with incoming gradients of the results' dtypes."""
    outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
    grads = [torch.ones(out.shape).to(out.dtype) for out in outs]
    return lambda: torch.autograd.grad(outs, inputs, grads)


# Masking


def random_masking(s):
    sample_ids = torch.arange(s.N) + 5
    return lambda: ops.random_masking(s.N, s.L, s.ratio, seed=1, epoch=2, sample_ids=sample_ids)


def eager_masking(s):
    def function():
        noise = torch.rand(s.N, s.L)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = torch.ones(s.N, s.L)
        mask[:, : s.K] = 0
        return ids_shuffle[:, : s.K], ids_restore, torch.gather(mask, 1, ids_restore)

    return function, ()


# Patches


def gather_patches(s):
    images, ids = make_images(s), masking_of(s).ids_keep
    affine = known_statistics(images, s)
    return lambda: ops.gather_patches(images, ids, s.patch, *affine, torch.bfloat16)


def eager_gather_patches(s):
    mean, std = (t.view(3, 1, 1) for t in statistics())

    def function(images, ids):
        return take(patchify((images.float() / 255 - mean) / std, (s.patch, s.patch)), ids).bfloat16()

    return function, (make_images(s), masking_of(s).ids_keep)


def gather_patches_backward(s):
    images = make_images(s, torch.float32).requires_grad_()
    return gradient_of(ops.gather_patches(images, masking_of(s).ids_keep, s.patch), images)


def eager_gather_patches_backward(s):
    images = make_images(s, torch.float32).requires_grad_()
    return lambda images, ids: take(patchify(images, (s.patch, s.patch)), ids), (images, masking_of(s).ids_keep)


# Tokens


def token_inputs(s):
    return torch.randn(s.N, s.L, s.D).bfloat16().requires_grad_(), masking_of(s).ids_keep


def gather_tokens(s):
    tokens, ids = token_inputs(s)
    return lambda: ops.gather_tokens(tokens, ids)


def gather_tokens_backward(s):
    tokens, ids = token_inputs(s)
    return gradient_of(ops.gather_tokens(tokens, ids), tokens)


def restore_inputs(s, *differentiable):
    """Visible tokens (bf16), mask token and positions (fp32), ids_restore; the class token is the one prefix token."""
    inputs = [torch.randn(s.N, 1 + s.K, s.E).bfloat16(), torch.randn(1, 1, s.E), torch.randn(1, 1 + s.L, s.E)]
    for i in differentiable:
        inputs[i].requires_grad_()
    return (*inputs, masking_of(s).ids_restore)


def restore_tokens(s):
    visible, mask_token, positions, ids = restore_inputs(s)
    return lambda: ops.restore_tokens(visible, mask_token, ids, positions, 1)


def restore_backward(wanted):
    def make(s):
        visible, mask_token, positions, ids = restore_inputs(s, wanted)
        out = ops.restore_tokens(visible, mask_token, ids, positions, 1)
        return gradient_of(out, (visible, mask_token)[wanted])

    return make


def eager_restore(*differentiable):
    def function(visible, mask_token, positions, ids):
        n, rows = visible.shape[:2]
        missing = mask_token.expand(n, ids.shape[1] + 1 - rows, -1)
        x = take(torch.cat([visible[:, 1:].float(), missing], dim=1), ids)
        return torch.cat([visible[:, :1].float(), x], dim=1) + positions

    return lambda s: (function, restore_inputs(s, *differentiable))


# Loss


def loss_inputs(s, full):
    pred = torch.randn(s.N, s.L if full else s.M, s.P).bfloat16().requires_grad_()
    masking = masking_of(s)
    return pred, make_images(s), masking.ids_mask, masking.mask


def loss(full):
    def make(s):
        pred, images, ids, _ = loss_inputs(s, full)
        affine = known_statistics(images, s)
        return lambda: ops.masked_patch_mse(pred, images, ids, s.patch, True, *affine)

    return make


def loss_backward(full):
    def make(s):
        pred, images, ids, _ = loss_inputs(s, full)
        return gradient_of(ops.masked_patch_mse(pred, images, ids, s.patch, True, *statistics()), pred)

    return make


def eager_loss(full):
    def make(s):
        mean, std = (t.view(3, 1, 1) for t in statistics())

        def function(pred, images, ids, mask):
            target = patchify((images.float() / 255 - mean) / std, (s.patch, s.patch))
            if not full:
                target = take(target, ids)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            loss = (pred.float() - target).square().mean(-1)
            return (loss * mask).sum() / mask.sum() if full else loss.mean()

        return function, loss_inputs(s, full)

    return make


# Blocks: what surrounds the matrix products, which eager and compiled are spared


def norm_inputs(s):
    """The encoder's residual stream (fp32), a branch (bf16) with its bias, the norm's parameters, a weight and its
    copy in bf16."""
    x, branch = torch.randn(s.N, 1 + s.K, s.D), torch.randn(s.N, 1 + s.K, s.D).bfloat16()
    vectors = [torch.randn(s.D) for _ in range(3)]
    differentiable = [t.requires_grad_() for t in (x, branch, *vectors, torch.randn(s.D, s.D))]
    return *differentiable, differentiable[-1].detach().bfloat16()


def norm_linear_of(s):
    x, branch, branch_bias, norm_weight, norm_bias, weight, cast = inputs = norm_inputs(s)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return norm_linear(x, branch, branch_bias, norm_weight, norm_bias, weight, weight_cast=cast)

    return call, inputs[:6]


def norm_linear_backward(s):
    call, differentiable = norm_linear_of(s)
    return gradient_of(call(), *differentiable)


def eager_norm(with_bias):
    """Forward the product before adds the bias for nothing; its gradient is a pass in the backward."""

    def function(x, branch, branch_bias, norm_weight, norm_bias):
        x = x + (branch + branch_bias.bfloat16() if with_bias else branch)
        return x, F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6).bfloat16()

    def make(s):
        inputs = norm_inputs(s)[:5]
        return function, inputs if with_bias else (*inputs[:2], inputs[2].detach(), *inputs[3:])

    return make


def gelu_inputs(s):
    """The hidden values of the encoder's MLP (bf16), their bias, the second weight and its copy in bf16."""
    h, bias = torch.randn(s.N, 1 + s.K, 4 * s.D).bfloat16().requires_grad_(), torch.randn(4 * s.D).requires_grad_()
    weight = torch.randn(s.D, 4 * s.D).requires_grad_()
    return h, bias, weight, weight.detach().bfloat16()


def gelu_linear_of(s):
    h, bias, weight, cast = gelu_inputs(s)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return gelu_linear(h, bias, weight, weight_cast=cast)

    return call, (h, bias, weight)


def gelu_linear_backward(s):
    call, differentiable = gelu_linear_of(s)
    return gradient_of(call(), *differentiable)


def eager_gelu(with_bias):
    def function(h, bias):
        return F.gelu(h + bias.bfloat16() if with_bias else h)

    def make(s):
        h, bias = gelu_inputs(s)[:2]
        return function, (h, bias if with_bias else bias.detach())

    return make


# Attention: in float16, whose bytes are those of bfloat16, since the interpreter's products of the latter are wrong


def _packed(s, where):
    length, heads, width = (1 + s.K, s.heads, s.D) if where == "encoder" else (1 + s.L, 16, s.E)
    return torch.randn(s.N, length, 3, heads, width // heads).half().requires_grad_()


def attention(where):
    def make(s):
        qkv = _packed(s, where)
        return lambda: ops.attention_qkvpacked(qkv, "triton")

    return make


def attention_backward(where):
    def make(s):
        qkv = _packed(s, where)
        return gradient_of(ops.attention_qkvpacked(qkv, "triton"), qkv)

    return make


def eager_attention(where):
    def function(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    return lambda s: (function, (_packed(s, where),))
