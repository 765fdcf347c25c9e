"""What the decoder predicts in place of pixels (table 1d): low resolution, PCA coefficients, discrete tokens.

A target is made of the images outside of the model, which only learns how many values to predict per patch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import gather_patches
from fastmae.ops._check import check

_EXPECTED = "pixels, mean-color, low-resolution-N, a .safetensors file of fastmae fit-target, or package.module:name"


class Target(Protocol):
    """What is to be predicted of a patch.

    Attributes:
        size: values T, or classes.
    """

    size: int

    def to(self, device: torch.device) -> Target:
        """This target with its tensors on a device."""

    def __call__(self, model: MaskedAutoencoderViT, images: Tensor, ids: Tensor) -> Tensor:
        """Of the patches ``ids`` (N * R, M) of a loader's images (N, C, H, W): floating point (N * R, M, T), or
        classes, int64 (N * R, M)."""


class Projection(NamedTuple):
    """A linear function of a patch's pixels, normalised with the model's mean and standard deviation."""

    matrix: Tensor
    """float32 (P, T)."""
    center: Tensor
    """float32 (P,), subtracted first."""

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    def to(self, device: torch.device) -> Projection:
        return Projection(*(tensor.to(device) for tensor in self))

    def __call__(self, model: MaskedAutoencoderViT, images: Tensor, ids: Tensor) -> Tensor:
        return (patches_of(model, images, ids) - self.center) @ self.matrix


class Codebook(NamedTuple):
    """The nearest of some patches, by Euclidean distance of normalised pixels: a tokenizer that looks at one patch."""

    centers: Tensor
    """float32 (T, P)."""

    @property
    def size(self) -> int:
        return len(self.centers)

    def to(self, device: torch.device) -> Codebook:
        return Codebook(self.centers.to(device))

    def __call__(self, model: MaskedAutoencoderViT, images: Tensor, ids: Tensor) -> Tensor:
        # |x - c|^2 without |x|^2, which is the same for all centres
        return (self.centers.square().sum(1) / 2 - patches_of(model, images, ids) @ self.centers.T).argmin(-1)


class Tokenizer:
    """A tokenizer of whole images that somebody else wrote, as DALL-E's discrete VAE is in BEiT and in table 1d.

    Args:
        name: ``package.module:factory``. ``factory()`` returns a function with an attribute ``vocab_size``, which is
            called with a batch of the loader, (N, C, H, W) on the model's device, ``uint8`` or floating point in
            [0, 1], and returns int64 (N, L), a token for each patch, row by row.

    Raises:
        ValueError: there is no such factory, or what it returns has no ``vocab_size``.
    """

    def __init__(self, name: str):
        module, _, attribute = name.partition(":")
        try:
            self._tokenize = getattr(import_module(module), attribute)()
            self.size = int(self._tokenize.vocab_size)
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"target: expected a tokenizer's factory with vocab_size, got {name}: {error}") from error

    def to(self, device: torch.device) -> Tokenizer:
        return self

    def __call__(self, model: MaskedAutoencoderViT, images: Tensor, ids: Tensor) -> Tensor:
        tokens = self._tokenize(images)
        expected = f"int64 {(len(images), model.num_patches)} of a tokenizer"
        fits = tokens.dtype == torch.int64 and tuple(tokens.shape) == (len(images), model.num_patches)
        check(fits, "tokens", expected, tokens)
        return tokens.to(ids.device).repeat_interleave(len(ids) // len(images), 0).gather(1, ids)


def create_target(name: str, patch_size: Sequence[int], channels: int) -> Target | None:
    """The target that ``--model.target`` names; None for pixels.

    Args:
        name: "pixels", "mean-color", "low-resolution-N" (means over N x N cells of a patch), a file of
            :func:`save_target`, or "package.module:name" (:class:`Tokenizer`).
        patch_size: (ph, pw).
        channels: C.

    Raises:
        ValueError: nothing of the kind, a file that cannot be read or is of other patches, or cells that do not divide
            the patch.
    """
    ph, pw = patch_size
    if name == "pixels":
        return None
    if match := re.fullmatch(r"mean-color|low-resolution-(\d+)", name):
        cells = int(match[1] or 1)
        if cells < 1 or ph % cells or pw % cells:
            raise ValueError(f"target: expected cells that divide a patch of {ph} x {pw} pixels, got {name}")
        return _low_resolution(ph, pw, channels, cells)
    if ":" in name:
        return Tokenizer(name)
    if not name.endswith(".safetensors"):
        raise ValueError(f"target: expected {_EXPECTED}, got {name}")
    try:
        with safe_open(name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no __iter__
    except (OSError, SafetensorError) as error:
        raise ValueError(f"target: expected a file of fastmae fit-target, got {name}: {error}") from error
    target = next((kind(**tensors) for kind in (Projection, Codebook) if tensors.keys() == set(kind._fields)), None)
    if target is None:
        raise ValueError(f"target: expected a file of fastmae fit-target, got {name} with {', '.join(sorted(tensors))}")
    values = len(target.matrix) if isinstance(target, Projection) else target.centers.shape[1]
    if values != ph * pw * channels:
        raise ValueError(f"target: expected a target of {ph} x {pw} x {channels} values per patch, {name} has {values}")
    return target


def _low_resolution(ph: int, pw: int, channels: int, cells: int) -> Projection:
    rows, columns = torch.arange(ph) // (ph // cells), torch.arange(pw) // (pw // cells)
    cell = rows[:, None] * cells + columns  # of a pixel
    outputs = cell[..., None] * channels + torch.arange(channels)
    matrix = torch.nn.functional.one_hot(outputs.flatten(), cells * cells * channels).float()
    return Projection(matrix / matrix.sum(0), torch.zeros(ph * pw * channels))


def fit_pca(patches: Iterable[Tensor], size: int) -> tuple[Projection, float]:
    """The ``size`` directions of largest variance of some patches, float (n, P) each; and their share of the variance.

    The paper predicts the 96 largest coefficients of 768 (table 1d). They are not scaled: the loss weighs each by its
    variance, as the loss of pixels does.
    """
    count, total, products = 0, 0.0, 0.0
    for batch in patches:
        batch = batch.double()
        count, total, products = count + len(batch), total + batch.sum(0), products + batch.T @ batch
    check(count > 1, "patches", "at least 2", count)
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    check(1 <= size <= len(mean), "size", f"at most {len(mean)}, the values of a patch", size)
    share = float(variances[-size:].sum() / variances.sum())
    return Projection(directions[:, -size:].flip(1).float().contiguous(), mean.float()), share


def fit_codebook(patches: Iterable[Tensor], size: int, seed: int = 0) -> Codebook:
    """``size`` patches that represent others, by k-means on batches (scikit-learn's)."""
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(size, random_state=seed, n_init=1)
    for batch in patches:
        if len(batch) < size:
            raise ValueError(f"size: expected at most the {len(batch)} patches of a batch, got {size}")
        means.partial_fit(batch.float().numpy())
    return Codebook(torch.from_numpy(means.cluster_centers_).float())


def save_target(target: Projection | Codebook, path: Path) -> None:
    """Write a fitted target, in place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(target._asdict(), partial)
    partial.replace(path)


def patches_of(model: MaskedAutoencoderViT, images: Tensor, ids: Tensor) -> Tensor:
    return gather_patches(model.normalized(images), ids, model.patch_size, model.mean, model.std, dtype=torch.float32)
