"""The masked autoencoder: the mathematics of ``reference.py`` on fastmae's ops, without the work that cancels out.

- No float image is written to memory: the ops read and normalise ``uint8`` pixels.
- Only visible patches are embedded, and the loss compares with pixels directly instead of building a target.
- The first decoder block projects the mask tokens to queries, keys and values once per batch, not once per image.
- With ``full_pred=False`` (training) the last decoder block computes queries and MLP, and the head its predictions,
  for masked patches only.

None of this changes the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.model.blocks import Block, Linear, PatchEmbed, SharedTokens, Stream, cast_weights
from fastmae.model.image_model import NORM_EPS, ImageModel
from fastmae.model.initialization import initialize_parameters, sincos_positions
from fastmae.ops import Masking, masked_patch_mse, masking_from_noise, restore_tokens
from fastmae.ops._check import as_pair, check, grid_of
from fastmae.ops._linear import linear

RESIDUAL_DTYPES = ("float32", "bfloat16")


class MAEOutput(NamedTuple):
    """The model's output; unpacks like the tuple that facebookresearch/mae returns."""

    loss: Tensor
    """float32 scalar, mean squared error over masked patches."""
    pred: Tensor
    """(N * R, L, P) for R masks per image; with ``full_pred=False`` (N * R, M, P), in the order of ``ids_mask``."""
    mask: Tensor
    """float32 (N * R, L), 1 = masked."""


class MaskedAutoencoderViT(ImageModel):
    """Masked autoencoder with a Vision Transformer (He et al., CVPR 2022, section 3).

    Args:
        img_size: (height, width) in pixels, or an int for a square; :meth:`set_input_size` changes it later.
        patch_size: (height, width) in pixels, or an int; must divide ``img_size``.
        in_chans: channels C.
        embed_dim, depth, num_heads: encoder width D, blocks, heads.
        decoder_embed_dim, decoder_depth, decoder_num_heads: decoder width E, blocks (at least 1), heads.
        mlp_ratio: hidden width of an MLP relative to its input width.
        norm_pix_loss: normalise each target patch by its own mean and standard deviation (table 1d).
        mean, std: per-channel statistics of pixels in [0, 1], applied to ``uint8`` images only. None: ImageNet's for
            three channels, 0.5 otherwise.
        attention: backend of :func:`fastmae.ops.attention`.
        norm_eps: added to the variance by every LayerNorm.
        residual_dtype: "float32" leaves the residual stream as the ops produce it, float32 under autocast. "bfloat16"
            rounds it after every addition: less memory traffic, and a different computation from the paper's code.
        seed: keys the initialisation, together with each parameter's name. None draws a seed from torch's default
            generator.

    Attributes:
        img_size: (height, width) of the position tables in the state dict.
        input_size: (height, width) that :meth:`forward` takes now; see :meth:`set_input_size`.
        grid_size, num_patches: rows and columns of patches at ``input_size``, and their product L.
        architecture: the arguments that rebuild this model, JSON-able; saved in checkpoints.

    Raises:
        ValueError: a size that patches do not divide, a width that is not a multiple of its heads or of 4, or
            statistics that do not match the channels.
    """

    has_decoder = True
    """False where only an encoder's weights were loaded: the decoder raises."""
    num_prefix_tokens = 1
    """Tokens before the patches: the class token."""

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "auto",
        norm_eps: float = NORM_EPS,
        residual_dtype: str = "float32",
        seed: int | None = None,
    ):
        super().__init__(img_size, patch_size, in_chans, mean, std, attention, norm_eps)
        known = residual_dtype in RESIDUAL_DTYPES
        check(known, "residual_dtype", f"one of {', '.join(RESIDUAL_DTYPES)}", residual_dtype)
        check(depth >= 1, "depth", "at least 1 block", depth)
        check(decoder_depth >= 1, "decoder_depth", "at least 1 block", decoder_depth)
        check(embed_dim % num_heads == 0, "embed_dim", f"a multiple of num_heads={num_heads}", embed_dim)
        divides = decoder_embed_dim % decoder_num_heads == 0
        check(divides, "decoder_embed_dim", f"a multiple of decoder_num_heads={decoder_num_heads}", decoder_embed_dim)

        self.input_size, self.base_grid = self.img_size, self.grid_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.norm_pix_loss, self.residual_dtype = norm_pix_loss, residual_dtype
        self._tables: tuple[Tensor, Tensor] | None = None  # of positions, at another size than img_size
        self._float_images_seen = False
        self.architecture: dict[str, Any] = {
            "img_size": list(self.img_size), "patch_size": list(self.patch_size), "in_chans": in_chans,
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth, "decoder_num_heads": decoder_num_heads, "mlp_ratio": mlp_ratio,
            "norm_pix_loss": norm_pix_loss, **self._statistics,
        } | ({} if norm_eps == NORM_EPS else {"norm_eps": norm_eps})  # fmt: skip

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, attention, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

        positions = sincos_positions(decoder_embed_dim, self.grid_size)
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, attention, norm_eps) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=norm_eps)
        self.decoder_pred = Linear(decoder_embed_dim, self.patch_size[0] * self.patch_size[1] * in_chans)
        self.initialize_weights(seed)

    def initialize_weights(self, seed: int | None = None) -> None:
        """Draw all weights (appendix A.1), each keyed by ``(seed, parameter name)``; None draws the seed too."""
        initialize_parameters(self, int(torch.randint(1 << 62, (), device="cpu")) if seed is None else seed)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        *,
        noise: Tensor | None = None,
        masking: Masking | None = None,
        full_pred: bool = True,
    ) -> MAEOutput:
        """Mask, encode, decode, and compare predictions with the masked pixels.

        Without ``noise`` and ``masking``, noise is drawn from torch's default generator, so no two calls share a mask.

        Args:
            images: (N, C, H, W), any strides. ``uint8`` is raw and normalised with the model's statistics; floating
                point is taken as already normalised.
            mask_ratio: share of patches to mask, in (0, 1).
            noise: (N, L), floating point: the patches with the smallest values stay visible.
            masking: which patches are visible, in place of ``mask_ratio``. N * R rows are R masks per image, as
                ``random_masking(masks_per_image=R)`` draws them: rows n * R to n * R + R - 1 belong to image n, which
                is not copied.
            full_pred: False predicts masked patches only, for training: same loss, same gradients, less work.

        Raises:
            ValueError: images that do not fit the model, both noise and masking, or a ratio outside (0, 1).
        """
        self._check_images(images)
        masking = self._masking(images, mask_ratio, noise, masking)
        with self._autocast_weights():
            stream = self._encode(images, masking.ids_keep)
            visible = self._embed_latent(stream)
            pred = self._decode(visible, masking.ids_restore, masking.ids_keep, None if full_pred else masking.ids_mask)
        loss = self._loss(images, pred, masking.ids_mask)
        return MAEOutput(loss, pred, masking.mask)

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing masked: (N, 1 + L, D), class token first, after the last norm."""
        self._check_images(images)
        with self._autocast_weights():
            return self._last_norm(self._encode(images, self._all_ids(len(images), images.device)).sum())

    def _autocast_weights(self) -> AbstractContextManager[None]:
        device_type = self.pos_embed.device.type
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device_type):
            return nullcontext()
        return cast_weights(self, torch.get_autocast_dtype(device_type))

    def _encode(self, images: Tensor, ids: Tensor) -> Stream:
        """The class token and the patches ``ids`` (N, K) through the encoder's blocks: a stream (N, 1 + K, D)."""
        positions, _ = self._positions()
        x = self.embed_patches(images, ids) + F.embedding(ids, positions[0, 1:])
        x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], dim=1)
        stream = Stream(self._to_residual(x))
        for block in self.blocks:
            stream = block(stream)
        return stream

    def _last_norm(self, x: Tensor) -> Tensor:
        norm = self.norm
        if torch.promote_types(norm.weight.dtype, x.dtype) == norm.weight.dtype:
            return norm(x)
        # FSDP gathers weights in the compute dtype, but the CPU's layer_norm takes none narrower than its input.
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    def _embed_latent(self, stream: Stream) -> Tensor:
        """The decoder's visible tokens (N, 1 + K, E): the last norm fused with ``decoder_embed``."""
        embed = self.decoder_embed
        return stream.norm_linear(self.norm, embed.weight, embed.bias, embed.weight_cast, embed.bias_cast)[1]

    def _decode(self, visible: Tensor, ids_restore: Tensor, ids_keep: Tensor | None, ids: Tensor | None) -> Tensor:
        """Predictions for all patches, or only for the patches ``ids`` (N, M).

        Given ``ids_keep``, the first block projects the mask tokens once per batch, unless it is also the last block.
        """
        if not self.has_decoder:
            raise ValueError("the weights are of an encoder alone, which cannot reconstruct images; use model.encode")
        prefix, positions = self.num_prefix_tokens, self._positions()[1]
        own = positions[:, 1 - prefix :]
        x = restore_tokens(visible, self.mask_token, ids_restore, own, num_prefix_tokens=prefix)
        stream, shared = Stream(self._to_residual(x)), None
        if ids_keep is not None and len(self.decoder_blocks) > 1:
            visible = visible + F.embedding(F.pad(ids_keep + 1, (prefix, 0)), positions[0])
            table = self.mask_token + positions[:, 1:]
            shared = SharedTokens(*map(self._to_residual, (visible, table)), ids_restore)
        for block in self.decoder_blocks[:-1]:
            stream, shared = block(stream, shared=shared), None
        stream = self.decoder_blocks[-1](stream, None if ids is None else ids + prefix)
        return self._predict(stream if ids is not None else Stream(stream.sum()[:, prefix:]), self.decoder_norm)

    def _predict(self, stream: Stream, norm: nn.LayerNorm) -> Tensor:
        head = self.decoder_pred
        return stream.norm_linear(norm, head.weight, head.bias, head.weight_cast, head.bias_cast)[1]

    def _to_residual(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16) if self.residual_dtype == "bfloat16" else x

    def _loss(self, images: Tensor, pred: Tensor, ids_mask: Tensor) -> Tensor:
        return masked_patch_mse(pred, images, ids_mask, self.patch_size, self.norm_pix_loss, self.mean, self.std)

    # Images and masks: sizes, pixel statistics, position tables

    def set_input_size(self, size: int | Sequence[int] | None = None) -> None:
        """Take images of another size from now on, as training with progressive resolution does.

        No weight changes. At ``img_size``, or for None, the model uses its own position tables; for other sizes it
        computes sine-cosine tables with coordinates stretched to the new grid, outside the state dict. A compiled model
        has one graph per size. Raises ValueError for a size that patches do not divide.
        """
        size = self.img_size if size is None else as_pair("size", size)
        self.grid_size = grid_of(size, self.patch_size, "size")
        self.input_size, self.num_patches = size, self.grid_size[0] * self.grid_size[1]
        self._tables = None
        if size != self.img_size:
            own = (self.pos_embed, self.decoder_pos_embed)
            tables = (sincos_positions(t.shape[-1], self.grid_size, self.base_grid).to(t.device, t.dtype) for t in own)
            self._tables = tuple(tables)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Position tables at ``input_size``: the encoder's (1, 1 + L, D) and the decoder's (1, 1 + L, E)."""
        return (self.pos_embed, self.decoder_pos_embed) if self._tables is None else self._tables

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.set_input_size(self.input_size)
        return self

    def _masking(self, images: Tensor, ratio: float, noise: Tensor | None, masking: Masking | None) -> Masking:
        expected = (len(images), self.num_patches)
        if masking is not None:
            check(noise is None, "noise", "None when a masking is given", noise)
            restore = masking.ids_restore
            fits = restore.ndim == 2 and restore.shape[1] == self.num_patches and len(restore) > 0
            if not (fits and (len(restore) == len(images) or len(restore) % max(len(images), 1) == 0)):
                # Format the message only on failure: under torch.compile a size in a string is a constant of the graph.
                check(False, "masking", f"ids_restore of shape {expected}, or a multiple of its rows", restore)
            return masking
        if noise is None:
            noise = torch.rand(expected, device=images.device)
        check(tuple(noise.shape) == expected, "noise", f"shape {expected}", noise)
        return masking_from_noise(noise, ratio)

    def _check_images(self, images: Tensor) -> None:
        expected = f"(N, {self.in_chans}, {self.input_size[0]}, {self.input_size[1]}), uint8 or floating point"
        fits = isinstance(images, Tensor) and tuple(images.shape[1:]) == (self.in_chans, *self.input_size)
        if not fits and isinstance(images, Tensor) and tuple(images.shape[1:]) == (*self.input_size, self.in_chans):
            expected += " (this looks channels-last: pass images.permute(0, 3, 1, 2))"
        check(fits and (images.dtype == torch.uint8 or images.is_floating_point()), "images", expected, images)
        if images.dtype == torch.uint8 or self._float_images_seen or torch.compiler.is_compiling():
            return
        # Look at the first floating-point batch only: reading its range synchronises with the device.
        self._float_images_seen = True
        low, high = map(float, images.detach().aminmax()) if images.numel() else (0.0, 0.0)
        zero_mean = all(value == 0 for value in self._statistics["mean"])  # pixels in [0, 1] are then normalised
        if not max(-low, high) < 20 or (0 <= low < high <= 1 and not zero_mean):
            warnings.warn(
                f"images: floating-point images are taken as already normalised, but these range from {low:.3g} to "
                f"{high:.3g}; pass uint8 images, or model.normalized(images) of pixels in [0, 1]",
                stacklevel=3,
            )

    # The methods of facebookresearch/mae's model, so that code written for it changes one import

    def forward_encoder(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """facebookresearch/mae's method: latent (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        self._check_images(images)
        masking = self._masking(images, mask_ratio, noise, None)
        with self._autocast_weights():
            return self._last_norm(self._encode(images, masking.ids_keep).sum()), masking.mask, masking.ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """facebookresearch/mae's method: predictions (N, L, P) from latent (N, 1 + K, D)."""
        with self._autocast_weights():
            embed = self.decoder_embed
            visible = linear(latent, embed.weight, embed.bias, weight_cast=embed.weight_cast)
            return self._decode(visible, ids_restore, None, None)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """facebookresearch/mae's method: mean error over the patches where mask (N, L) is 1, given full predictions.

        With R masks per image: pred (N * R, L, P) and mask (N * R, L).
        """
        self._check_images(images)
        ids = self._all_ids(len(pred), images.device)
        error = masked_patch_mse(
            pred, images, ids, self.patch_size, self.norm_pix_loss, self.mean, self.std, reduction="none"
        )
        return (error * mask).sum() / mask.sum()

    def patchify(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, L, P), values untouched; a patch holds rows, columns, channels, channels innermost."""
        self._check_images(images)
        n, (rows, cols), (ph, pw) = len(images), self.grid_size, self.patch_size
        x = images.reshape(n, self.in_chans, rows, ph, cols, pw).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(n, self.num_patches, ph * pw * self.in_chans)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, P) to (N, C, H, W): the inverse of :meth:`patchify`."""
        (rows, cols), (ph, pw) = self.grid_size, self.patch_size
        expected = (self.num_patches, ph * pw * self.in_chans)
        fits = patches.ndim == 3 and tuple(patches.shape[1:]) == expected
        check(fits, "patches", f"shape (N, {expected[0]}, {expected[1]})", patches)
        x = patches.reshape(len(patches), rows, cols, ph, pw, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(patches), self.in_chans, *self.input_size)
