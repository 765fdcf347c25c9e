"""facebookresearch/mae's model as the baseline of the training step, and the same with one change at a time.

It is put together from ``fastmae.reference`` and fastmae's public parts. All models of a step share their parameters,
so that a dozen of them fit on one device.
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
from fastmae.reference import Attention, MaskedAutoencoder


@dataclass(frozen=True)
class Changes:
    """What differs from facebookresearch/mae's model.

    Attributes:
        attention: "plain" as in timm 0.3.2, "sdpa" as in timm today, or "fastmae": the backend that ``auto`` picks.
        ops: random_masking, gather_patches, restore_tokens and masked_patch_mse in place of argsort, the embedding of
            all patches, gather and cat, and the loss written out.
        blocks: fastmae's fused LayerNorm and GELU ops in the blocks.
        cast_once: the weights of those blocks are cast to bfloat16 together, not one by one by autocast.
        bf16_residual: the blocks' residual stream in bfloat16.
    """

    attention: Literal["plain", "sdpa", "fastmae"] = "sdpa"
    ops: bool = False
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


class FastAttention(SDPAttention):
    """The reference's attention through ``fastmae.ops.attention_qkvpacked``."""

    def attend(self, qkv: Tensor) -> Tensor:
        return ops.attention_qkvpacked(qkv)


def with_attention(blocks: nn.ModuleList, kind: type[Attention]) -> None:
    """Replace the attention of the reference's blocks; parameters stay."""
    for block in blocks:
        block.attn.__class__ = kind


def share_parameters(fast: MaskedAutoencoderViT, **options) -> MaskedAutoencoderViT:
    """A second fastmae model on the same parameters, with other options."""
    with torch.device("meta"):
        twin = MaskedAutoencoderViT(**fast.architecture, **options)
    twin = twin.to_empty(device=fast.mean.device)
    twin.load_state_dict(fast.state_dict(keep_vars=True), assign=True)
    return twin


class FacebookMAE(MaskedAutoencoder):
    """facebookresearch/mae's model on the parameters of a fastmae model, with some changes.

    Its gathers write their indices out in full, as facebookresearch/mae's ``repeat`` does.
    """

    def __init__(self, fast: MaskedAutoencoderViT, changes: Changes):
        known = inspect.signature(MaskedAutoencoder).parameters
        options = {key: value for key, value in fast.architecture.items() if key in known}
        options |= {key: tuple(options[key]) for key in ("img_size", "patch_size")}
        with torch.device("meta"):
            super().__init__(**options)
        self.load_state_dict(fast.state_dict(keep_vars=True), assign=True)
        self.changes = changes
        kind = {"plain": Attention, "sdpa": SDPAttention, "fastmae": FastAttention}[changes.attention]
        for blocks in (self.blocks, self.decoder_blocks):
            with_attention(blocks, kind)
        # fastmae's parts; in a list, so that its parameters, which are ours already, are not counted twice.
        self._twin = [share_parameters(fast, attention="sdpa")] if changes.ops or changes.blocks else []

    def initialize_weights(self) -> None:
        """Nothing: the parameters are another model's."""

    def forward(
        self, images: Tensor, pixels: Tensor, masking: ops.Masking | None = None, mask_ratio: float = 0.75
    ) -> Tensor:
        """The loss, from raw ``images`` and the same normalised, ``pixels``; ``ops`` need a ``masking``."""
        with self._twin[0].cast_weights(torch.bfloat16) if self.changes.cast_once else nullcontext():
            if self.changes.ops:
                return self._with_ops(images, masking)
            x = self.patch_embed(pixels) + self.pos_embed[:, 1:]
            ids_keep, ids_restore, mask = self._masks(x, mask_ratio) if masking is None else (
                masking.ids_keep, masking.ids_restore, masking.mask
            )  # fmt: skip
            latent = self._encode(x.gather(1, ids_keep[..., None].repeat(1, 1, x.shape[-1])))
            return self.forward_loss(pixels, self._decode(self._restore(latent, ids_restore))[:, 1:], mask)

    def _with_ops(self, images: Tensor, masking: ops.Masking) -> Tensor:
        twin = self._twin[0]
        patches = ops.gather_patches(images, masking.ids_keep, self.patch_size, twin.mean, twin.std)
        latent = self._encode(twin.patch_embed(patches) + F.embedding(masking.ids_keep, self.pos_embed[0, 1:]))
        x = ops.restore_tokens(latent, self.mask_token, masking.ids_restore, self.decoder_pos_embed, 1)
        pred = self._decode(x)[:, 1:]
        return ops.masked_patch_mse(pred, images, masking.ids_mask, self.patch_size, True, twin.mean, twin.std)

    def _masks(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """facebookresearch's masks; unlike the reference's, its sorts need not be stable."""
        n, length, _ = x.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = torch.rand(n, length, device=x.device).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(n, length, device=x.device)
        mask[:, :keep] = 0
        return ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore)

    def _encode(self, visible: Tensor) -> Tensor:
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(visible), -1, -1)
        x = self._run("blocks", torch.cat([cls_token, visible], dim=1))
        return self.decoder_embed(self.norm(x))

    def _decode(self, x: Tensor) -> Tensor:
        return self.decoder_pred(self.decoder_norm(self._run("decoder_blocks", x)))

    def _restore(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        n, visible, dim = x.shape
        mask_tokens = self.mask_token.repeat(n, ids_restore.shape[1] + 1 - visible, 1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].repeat(1, 1, dim))
        return torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed

    def _run(self, blocks: str, x: Tensor) -> Tensor:
        if self.changes.bf16_residual:
            x = x.bfloat16()
        if self.changes.blocks:
            return run_blocks(getattr(self._twin[0], blocks), x)
        for block in getattr(self, blocks):
            x = block(x)
        return x
