"""The methods of facebookresearch/mae's model, so that code written for it changes one import."""

from __future__ import annotations

from torch import Tensor

from fastmae.ops import masked_patch_mse
from fastmae.ops._check import check
from fastmae.ops._linear import linear


class FacebookMethods:
    """Base of :class:`fastmae.model.MaskedAutoencoderViT`, whose parts these methods put together one at a time."""

    def forward_encoder(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """facebookresearch's method: latent (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        self._check_images(images)
        masking = self._masking(images, mask_ratio, noise, None)
        with self._cast_weights():
            return self._last_norm(self._encode(images, masking.ids_keep).sum()), masking.mask, masking.ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """facebookresearch's method: predictions (N, L, P) from latent (N, 1 + K, D)."""
        with self._cast_weights():
            embed = self.decoder_embed
            visible = linear(latent, embed.weight, embed.bias, weight_cast=embed.weight_cast)
            return self._decode(visible, ids_restore, None, None)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """facebookresearch's method: mean error over the patches whose mask (N, L) is 1, from full predictions.

        With R masks an image, pred (N * R, L, P) and mask (N * R, L).
        """
        self._check_images(images)
        ids = self._all_ids(len(pred), images.device)
        error = masked_patch_mse(
            pred, images, ids, self.patch_size, self.norm_pix_loss, self.mean, self.std, reduction="none"
        )
        return (error * mask).sum() / mask.sum()

    def patchify(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, L, P), values untouched: patches row by row, in a patch rows, columns, channels."""
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
