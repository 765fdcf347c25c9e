"""The entrances: open a data set, make a loader on it, take the same crops of it every time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastmae.data.augment import Augment
from fastmae.data.batch import DataError
from fastmae.data.dataset import Dataset, OnBad
from fastmae.data.index import open_folder
from fastmae.data.loader import Loader, default_threads
from fastmae.data.photographs import open_photographs
from fastmae.ops.philox import split_seed

LoaderKind = Literal["auto", "dali", "torch"]


def open_dataset(path: Path | str | None, *, on_bad: OnBad = "skip", cache_dir: Path | None = None) -> Dataset:
    """A folder of images (nested or flat; JPEG, PNG, WebP), or the embedded photographs' training split.

    Hidden files are ignored, links followed. Files that are empty, truncated, unreadable or images of another format
    are found here, before training.

    Args:
        path: the folder; None for the embedded photographs.
        on_bad: ``"skip"`` leaves unusable files out and lists them in ``Dataset.bad``; ``"stop"`` refuses the data set.
        cache_dir: where to keep the index, ``~/.cache/fastmae`` if None.

    Raises:
        DataError: no such folder, no images in it, or unusable files and ``on_bad="stop"``.
    """
    if path is None:
        return open_photographs()
    root = Path(path).expanduser()
    return Dataset(open_folder(root, cache_dir), root, name=root.resolve().name, on_bad=on_bad)


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed; does not import it, which takes seconds."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def choose_loader(dataset: Dataset, loader: LoaderKind = "auto") -> Literal["dali", "torch"]:
    """What ``loader`` means on this machine: ``"auto"`` is DALI where it is installed, for files of the user's own;
    the embedded photographs are decoded once and kept, where DALI has nothing to win.

    Raises:
        DataError: DALI is asked for by name and is not installed.
    """
    if loader not in ("auto", "dali", "torch"):
        raise ValueError(f"loader: expected 'auto', 'dali' or 'torch', got {loader!r}")
    if loader == "auto":
        return "dali" if has_dali() and not dataset.embedded else "torch"
    if loader == "dali" and not has_dali():
        raise DataError(
            "the DALI loader was asked for, but NVIDIA DALI is not installed: pip install 'fastmae[dali-cuda13]' "
            "(or 'fastmae[dali-cuda12]' for CUDA 12 drivers; both work without a GPU), or use the torch loader"
        )
    return loader


def create_loader(
    dataset: Dataset,
    *,
    loader: LoaderKind = "auto",
    batch_size: int,
    img_size: tuple[int, int],
    seed: int,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    augment: Augment | None = None,
    num_threads: int | None = None,
    cache_bytes: int = 256 << 20,
) -> Loader:
    """An endless iterator of ``Batch``, made ahead in background threads.

    Args:
        dataset: from ``open_dataset``.
        loader: ``"dali"``, ``"torch"``, or ``"auto"`` (see ``choose_loader``).
        batch_size: samples a batch, on this rank.
        img_size: height and width of the crops.
        seed: of order, crops and flips; in [0, 2**63).
        position: samples that all ranks together have consumed; a run continued from here gets the very batches that it
            would have got.
        rank, world_size: which slice of each global batch of ``batch_size * world_size`` is this one's.
        device: where batches are handed out.
        augment: crop and flip; None for ``Augment()``.
        num_threads: decoding threads; None for one a core (half the cores where ``device`` is the CPU, which trains).
        cache_bytes: the torch loader decodes each image once and keeps it, if all of them together take no more.

    Raises:
        ValueError: an argument out of range.
        DataError: DALI is asked for by name and is not installed.
    """
    height, width = img_size
    counts = {"batch_size": batch_size, "img_size": min(height, width), "world_size": world_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {img_size if name == 'img_size' else value}")
    if position < 0:
        raise ValueError(f"position: expected at least 0, got {position}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a number from 0 to world_size - 1 = {world_size - 1}, got {rank}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
    split_seed(seed)
    device = torch.device(device)
    options = {
        "batch_size": batch_size,
        "img_size": (height, width),
        "seed": seed,
        "position": position,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "augment": augment or Augment(),
        "num_threads": num_threads or default_threads(device),
    }
    if choose_loader(dataset, loader) == "dali":
        from fastmae.data.dali_loader import DaliLoader

        return DaliLoader(dataset, **options)
    from fastmae.data.torch_loader import TorchLoader

    return TorchLoader(dataset, cache_bytes=cache_bytes, **options)


def fixed_crops(
    dataset: Dataset, img_size: tuple[int, int], *, seed: int, epoch: int, count: int, augment: Augment | None = None
) -> Tensor:
    """Crops that a loader with this seed would give from the beginning of an epoch on: always the same ones.

    Args:
        dataset: where from.
        img_size: height and width.
        seed: another one than training's gives crops that training has not seen.
        epoch: where to begin.
        count: n, how many; beyond the data set's size they go on into the next epoch.
        augment: crop and flip; None for ``Augment()``.

    Returns:
        uint8 (n, 3, height, width), a channels-last view. Files that do not decode are replaced as in training.

    Raises:
        DataError: a file cannot be read; or does not decode, and the data set's ``on_bad`` is ``"stop"``.
    """
    options = {"img_size": img_size, "seed": seed, "augment": augment, "loader": "torch"}
    with create_loader(dataset, batch_size=count, position=epoch * len(dataset), **options) as loader:
        return loader.produce(0).images
