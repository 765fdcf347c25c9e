"""The masked autoencoder as the paper ablates it (tables 1 and 2): other computations than MAE's own, each by its name.

``mae.py`` is the method and knows none of this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.model.blocks import Linear, Stream
from fastmae.model.mae import MAEOutput, MaskedAutoencoderViT
from fastmae.ops import Masking, gather_tokens, restore_tokens
from fastmae.ops._check import check

OPTIONS = {"num_outputs": None, "encoder_mask_tokens": False, "class_token": True, "loss_on_all_patches": False}
"""What an ablation changes, with the values of ``MaskedAutoencoderViT``, which also needs a decoder of one block."""


class AblatedMAE(MaskedAutoencoderViT):
    """A masked autoencoder with one or several of the paper's design choices undone.

    Args:
        arguments: those of :class:`MaskedAutoencoderViT`. With ``encoder_mask_tokens``, ``decoder_depth`` may be 0: the
            head then predicts from the encoder's last norm.
        num_outputs: values T that are predicted per patch, of another target than pixels, which :meth:`forward` is
            given. None: pixels.
        encoder_mask_tokens: masked patches enter the encoder as mask tokens, so that it sees all L positions (table
            1c), as BERT and BEiT do.
        class_token: False leaves it out; features are then means of patch tokens.
        loss_on_all_patches: the error of visible patches counts as well (section 3, footnote 1).

    Raises:
        ValueError: as :class:`MaskedAutoencoderViT`; no decoder and no mask tokens in the encoder; normalised pixels
            and another target.
    """

    def __init__(
        self,
        *arguments: Any,
        decoder_depth: int = 8,
        num_outputs: int | None = None,
        encoder_mask_tokens: bool = False,
        class_token: bool = True,
        loss_on_all_patches: bool = False,
        seed: int | None = None,
        **named: Any,
    ):
        expected = "at least 1 block, or 0 if encoder_mask_tokens"
        check(decoder_depth >= 1 - encoder_mask_tokens, "decoder_depth", expected, decoder_depth)
        seed = int(torch.randint(1 << 62, (), device="cpu")) if seed is None else seed
        super().__init__(*arguments, decoder_depth=max(decoder_depth, 1), seed=seed, **named)
        if num_outputs is not None:
            check(num_outputs >= 1, "num_outputs", "at least 1, or None for pixels", num_outputs)
            check(not self.norm_pix_loss, "norm_pix_loss", "False for another target than pixels", True)
        self.num_outputs, self.loss_on_all_patches = num_outputs, loss_on_all_patches
        self.num_prefix_tokens = int(class_token)
        self.architecture["decoder_depth"] = decoder_depth
        given = (num_outputs, encoder_mask_tokens, class_token, loss_on_all_patches)
        self.architecture |= {k: v for (k, usual), v in zip(OPTIONS.items(), given, strict=True) if v != usual}
        if not class_token:
            self.cls_token = None
        self.encoder_mask_token = None
        if encoder_mask_tokens:
            self.mask_token = None
            self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, self.norm.weight.numel()))
        if decoder_depth == 0:
            self.decoder_embed = self.decoder_norm = None
            self.decoder_blocks = nn.ModuleList()
        head = self.decoder_pred
        width = head.in_features if decoder_depth else self.norm.weight.numel()
        self.decoder_pred = Linear(width, num_outputs or head.out_features)
        self.initialize_weights(seed)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        masking: Masking | None = None,
        full_pred: bool = True,
        targets: Tensor | None = None,
    ) -> MAEOutput:
        """As :meth:`MaskedAutoencoderViT.forward`.

        Args:
            targets: where ``num_outputs`` is given, what is to be predicted, of all L patches if all count for the
                loss, else of the masked ones in the order of ``ids_mask``: floating point (N, M, T), compared by the
                squared error; or int64 (N, M), classes below T, by cross-entropy. None: the loss is NaN.

        Returns:
            ``pred`` is (N, L, T) with ``full_pred`` or ``loss_on_all_patches``, else (N, M, T).
        """
        self._check_images(images)
        masking = self._masking(images, mask_ratio, noise, masking)
        everywhere = self.loss_on_all_patches
        ids = None if full_pred or everywhere else masking.ids_mask
        with self._autocast_weights():
            if self.encoder_mask_token is None:
                visible = self._embed_latent(self._encode(images, masking.ids_keep))
                pred = self._decode(visible, masking.ids_restore, masking.ids_keep, ids)
            else:
                stream = self._encode(images, masking.ids_keep, masking.ids_restore)
                pred = self._decode_all(stream, ids)
        counted = self._all_ids(len(pred), images.device) if everywhere else masking.ids_mask
        if self.num_outputs is None:
            loss = self._loss(images, pred, counted)
        elif targets is None:
            loss = pred.float().mean() * float("nan")
        else:
            loss = target_loss(pred if ids is not None or everywhere else gather_tokens(pred, counted), targets)
        return MAEOutput(loss, pred, masking.mask)

    def _encode(self, images: Tensor, ids: Tensor, ids_restore: Tensor | None = None) -> Stream:
        positions, _ = self._positions()
        x = self.embed_patches(images, ids)
        if ids_restore is None:
            x = x + F.embedding(ids, positions[0, 1:])
        else:
            x = restore_tokens(x, self.encoder_mask_token, ids_restore, positions[:, 1:])
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], dim=1)
        stream = Stream(self._to_residual(x))
        for block in self.blocks:
            stream = block(stream)
        return stream

    def _decode_all(self, stream: Stream, ids: Tensor | None) -> Tensor:
        """Predictions from an encoder that has seen all positions, for all patches or for ``ids`` (N, M)."""
        prefix, norm = self.num_prefix_tokens, self.norm
        rows = None if ids is None else ids + prefix
        if self.decoder_blocks:
            norm, positions = self.decoder_norm, self._positions()[1]
            stream = Stream(self._to_residual(self._embed_latent(stream) + positions[:, 1 - prefix :]))
            for block in self.decoder_blocks[:-1]:
                stream = block(stream)
            stream = self.decoder_blocks[-1](stream, rows)
        elif rows is not None:
            stream = Stream(gather_tokens(stream.sum(), rows))
        return self._predict(stream if ids is not None else Stream(stream.sum()[:, prefix:]), norm)


def target_loss(pred: Tensor, targets: Tensor) -> Tensor:
    """Error of predictions (N, M, T) in float32: squared for floating-point targets (N, M, T), cross-entropy for int64
    ones (N, M).

    Raises:
        ValueError: targets of another shape.
    """
    shape = tuple(pred.shape if targets.is_floating_point() else pred.shape[:2])
    check(tuple(targets.shape) == shape, "targets", f"shape {shape}", targets)
    if targets.is_floating_point():
        return F.mse_loss(pred.float(), targets.float())
    return F.cross_entropy(pred.float().flatten(0, 1), targets.flatten())
