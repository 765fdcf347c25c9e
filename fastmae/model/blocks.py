"""The parts of the encoder and decoder: linear layers with cached casts, patch embedding, Transformer block.

Parameter names and shapes are those of facebookresearch/mae (and timm's ViT), so state dicts are interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmae.ops import (
    attention_kvpacked,
    attention_qkvpacked,
    gather_tokens,
    gelu_linear,
    norm_linear,
    restore_tokens,
)
from fastmae.ops._dispatch import fuses
from fastmae.ops._linear import kernels, linear

T = TypeVar("T")


class Linear(nn.Linear):
    """``nn.Linear`` that uses low-precision copies of its parameters while :func:`cast_weights` provides them."""

    weight_cast: Tensor | None = None
    bias_cast: Tensor | None = None
    wanted: bool = True
    """False while :func:`recompute` repeats a forward whose result, this layer's output, is already known."""


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give every :class:`Linear` of the model copies of its weight and bias in ``dtype`` while the context is active.

    One multi-tensor kernel makes all copies, where autocast would launch one cast per tensor, and they serve all
    forwards and backwards inside, for example those of one accumulated step. Weights must not change inside. A layer
    gets no copies if its weight already has the dtype, is sharded, or lives on a device without kernels.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear) and m.weight_cast is None]
    layers = [m for m in layers if m.weight.dtype != dtype and fuses(m.weight, kernels)]
    layers = [m for m in layers if not hasattr(m.weight, "to_local")]  # a DTensor
    parameters = [p for m in layers for p in (m.weight, m.bias)]
    with torch.no_grad():
        copies = [torch.empty_like(p, dtype=dtype) for p in parameters]
        if copies:
            torch._foreach_copy_(copies, parameters)
    for layer, weight, bias in zip(layers, copies[::2], copies[1::2], strict=True):
        layer.weight_cast, layer.bias_cast = weight, bias
    try:
        yield
    finally:
        for layer in layers:
            layer.weight_cast = layer.bias_cast = None


def recompute(module: nn.Module, last: Linear, function: Callable[..., T], *args: object) -> T:
    """``function(*args)`` with activation checkpointing: keep the arguments only, and compute the rest again backward.

    Recomputed values are bit-identical, since nothing in a block is random and both passes read the same weights.

    Args:
        module: holds all weights that ``function`` reads.
        last: the layer that ends ``function``. Its product is not repeated, because no gradient needs it.
        function: should not take a tensor only to pass it on, since arguments are kept.
    """
    # In a compiled block, casts are inputs of the graph and the compiler removes the unused product by itself.
    if not torch.compiler.is_compiling():
        function = _Repeatable(module, last, function)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _Repeatable:
    """A function that runs in the forward and again in the backward.

    By then :func:`cast_weights` may have ended, so this holds the weights' copies, as autograd would if nothing were
    recomputed, and puts them back for the second run.
    """

    def __init__(self, module: nn.Module, last: Linear, function: Callable[..., object]):
        self._copies = [(m, _casts(m)) for m in module.modules() if isinstance(m, Linear)]
        self._last, self._function, self._again = last, function, False

    def __call__(self, *args: object) -> object:
        before = [_casts(layer) for layer, _ in self._copies]
        for layer, casts in self._copies:
            layer.weight_cast, layer.bias_cast = casts
        self._last.wanted, self._again = not self._again, True
        try:
            return self._function(*args)
        finally:
            self._last.wanted = True
            for (layer, _), casts in zip(self._copies, before, strict=True):
                layer.weight_cast, layer.bias_cast = casts


def _casts(layer: Linear) -> tuple[Tensor | None, Tensor | None]:
    return layer.weight_cast, layer.bias_cast


class PatchEmbed(nn.Module):
    """Linear projection of patches. ``proj`` is stored as a convolution, for state dicts, and applied as a matrix."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, K, ph*pw*C), channels innermost, to (N, K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Stream(NamedTuple):
    """The residual stream between two sublayers, the last one's output (branch) not yet added to it.

    The next LayerNorm adds it in the same pass over memory. Where that pass is a kernel it also adds the branch's bias
    and, backward, sums the bias's gradient; on the CPU the matrix product adds the bias for free.
    """

    x: Tensor
    """(N, L, D)."""
    branch: Tensor | None = None
    """(N, L, D) in the compute dtype; None: nothing is pending."""
    bias: Tensor | None = None
    """(D,), to be added to the branch."""

    def sum(self) -> Tensor:
        """(N, L, D): x plus branch and bias."""
        x = self.x if self.branch is None else self.x + self.branch
        return x if self.bias is None else x + self.bias

    def norm_linear(
        self,
        norm: nn.LayerNorm,
        weight: Tensor,
        bias: Tensor | None,
        weight_cast: Tensor | None = None,
        bias_cast: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream's sum (N, L, D), and a linear layer (weight (F, D)) of its LayerNorm (N, L, F)."""
        casts = {"weight_cast": weight_cast, "bias_cast": bias_cast}
        return norm_linear(*self, norm.weight, norm.bias, weight, bias, norm.eps, **casts)


class SharedTokens(NamedTuple):
    """A decoder's input before it is restored: at one position, masked tokens are equal in all images."""

    visible: Tensor
    """(N, P + K, D): P prefix tokens and the visible ones with positions added, in the order of ids_keep."""
    table: Tensor
    """(1, L, D): the mask token plus each position."""
    ids_restore: Tensor
    """int64 (N, L)."""


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, stream: Stream, norm: nn.LayerNorm) -> Stream:
        """Attention among all tokens."""
        x, qkv = stream.norm_linear(norm, *self._projection())
        return Stream(x, *self._project(attention_qkvpacked(self._heads(qkv, 3), self.backend, self.qkv.bias)))

    def forward_queries(self, stream: Stream, norm: nn.LayerNorm, ids: Tensor) -> Stream:
        """The rows ``ids`` (N, M) of ``forward``'s result: keys and values for all tokens, queries for these only."""
        dim = stream.x.shape[-1]
        # Weight, bias and their copies, each cut into the rows for queries and those for keys and values.
        cut = [(None, None) if t is None else t.split([dim, 2 * dim]) for t in self._projection()]
        query, key_value = zip(*cut, strict=True)
        if fuses(stream.x, kernels):
            x, kv = stream.norm_linear(norm, *key_value)
            # Normalising the chosen rows again moves less memory than storing the norm's result and gathering from it.
            x, q = Stream(gather_tokens(x, ids)).norm_linear(norm, *query)
        else:
            x = stream.sum()
            normed = norm(x.to(norm.weight.dtype))
            kv, q = linear(normed, *key_value[:2]), linear(gather_tokens(normed, ids), *query[:2])
            x = gather_tokens(x, ids)
        attended = attention_kvpacked(self._heads(q, 1).squeeze(2), self._heads(kv, 2), self.backend, self.qkv.bias)
        return Stream(x, *self._project(attended))

    def forward_shared(
        self, shared: SharedTokens, norm: nn.LayerNorm, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """Branch and bias of ``forward`` for the tokens of ``shared``, the mask tokens projected once per batch."""
        n, visible, dim = shared.visible.shape
        rows = torch.cat([shared.visible.reshape(-1, dim), shared.table[0].to(shared.visible.dtype)])
        _, qkv = Stream(rows).norm_linear(norm, *self._projection())
        visible_qkv, table = qkv[: n * visible].unflatten(0, (n, visible)), qkv[None, n * visible :]
        qkv = restore_tokens(visible_qkv, table, shared.ids_restore, num_prefix_tokens=num_prefix_tokens)
        # A row's gradient is the sum of those of its copies, so restoring leaves the bias's as it is.
        return self._project(attention_qkvpacked(self._heads(qkv, 3), self.backend, self.qkv.bias))

    def _projection(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Weight and bias of queries, keys and values, and their low-precision copies if there are any.

        The bias comes without a gradient, which attention computes in passing.
        """
        qkv = self.qkv
        return qkv.weight, qkv.bias.detach(), qkv.weight_cast, qkv.bias_cast

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        return x.unflatten(-1, (parts, self.num_heads, -1))

    def _project(self, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """Branch and bias."""
        proj, attended = self.proj, attended.flatten(2)
        if fuses(attended, kernels):
            return linear(attended, proj.weight, weight_cast=proj.weight_cast, wanted=proj.wanted), proj.bias
        return linear(attended, proj.weight, proj.bias), None


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU, as the paper's code has it, not its tanh approximation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, stream: Stream, norm: nn.LayerNorm) -> Stream:
        """The MLP on every token."""
        fc1, fc2 = self.fc1, self.fc2
        if fuses(stream.x, kernels):
            x, h = stream.norm_linear(norm, fc1.weight, None, fc1.weight_cast)
            branch = gelu_linear(h, fc1.bias, fc2.weight, weight_cast=fc2.weight_cast, wanted=fc2.wanted)
            # The next block adds the bias. FSDP frees a sharded bias when this block ends, so pass a copy on; a layer
            # with low-precision copies is not sharded.
            return Stream(x, branch, fc2.bias.clone() if fc2.weight_cast is None else fc2.bias)
        x, h = stream.norm_linear(norm, fc1.weight, fc1.bias)
        return Stream(x, gelu_linear(h, None, fc2.weight, fc2.bias))


class Block(nn.Module):
    """Pre-norm Transformer block (LayerNorm eps 1e-6 by default, as in facebookresearch/mae).

    Runs as ``norm_linear``, attention, ``linear``, ``norm_linear``, ``gelu_linear``: besides matrix products and
    attention, two passes over memory forward and two backward.

    Attributes:
        activation_checkpointing: what the backward recomputes. "none": nothing. "selective": the first norm, queries,
            keys, values and attention, which take as many bytes as the MLP's hidden layer and less work. "full":
            everything but the block's input.
    """

    activation_checkpointing: str = "none"

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, backend: str, norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, stream: Stream, ids: Tensor | None = None, shared: SharedTokens | None = None) -> Stream:
        """The stream (N, L, D) after this block.

        Args:
            stream: the block's input, (N, L, D).
            ids: int64 (N, M): return only these rows, (N, M, D).
            shared: the tokens that stream.x was restored from, for a decoder's first block; not with ids.
        """
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            return recompute(self, self.mlp.fc2, self._forward, stream, ids, shared)
        return self._forward(stream, ids, shared)

    def _forward(self, stream: Stream, ids: Tensor | None, shared: SharedTokens | None) -> Stream:
        attn, run = self.attn, _run
        if self.activation_checkpointing == "selective" and torch.is_grad_enabled():
            run = partial(recompute, attn, attn.proj)
        if shared is not None:
            prefix = stream.x.shape[1] - shared.ids_restore.shape[1]
            stream = Stream(stream.x, *run(attn.forward_shared, shared, self.norm1, prefix))
        elif ids is not None:
            stream = run(attn.forward_queries, stream, self.norm1, ids)
        else:
            stream = run(attn, stream, self.norm1)
        return self.mlp(stream, self.norm2)


def _run(function: Callable[..., Stream], *args: object) -> Stream:
    return function(*args)


def run_blocks(blocks: Iterable[Block], x: Tensor) -> Tensor:
    """Tokens (N, L, D) through a sequence of blocks."""
    stream = Stream(x)
    for block in blocks:
        stream = block(stream)
    return stream.sum()
