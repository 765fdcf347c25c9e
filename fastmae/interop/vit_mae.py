"""Hugging Face's ViTMAE on fastmae's ops: embeddings, decoder and loss. Importing this module imports transformers.

Each class derives from the one it stands in for, keeps its name, adds no parameter and changes ``forward`` alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vit_mae import modeling_vit_mae as hugging_face

from fastmae.interop import vit_mae_layers
from fastmae.interop.vit_mae_layers import is_untouched
from fastmae.ops import gather_patches, masked_patch_mse, masking_from_noise, restore_tokens
from fastmae.ops._check import describe


def _masks_some(mask_ratio: float, num_patches: int) -> bool:
    return 0 < int(num_patches * (1 - mask_ratio)) < num_patches


def _check_pixels(pixel_values: Tensor, config, image_size: tuple[int, int]) -> None:
    expected = (config.num_channels, *image_size)
    fits = isinstance(pixel_values, Tensor) and pixel_values.is_floating_point()
    if not fits or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values: expected a floating-point tensor of shape (N, {', '.join(map(str, expected))}), "
            f"got {describe(pixel_values)}"
        )


class ViTMAEEmbeddings(hugging_face.ViTMAEEmbeddings):
    """Gathers the visible patches first and embeds those alone."""

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool | None = False):
        embed = self.patch_embeddings
        untouched = is_untouched(embed, hugging_face.ViTMAEPatchEmbeddings) and is_untouched(
            embed.projection, nn.Conv2d
        )
        ratio = self.config.mask_ratio
        if interpolate_pos_encoding or not untouched or not _masks_some(ratio, embed.num_patches):
            return super().forward(pixel_values, noise=noise, interpolate_pos_encoding=bool(interpolate_pos_encoding))
        _check_pixels(pixel_values, self.config, embed.image_size)
        if noise is None:
            noise = torch.rand(len(pixel_values), embed.num_patches, device=pixel_values.device)
        masking = masking_from_noise(noise.to(pixel_values.device), ratio)
        patches = gather_patches(pixel_values, masking.ids_keep, embed.patch_size)
        weight = embed.projection.weight.permute(0, 2, 3, 1).flatten(1)
        positions = self.position_embeddings
        x = F.linear(patches, weight, embed.projection.bias) + F.embedding(masking.ids_keep, positions[0, 1:])
        class_token = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([class_token, x], dim=1), masking.mask, masking.ids_restore


class ViTMAEDecoder(hugging_face.ViTMAEDecoder):
    """Restores the sequence in one pass; with ``ids_mask`` (N, M), logits of those patches only, in that order."""

    def forward(
        self,
        hidden_states: Tensor,
        ids_restore: Tensor,
        interpolate_pos_encoding: bool | None = False,
        *,
        ids_mask: Tensor | None = None,
    ):
        if interpolate_pos_encoding:
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding=True)
        x = self.decoder_embed(hidden_states)
        x = restore_tokens(x, self.mask_token, ids_restore, self.decoder_pos_embed, num_prefix_tokens=1)
        last = len(self.decoder_layers) - 1
        for i, layer in enumerate(self.decoder_layers):
            x = layer(x) if ids_mask is None or i < last else layer(x, ids=ids_mask + 1)
        logits = self.decoder_pred(self.decoder_norm(x[:, 1:] if ids_mask is None else x))
        return hugging_face.ViTMAEDecoderOutput(logits=logits)


class ViTMAEForPreTraining(hugging_face.ViTMAEForPreTraining):
    """Never builds the target; otherwise as its base. See :func:`fastmae.accelerate`."""

    _fastmae_full_logits = True

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ):
        """``ViTMAEForPreTrainingOutput`` (or a tuple) of loss, logits, mask and ids_restore, as of the base class."""
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        num_patches = self.vit.embeddings.patch_embeddings.num_patches
        wants_gradient = pixel_values is not None and pixel_values.requires_grad and torch.is_grad_enabled()
        if interpolate_pos_encoding or wants_gradient or not _masks_some(self.config.mask_ratio, num_patches):
            interpolate = bool(interpolate_pos_encoding)
            return super().forward(pixel_values, noise=noise, interpolate_pos_encoding=interpolate, **kwargs)
        as_tuple = not _first(kwargs.pop("return_dict", None), getattr(self.config, "return_dict", True))
        encoded = self.vit(pixel_values, noise=noise, return_dict=True, **kwargs)
        ids_mask = _masked_ids(encoded.ids_restore, encoded.last_hidden_state.shape[1] - 1)
        chosen = {} if self._fastmae_full_logits else {"ids_mask": ids_mask}
        logits = self.decoder(encoded.last_hidden_state, encoded.ids_restore, **chosen).logits
        config = self.config
        output = hugging_face.ViTMAEForPreTrainingOutput(
            loss=masked_patch_mse(logits, pixel_values, ids_mask, config.patch_size, config.norm_pix_loss),
            logits=logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output.to_tuple() if as_tuple else output


def _first(*values: object) -> object:
    return next(value for value in values if value is not None)


def _masked_ids(ids_restore: Tensor, num_visible: int) -> Tensor:
    """ids_mask (N, M) of a masking, from its ids_restore (N, L): the tail of the inverse permutation."""
    index = torch.arange(ids_restore.shape[1], device=ids_restore.device).expand_as(ids_restore)
    return torch.empty_like(ids_restore).scatter_(1, ids_restore, index)[:, num_visible:].contiguous()


CLASSES = {
    replaced.__mro__[1]: replaced
    for replaced in (ViTMAEForPreTraining, ViTMAEEmbeddings, ViTMAEDecoder, *vit_mae_layers.REPLACED)
}
"""transformers' class to ours."""
