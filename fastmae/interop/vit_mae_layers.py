"""Attention and Transformer layer of Hugging Face's ViTMAE on fastmae's ops.

transformers has two arrangements of the same layer: ``attention.attention.{query,key,value}`` in 5.0, by 5.10
``attention.{q,k,v}_proj``. Classes keep the names of their bases, which device maps, FSDP policies and saved
configurations refer to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vit_mae import modeling_vit_mae as hugging_face

from fastmae.ops import attention, attention_qkvpacked, gather_tokens, gelu_linear, norm_linear
from fastmae.ops._dispatch import fuses
from fastmae.ops._linear import kernels, linear


def is_untouched(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether only the parameters of a module matter: no adapter, hook, quantisation or sharding of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is base and not hooked and "forward" not in module.__dict__


def uses_op(module: nn.Module, dropout: float, attention_mask: object) -> bool:
    """The op knows neither masks nor dropout; "eager" is how a model is asked for attention weights."""
    eager = module.config._attn_implementation == "eager"
    return attention_mask is None and not eager and not (module.training and dropout > 0)


class Projections(NamedTuple):
    """Queries, keys and values, and the number of heads."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    heads: int

    def packed(self) -> tuple[Tensor, Tensor | None]:
        """Weight (3 * H * Dh, D) and bias of all three."""
        weight = torch.cat([p.weight for p in self[:3]])
        return weight, None if self.q.bias is None else torch.cat([p.bias for p in self[:3]])


def attend(x: Tensor, projections: Projections, ids: Tensor | None) -> Tensor:
    """(N, L, D) to the heads' outputs (N, L, H * Dh) before the last projection; with ``ids`` (N, M), those rows."""
    heads = projections.heads
    if ids is None and all(is_untouched(p, nn.Linear) for p in projections[:3]):
        # One product instead of three, and one gradient of x instead of a sum of three.
        qkv = F.linear(x, *projections.packed())
        return attention_qkvpacked(qkv.unflatten(-1, (3, heads, -1))).flatten(2)
    sources = (x if ids is None else gather_tokens(x, ids), x, x)
    q, k, v = (p(source).unflatten(-1, (heads, -1)) for p, source in zip(projections, sources, strict=False))
    return attention(q, k, v).flatten(2)


class Block(NamedTuple):
    """What a layer computes with, wherever transformers keeps it."""

    projections: Projections
    out: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    containers: tuple[tuple[nn.Module, type[nn.Module]], ...]
    """Modules between the layer and those, with the classes that they should have."""


def can_fuse(layer: nn.Module, block: Block, x: Tensor, config) -> bool:
    """Whether a layer may be computed from its parameters alone, by ops that are faster than its modules here."""
    if not fuses(x, kernels) or config.hidden_act != "gelu" or (layer.training and config.hidden_dropout_prob > 0):
        return False
    linears = (*block.projections[:3], block.out, block.fc1, block.fc2)
    norms = (layer.layernorm_before, layer.layernorm_after)
    expected = (*((m, nn.Linear) for m in linears), *((m, nn.LayerNorm) for m in norms), *block.containers)
    return all(is_untouched(module, base) for module, base in expected)


def fused(layer: nn.Module, block: Block, x: Tensor) -> Tensor:
    """The layer by ``norm_linear``, attention, ``norm_linear`` and ``gelu_linear``: (N, L, D) to (N, L, D)."""
    before, after = layer.layernorm_before, layer.layernorm_after
    _, qkv = norm_linear(x, None, None, before.weight, before.bias, *block.projections.packed(), before.eps)
    context = attention_qkvpacked(qkv.unflatten(-1, (3, block.projections.heads, -1))).flatten(2)
    branch = linear(context, block.out.weight)
    x, h = norm_linear(x, branch, block.out.bias, after.weight, after.bias, block.fc1.weight, None, after.eps)
    return x + gelu_linear(h, block.fc1.bias, block.fc2.weight, block.fc2.bias)


def _rows(x: Tensor, ids: Tensor | None) -> Tensor:
    return x if ids is None else gather_tokens(x, ids)


if hasattr(hugging_face, "ViTMAESelfAttention"):

    class ViTMAESelfAttention(hugging_face.ViTMAESelfAttention):
        """Queries, keys, values and their attention; the output projection is another module's."""

        def forward(self, hidden_states: Tensor, *args, ids: Tensor | None = None, **kwargs):
            if not uses_op(self, self.dropout_prob, args[0] if args else None):
                context, weights = super().forward(hidden_states, *args, **kwargs)
                return _rows(context, ids), weights
            return attend(hidden_states, self.projections(), ids), None

        def projections(self) -> Projections:
            return Projections(self.query, self.key, self.value, self.num_attention_heads)

    class ViTMAELayer(hugging_face.ViTMAELayer):
        """Pre-norm block; with ``ids`` (N, M), those rows of the same result."""

        def forward(self, hidden_states: Tensor, *args, ids: Tensor | None = None, **kwargs) -> Tensor:
            attend, out = self.attention.attention, self.attention.output
            if ids is not None:
                context, _ = attend(self.layernorm_before(hidden_states), ids=ids)
                x = gather_tokens(hidden_states, ids)
                x = out(context, x) + x
                return self.output(self.intermediate(self.layernorm_after(x)), x)
            if type(attend) is ViTMAESelfAttention and not args and uses_op(attend, attend.dropout_prob, None):
                block = Block(attend.projections(), out.dense, self.intermediate.dense, self.output.dense, (
                    (self.attention, hugging_face.ViTMAEAttention), (attend, ViTMAESelfAttention),
                    (out, hugging_face.ViTMAESelfOutput), (self.output, hugging_face.ViTMAEOutput),
                    (self.intermediate, hugging_face.ViTMAEIntermediate),
                ))  # fmt: skip
                if can_fuse(self, block, hidden_states, attend.config):
                    return fused(self, block, hidden_states)
            return super().forward(hidden_states, *args, **kwargs)

    REPLACED = (ViTMAESelfAttention, ViTMAELayer)

else:

    class ViTMAEAttention(hugging_face.ViTMAEAttention):
        """Queries, keys, values, their attention and the output projection."""

        def forward(self, hidden_states: Tensor, attention_mask=None, *, ids: Tensor | None = None, **kwargs):
            if not uses_op(self, self.attention_dropout, attention_mask):
                out, weights = super().forward(hidden_states, attention_mask, **kwargs)
                return _rows(out, ids), weights
            return self.o_proj(attend(hidden_states, self.projections(), ids)), None

        def projections(self) -> Projections:
            return Projections(self.q_proj, self.k_proj, self.v_proj, self.num_attention_heads)

    class ViTMAELayer(hugging_face.ViTMAELayer):
        """Pre-norm block; with ``ids`` (N, M), those rows of the same result."""

        def forward(self, hidden_states: Tensor, attention_mask=None, *, ids: Tensor | None = None, **kwargs) -> Tensor:
            attend, mlp = self.attention, self.mlp
            if ids is not None:
                out, _ = attend(self.layernorm_before(hidden_states), attention_mask, ids=ids, **kwargs)
                x = gather_tokens(hidden_states, ids) + self.dropout(out)
                return x + self.dropout(mlp(self.layernorm_after(x)))
            if type(attend) is ViTMAEAttention and uses_op(attend, attend.attention_dropout, attention_mask):
                containers = ((attend, ViTMAEAttention), (mlp, hugging_face.ViTMAEMLP), (self.dropout, nn.Dropout))
                block = Block(attend.projections(), attend.o_proj, mlp.fc1, mlp.fc2, containers)
                if can_fuse(self, block, hidden_states, attend.config):
                    return fused(self, block, hidden_states)
            return super().forward(hidden_states, attention_mask, **kwargs)

    REPLACED = (ViTMAEAttention, ViTMAELayer)
