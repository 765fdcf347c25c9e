"""What a model takes in: images of a size, the statistics of their pixels, the positions of their patches, masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmae.ops import Masking, masking_from_noise
from fastmae.ops._check import as_pair, check, grid_of
from fastmae.positions import sincos_positions
from fastmae.presets import IMAGENET_MEAN, IMAGENET_STD


class ImageInputs(nn.Module):
    """Base of :class:`fastmae.model.MaskedAutoencoderViT`: the images it is made for, and others when told.

    Attributes:
        img_size: (height, width) that the model is made for, which its state dict's position tables belong to.
        input_size: (height, width) that it takes at the moment; see :meth:`set_input_size`.
        grid_size, num_patches: rows and columns of patches at ``input_size``, and L, their product.
    """

    pos_embed: nn.Parameter
    decoder_pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ):
        super().__init__()
        self.img_size, self.patch_size = as_pair("img_size", img_size), as_pair("patch_size", patch_size)
        self.input_size = self.img_size
        self.grid_size = self.base_grid = grid_of(self.img_size, self.patch_size, "img_size")
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self._statistics = {
            "mean": _statistics("mean", mean, IMAGENET_MEAN, in_chans),
            "std": _statistics("std", std, IMAGENET_STD, in_chans),
        }
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._tables_of_size: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._float_images_seen = False

    def set_input_size(self, size: int | Sequence[int] | None = None) -> None:
        """Take images of another size from now on, as training with progressive resolution does.

        No weight changes. Positions are sine-cosine tables whose coordinates are stretched to the new grid
        (:func:`fastmae.positions.sincos_positions`); at ``img_size`` they are the model's own tables, untouched. Tables
        are computed once a size and kept out of the state dict. A compiled model has one graph a size.

        Args:
            size: (height, width) in pixels, or an int for a square; None for ``img_size``.

        Raises:
            ValueError: a size that does not divide into patches.
        """
        size = self.img_size if size is None else as_pair("size", size)
        self.grid_size = grid_of(size, self.patch_size, "size")
        self.input_size, self.num_patches = size, self.grid_size[0] * self.grid_size[1]
        if size == self.img_size:
            self._tables = None
            return
        if size not in self._tables_of_size:
            own = (self.pos_embed, self.decoder_pos_embed)
            self._tables_of_size[size] = tuple(
                sincos_positions(t.shape[-1], self.grid_size, self.base_grid).to(t.device, t.dtype) for t in own
            )
        self._tables = self._tables_of_size[size]

    def normalized(self, images: Tensor) -> Tensor:
        """A loader's batch as :meth:`forward` takes it: floating images in [0, 1] are normalised with the model's
        statistics in one pass; uint8 ones stay raw, since the kernels normalise them."""
        if images.dtype == torch.uint8:
            return images
        mean, scale = self.mean.view(-1, 1, 1), self.std.reciprocal().view(-1, 1, 1)
        return torch.addcmul(-mean * scale, images, scale)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Tables (1, 1 + L, D) and (1, 1 + L, E) of the encoder and the decoder at ``input_size``."""
        return (self.pos_embed, self.decoder_pos_embed) if self._tables is None else self._tables

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # The pixel statistics stay float32 under .to(bfloat16), and are right again after to_empty().
        for name, values in self._statistics.items():
            self._buffers[name] = torch.tensor(values, dtype=torch.float32, device=self._buffers[name].device)
        self._tables_of_size.clear()
        self.set_input_size(self.input_size)
        return self

    def _masking(self, images: Tensor, ratio: float, noise: Tensor | None, masking: Masking | None) -> Masking:
        expected = (len(images), self.num_patches)
        if masking is not None:
            check(noise is None, "noise", "None when a masking is given", noise)
            restore = masking.ids_restore
            fits = restore.ndim == 2 and restore.shape[1] == self.num_patches and len(restore) > 0
            if not (fits and (len(restore) == len(images) or len(restore) % max(len(images), 1) == 0)):
                # Formatted here and not before: under torch.compile a size in a string becomes a constant of the graph.
                check(False, "masking", f"ids_restore of shape {expected}, or a multiple of its rows", restore)
            return masking
        if noise is None:
            noise = torch.rand(expected, device=images.device)
        check(tuple(noise.shape) == expected, "noise", f"shape {expected}", noise)
        return masking_from_noise(noise, ratio)

    def _all_ids(self, n: int, device: torch.device) -> Tensor:
        return torch.arange(self.num_patches, device=device).expand(n, -1)

    def _check_images(self, images: Tensor) -> None:
        expected = f"(N, {self.in_chans}, {self.input_size[0]}, {self.input_size[1]}), uint8 or floating point"
        fits = isinstance(images, Tensor) and tuple(images.shape[1:]) == (self.in_chans, *self.input_size)
        if not fits and isinstance(images, Tensor) and tuple(images.shape[1:]) == (*self.input_size, self.in_chans):
            expected += " (this looks channels-last: pass images.permute(0, 3, 1, 2))"
        check(fits and (images.dtype == torch.uint8 or images.is_floating_point()), "images", expected, images)
        if images.dtype == torch.uint8 or self._float_images_seen or torch.compiler.is_compiling():
            return
        # Once, since reading a value waits for the device.
        self._float_images_seen = True
        low, high = map(float, images.detach().aminmax()) if images.numel() else (0.0, 0.0)
        plain = all(value == 0 for value in self._statistics["mean"])  # such pixels in [0, 1] are normalised already
        if not max(-low, high) < 20 or (0 <= low < high <= 1 and not plain):
            warnings.warn(
                f"images: floating-point images are taken as already normalised, but these are from {low:.3g} to "
                f"{high:.3g}; pass uint8 images, or model.normalized(images) of pixels in [0, 1]",
                stacklevel=3,
            )


def _statistics(name: str, values: Sequence[float] | None, imagenet: tuple[float, ...], channels: int) -> list[float]:
    if values is None:
        values = imagenet if channels == 3 else (0.5,) * channels
    values = [float(value) for value in values]
    check(len(values) == channels, name, f"one value for each of the {channels} channels", values)
    check(name == "mean" or min(values) > 0, name, "positive values", values)
    return values
