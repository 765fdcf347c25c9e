"""What the masked autoencoder and the classifier share: images cut into patches, pixel statistics, loading weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastmae.model.blocks import Block, cast_weights
from fastmae.ops import gather_patches
from fastmae.ops._check import as_pair, check, grid_of
from fastmae.ops.attention import BACKENDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
NORM_EPS = 1e-6
"""LayerNorm's epsilon in the paper's code; other libraries have others. An architecture names it where it differs."""


class ImageModel(nn.Module):
    """Base of models of images (N, C, H, W), any strides, cut into patches, which a ``patch_embed`` projects.

    ``uint8`` images are raw: the kernels normalise them with ``mean`` and ``std``, per channel, of pixels in [0, 1].
    Floating-point images are taken as already normalised.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        attention: str,
        norm_eps: float,
    ):
        super().__init__()
        check(norm_eps > 0, "norm_eps", "a positive number", norm_eps)
        check(attention in BACKENDS, "attention", f"one of {', '.join(BACKENDS)}", attention)
        self.img_size, self.patch_size = as_pair("img_size", img_size), as_pair("patch_size", patch_size)
        self.grid_size = grid_of(self.img_size, self.patch_size, "img_size")
        self.in_chans = in_chans
        given = {"mean": mean, "std": std}
        self._statistics = {name: _as_statistics(name, values, in_chans) for name, values in given.items()}
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """A loader's batch as the model expects it: floating-point images in [0, 1] normalised, ``uint8`` ones as they
        are, since the kernels normalise them."""
        if images.dtype == torch.uint8:
            return images
        mean, scale = self.mean.view(-1, 1, 1), self.std.reciprocal().view(-1, 1, 1)
        return torch.addcmul(-mean * scale, images, scale)

    def embed_patches(self, images: Tensor, ids: Tensor) -> Tensor:
        """The patches ``ids`` (N, K) projected: (N, K, D), without positions."""
        patches = gather_patches(images, ids, self.patch_size, self.mean, self.std)
        if not torch.is_autocast_enabled(images.device.type):
            patches = patches.to(self.patch_embed.proj.weight.dtype)
        return self.patch_embed(patches)

    def set_activation_checkpointing(self, mode: str) -> None:
        """Let the backward recompute activations of all blocks: "none", "selective" or "full"; see ``Block``."""
        check(mode in ACTIVATION_CHECKPOINTING, "mode", f"one of {', '.join(ACTIVATION_CHECKPOINTING)}", mode)
        for block in self.all_blocks:
            block.activation_checkpointing = mode

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of the encoder and, where there is one, the decoder."""
        return [*self.blocks, *getattr(self, "decoder_blocks", ())]

    def cast_weights(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """A context that caches weights and biases in ``dtype``, for several forwards between two updates.

        Outside of it every forward under autocast makes its own copies. Weights must not change inside.
        """
        return cast_weights(self, dtype)

    def _all_ids(self, n: int, device: torch.device) -> Tensor:
        return torch.arange(self.grid_size[0] * self.grid_size[1], device=device).expand(n, -1)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Pixel statistics stay float32 under .to(bfloat16) and get their values back after .to_empty().
        for name, values in self._statistics.items():
            self._buffers[name] = torch.tensor(values, dtype=torch.float32, device=self._buffers[name].device)
        return self


def check_weights(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Raise ValueError if weights do not fit parameters; names one that is missing, unknown, not finite or of another
    shape. Those in ``optional`` may be missing."""
    for name, parameter in parameters.items():
        if name not in weights:
            if name not in optional:
                raise ValueError(f"{name}: missing among the weights")
            continue
        there, here = tuple(weights[name].shape), tuple(parameter.shape)
        if there != here:
            hint = ""
            if name.endswith("pos_embed") and there[-1] == here[-1]:
                hint = "; positions are not interpolated: --model.img-size must be that of the weights"
            elif name.startswith("head."):
                hint = "; num_classes must be that of the weights, or leave the head out"
            raise ValueError(f"{name}: the weights' has shape {there}, this model's {here}{hint}")
        if not weights[name].isfinite().all():
            raise ValueError(f"{name}: has values that are not finite")
    if unknown := weights.keys() - parameters.keys():
        raise ValueError(f"{min(unknown)}: among the weights, but not a tensor of this model")


def _as_statistics(name: str, values: Sequence[float] | None, channels: int) -> list[float]:
    if values is None:
        imagenet = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}[name]
        values = imagenet if channels == 3 else (0.5,) * channels
    values = [float(value) for value in values]
    check(len(values) == channels, name, f"one value for each of the {channels} channels", values)
    check(name == "mean" or min(values) > 0, name, "positive values", values)
    return values
