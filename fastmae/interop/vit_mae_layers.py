"""Attention and Transformer layer of Hugging Face's ViTMAE on fastmae's attention.

transformers has had two arrangements of the same layer: until 5.5 ``attention.attention.{query,key,value}``, now
``attention.{q,k,v}_proj``. Classes keep the names of their bases, which device maps, FSDP policies and saved
configurations refer to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vit_mae import modeling_vit_mae as hugging_face

from fastmae.ops import attention, attention_qkvpacked, gather_tokens


def is_untouched(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether only the parameters of a module matter: no adapter, hook, quantisation or sharding of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is base and not hooked


def uses_op(module: nn.Module, dropout: float, attention_mask: object) -> bool:
    """The op knows neither masks nor dropout; "eager" is how a model is asked for attention weights."""
    eager = module.config._attn_implementation == "eager"
    return attention_mask is None and not eager and not (module.training and dropout > 0)


def attend(x: Tensor, projections: tuple[nn.Module, nn.Module, nn.Module], heads: int, ids: Tensor | None) -> Tensor:
    """(N, L, D) to the heads' outputs (N, L, H * Dh) before the last projection; with ``ids`` (N, M), those rows."""
    untouched = all(is_untouched(p, nn.Linear) for p in projections)
    if ids is None and untouched:
        # One product instead of three, and one gradient of x instead of a sum of three.
        weight = torch.cat([p.weight for p in projections])
        bias = None if projections[0].bias is None else torch.cat([p.bias for p in projections])
        return attention_qkvpacked(F.linear(x, weight, bias).unflatten(-1, (3, heads, -1))).flatten(2)
    sources = (x if ids is None else gather_tokens(x, ids), x, x)
    q, k, v = (p(source).unflatten(-1, (heads, -1)) for p, source in zip(projections, sources, strict=True))
    return attention(q, k, v).flatten(2)


def _rows(x: Tensor, ids: Tensor | None) -> Tensor:
    return x if ids is None else gather_tokens(x, ids)


if hasattr(hugging_face, "ViTMAESelfAttention"):

    class ViTMAESelfAttention(hugging_face.ViTMAESelfAttention):
        """Queries, keys, values and their attention; the output projection is another module's."""

        def forward(self, hidden_states: Tensor, *args, ids: Tensor | None = None, **kwargs):
            if not uses_op(self, self.dropout_prob, args[0] if args else None):
                context, weights = super().forward(hidden_states, *args, **kwargs)
                return _rows(context, ids), weights
            return attend(hidden_states, (self.query, self.key, self.value), self.num_attention_heads, ids), None

    class ViTMAELayer(hugging_face.ViTMAELayer):
        """Pre-norm block; with ``ids`` (N, M), those rows of the same result."""

        def forward(self, hidden_states: Tensor, *args, ids: Tensor | None = None, **kwargs) -> Tensor:
            if ids is None:
                return super().forward(hidden_states, *args, **kwargs)
            context, _ = self.attention.attention(self.layernorm_before(hidden_states), ids=ids)
            x = gather_tokens(hidden_states, ids)
            x = self.attention.output(context, x) + x
            return self.output(self.intermediate(self.layernorm_after(x)), x)

    REPLACED = (ViTMAESelfAttention, ViTMAELayer)

else:

    class ViTMAEAttention(hugging_face.ViTMAEAttention):
        """Queries, keys, values, their attention and the output projection."""

        def forward(self, hidden_states: Tensor, attention_mask=None, *, ids: Tensor | None = None, **kwargs):
            if not uses_op(self, self.attention_dropout, attention_mask):
                out, weights = super().forward(hidden_states, attention_mask, **kwargs)
                return _rows(out, ids), weights
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return self.o_proj(attend(hidden_states, projections, self.num_attention_heads, ids)), None

    class ViTMAELayer(hugging_face.ViTMAELayer):
        """Pre-norm block; with ``ids`` (N, M), those rows of the same result."""

        def forward(self, hidden_states: Tensor, attention_mask=None, *, ids: Tensor | None = None, **kwargs) -> Tensor:
            if ids is None:
                return super().forward(hidden_states, attention_mask, **kwargs)
            out, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, ids=ids, **kwargs)
            x = gather_tokens(hidden_states, ids) + self.dropout(out)
            return x + self.dropout(self.mlp(self.layernorm_after(x)))

    REPLACED = (ViTMAEAttention, ViTMAELayer)
