"""The plain model with one change at a time: what each lever of a fast training step is worth on its own.

Everything is put together from ``fastmae.reference`` and from fastmae's public parts; all models of a step share the
same parameters, so that a dozen of them fit on one device.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae import ops
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.blocks import run_blocks
from fastmae.reference import Attention, MaskedAutoencoder, patchify

_REFERENCE_ARGUMENTS = set(inspect.signature(MaskedAutoencoder).parameters)


@dataclass(frozen=True)
class Levers:
    """What differs from facebookresearch/mae's model.

    Attributes:
        attention: "plain" as in timm 0.3.2, "sdpa" as in timm today, or "fastmae": the backend that ``auto`` picks.
        ops: random_masking, gather_patches, restore_tokens and masked_patch_mse in place of argsort, the embedding of
            all patches, gather and cat, and the loss written out.
        masked_only: the last decoder block's queries and MLP and the pixel head for masked patches only.
        blocks: fastmae's fused LayerNorm and GELU ops in the blocks.
        cast_once: the weights of those blocks are cast to bfloat16 together, not one by one by autocast.
        bf16_residual: the blocks' residual stream in bfloat16.
    """

    attention: Literal["plain", "sdpa", "fastmae"] = "sdpa"
    ops: bool = False
    masked_only: bool = False
    blocks: bool = False
    cast_once: bool = False
    bf16_residual: bool = False


class SDPAttention(Attention):
    """The reference's attention through PyTorch's fused function, as timm has it today."""

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(self.attend(qkv).flatten(2))

    def forward_queries(self, x: Tensor, rows: Tensor) -> Tensor:
        """The chosen rows of ``forward(x)``: keys and values for all, queries for those only."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x.gather(1, rows), weight[:dim], bias[:dim]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = F.linear(x, weight[dim:], bias[dim:]).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FastAttention(SDPAttention):
    """The reference's attention through ``fastmae.ops.attention_qkvpacked``."""

    def attend(self, qkv: Tensor) -> Tensor:
        return ops.attention_qkvpacked(qkv)


def with_attention(blocks: nn.ModuleList, kind: type[Attention]) -> None:
    """Replace the attention of the reference's blocks, parameters kept."""
    for block in blocks:
        with torch.device("meta"):
            attention = kind(block.attn.qkv.in_features, block.attn.num_heads)
        attention.load_state_dict(block.attn.state_dict(keep_vars=True), assign=True)
        block.attn = attention


def share_parameters(fast: MaskedAutoencoderViT, **options) -> MaskedAutoencoderViT:
    """A second fastmae model on the same parameters, with other options."""
    with torch.device("meta"):
        twin = MaskedAutoencoderViT(**fast.architecture, **options)
    twin = twin.to_empty(device=fast.mean.device)
    twin.load_state_dict(fast.state_dict(keep_vars=True), assign=True)
    return twin


class LeverModel(MaskedAutoencoder):
    """The reference with some levers pulled, on the parameters of a fastmae model."""

    def __init__(self, fast: MaskedAutoencoderViT, levers: Levers):
        keywords = {key: value for key, value in fast.architecture.items() if key in _REFERENCE_ARGUMENTS}
        keywords |= {key: tuple(keywords[key]) for key in ("img_size", "patch_size")}
        with torch.device("meta"):
            super().__init__(**keywords)
        self.load_state_dict(fast.state_dict(keep_vars=True), assign=True)
        self.levers = levers
        kind = {"plain": Attention, "sdpa": SDPAttention, "fastmae": FastAttention}[levers.attention]
        for blocks in (self.blocks, self.decoder_blocks):
            with_attention(blocks, kind)
        # In a list, so that its parameters, which are ours already, are not counted twice.
        self._twin = [share_parameters(fast, attention="sdpa")]

    def initialize_weights(self) -> None:
        """Nothing: the parameters are another model's."""

    def forward(
        self, images: Tensor, pixels: Tensor, masking: ops.Masking | None = None, mask_ratio: float = 0.75
    ) -> Tensor:
        """The loss, from raw ``images`` and the same normalised, ``pixels``; some levers need a ``masking``."""
        with self._twin[0].cast_weights(torch.bfloat16) if self.levers.cast_once else nullcontext():
            return self._forward(images, pixels, masking, mask_ratio)

    def _forward(self, images, pixels, masking, mask_ratio) -> Tensor:
        x, ids_restore, mask = self._embed(images, pixels, masking, mask_ratio)
        x = self.decoder_embed(self.norm(self._run("blocks", x)))
        if self.levers.ops:
            x = ops.restore_tokens(x, self.mask_token, ids_restore, self.decoder_pos_embed, num_prefix_tokens=1)
        else:
            x = self._restore(x, ids_restore)
        if self.levers.masked_only:
            x = self._masked_rows(self.decoder_blocks[-1], self._run("decoder_blocks", x, until=-1), masking.ids_mask)
        else:
            x = self._run("decoder_blocks", x)
        pred = self.decoder_pred(self.decoder_norm(x))
        if self.levers.ops:
            mean, std = self._twin[0].mean, self._twin[0].std
            return ops.masked_patch_mse(pred[:, 1:], images, masking.ids_mask, self.patch_size, True, mean, std)
        if self.levers.masked_only:
            return self._masked_loss(pixels, pred, masking.ids_mask)
        return self.forward_loss(pixels, pred[:, 1:], mask)

    def _embed(self, images, pixels, masking, mask_ratio):
        if self.levers.ops:
            twin, ids = self._twin[0], masking.ids_keep
            patches = ops.gather_patches(images, ids, self.patch_size, twin.mean, twin.std)
            x = twin.patch_embed(patches) + F.embedding(ids, self.pos_embed[0, 1:])
            ids_restore, mask = masking.ids_restore, masking.mask
        else:
            x = self.patch_embed(pixels) + self.pos_embed[:, 1:]
            if masking is None:
                ids, ids_restore, mask = self._shuffle(x, mask_ratio)
            else:
                ids, ids_restore, mask = masking.ids_keep, masking.ids_restore, masking.mask
            x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls_token, x], dim=1), ids_restore, mask

    def _shuffle(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """facebookresearch's masks; unlike the reference's, its sorts need not be stable."""
        n, length, _ = x.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = torch.rand(n, length, device=x.device).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(n, length, device=x.device)
        mask[:, :keep] = 0
        return ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore)

    def _run(self, name: str, x: Tensor, until: int | None = None) -> Tensor:
        if self.levers.bf16_residual:
            x = x.bfloat16()
        if self.levers.blocks:
            return run_blocks(getattr(self._twin[0], name)[:until], x)
        for block in getattr(self, name)[:until]:
            x = block(x)
        return x

    def _restore(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        n, visible, dim = x.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(n, ids_restore.shape[1] + 1 - visible, dim)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, dim))
        return torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed

    def _masked_rows(self, block: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        """The rows of the masked patches of ``block(x)``."""
        rows = ids[..., None].expand(-1, -1, x.shape[-1]) + 1
        x = x.gather(1, rows) + block.attn.forward_queries(block.norm1(x), rows)
        return x + block.mlp(block.norm2(x))

    def _masked_loss(self, pixels: Tensor, pred: Tensor, ids: Tensor) -> Tensor:
        target = patchify(pixels, self.patch_size)
        target = target.gather(1, ids[..., None].expand(-1, -1, target.shape[-1]))
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        return ((pred - (target - mean) / (var + 1e-6) ** 0.5) ** 2).mean()
