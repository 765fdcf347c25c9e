"""Open a data set: in one process, or once for all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastmae.data.augment import Augment
from fastmae.data.batch import ImgSize, LateBad, Planner
from fastmae.data.dataset import Dataset, printable
from fastmae.data.errors import DataError
from fastmae.data.formats import COLOR_16, Format
from fastmae.data.host import HostDecoder
from fastmae.data.index import MANIFEST, Accepts, publish_index, root_of, trusted_index
from fastmae.data.loader import Loader, choose_options
from fastmae.data.photographs import open_photographs
from fastmae.data.records import RecordSource, find_records, is_parquet, source_at
from fastmae.data.sampler import micro_batches
from fastmae.data.sources import EXPECTED
from fastmae.data.storage import as_url
from fastmae.ops.philox import split_seed

logger = logging.getLogger(__name__)
LoaderKind = Literal["auto", "dali", "torch"]
_DALI_FORMATS = {Format.JPEG, Format.PNG, Format.WEBP}


def open_once(open_: Callable[..., Dataset], first: Callable[[Callable[[], Any]], Any]) -> Dataset:
    """Open a data set on all ranks: rank 0 lists it and publishes its index, the others open that and list nothing.

    Args:
        open_: ``open_dataset`` of a path; takes ``index``.
        first: calls a function on rank 0 and returns its result on every rank.
    """
    led: list[Dataset] = []

    def lead() -> tuple[Any, str]:
        led.append(open_())
        return led[0].index.folder, led[0].hash

    folder, digest = first(lead)
    if led:
        return led[0]
    if folder is not None and (folder / MANIFEST).is_file():
        dataset = open_(index=folder)
        if dataset.hash == digest:
            return dataset
    where = f"{folder}, which rank 0 has published, is not here" if folder else "rank 0 could not keep its index"
    dataset = open_()
    if not dataset.embedded:
        logger.warning("%s: this rank has listed the data itself; give a --data.index that all ranks share", where)
    return dataset


def open_dataset(
    path: Path | str | Any | None,
    *,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
    channels_first: bool = False,
    max_bad_fraction: float = 0.01,
    max_pixels: int = Accepts.max_pixels,
    window: int | None = None,
    index: Path | None = None,
    cache_dir: Path | None = None,
) -> Dataset:
    """Images from a folder, from tar shards or by a list, or the embedded photographs' training split.

    Files that are empty, truncated, unreadable, huge, or images of another kind are found here, before training.

    Args:
        path: None for the embedded photographs; a map-style data set, as :func:`fastmae.data.records.as_records` takes
            it; else the path or URL of a folder of images, of WebDataset tar shards (a folder or one), of a list file
            of images or shards, of Parquet files (a folder, one, or a pattern), or of a folder saved by Hugging Face's
            ``save_to_disk``. docs/data.md says what each of them may hold, and where labels come from.
        channels: C. For 3, grey images become RGB; for 1, colour is refused; anything else is for TIFF and ``.npy``.
        value_range: (low, high) of 16-bit and float TIFF and ``.npy``, and of 16-bit PNG, or one pair for each channel
            in turn, 2 * C numbers. Decoded images are then float32: this range mapped to [0, 1] and clipped, 8-bit
            files divided by 255. None: images are uint8, 16-bit PNG is shifted right by 8, the others are refused.
        channels_first: ``.npy`` files are (C, height, width).
        max_bad_fraction: the share of bad images from which on the data set is refused.
        max_pixels: the largest height x width; more is taken for a decompression bomb.
        window: shards whose images are shuffled together; 0: all. None: 0 up to 4,096 shards, else 256.
        index: where the index is, or is to be kept: an existing one is trusted, and nothing is listed. None: in
            ``.fastmae`` in the images' folder, or beside a folder of class folders, else in ``~/.cache/fastmae``, and
            built again if the data have changed.
        cache_dir: keep the index here instead of those two.

    Raises:
        ValueError: an argument out of range.
        DataError: no such path, nothing usable in it, or too much that is not; ``index`` cannot be written or read.
    """
    accepts = Accepts(channels, value_range, max_pixels, channels_first)
    if path is None:
        if channels != 3:
            raise DataError(f"channels: the embedded photographs have 3, got {channels}")
        if window:
            raise ValueError(f"window: expected 0, because the embedded photographs are not shards, got {window}")
        return open_photographs()
    source = find_records(path)
    path = Path(path).expanduser() if source is None else source.root
    home = index.expanduser() if index else None
    try:
        is_there = source is not None or as_url(path) or path.exists()
        opened = trusted_index(home, path, accepts) if home and is_there else None
        if source is None and (opened is None or is_parquet(opened.shards)):
            source = source_at(path)
        opened = opened or publish_index(source, path, accepts, home=home, cache_dir=cache_dir)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    root, storage = root_of(path), None
    name = path.resolve().name if root == path else path.stem
    if isinstance(source, RecordSource):
        root, storage = path, source.storage(len(opened.table))
        window = source.window if window is None else window
    dataset = Dataset(opened, root, name, accepts, max_bad_fraction, window=window, storage=storage)
    if len(opened.bad) == len(dataset):
        reasons = "".join(f"\n  {printable(bad.path)}: {bad.reason}" for bad in dataset.bad[:5])
        found = f"only {len(opened.bad)} unusable files, among them:{reasons}" if reasons else "no image at all"
        raise DataError(f"{path}: expected {EXPECTED}; found {found}")
    dataset.check_bad_fraction()
    dataset.log_bad()
    if value_range is None and opened.modes & {"I", "I;16", *COLOR_16}:
        logger.warning(
            "%s: has 16-bit PNG files, of which only the upper 8 bits are used. Grey ones keep all of them with "
            "--data.value-range LOW HIGH (fastmae data stats suggests one); convert colour ones to TIFF",
            path,
        )
    return dataset


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed; does not import it, which takes seconds."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def choose_loader(dataset: Dataset, loader: LoaderKind = "auto") -> Literal["dali", "torch"]:
    """What ``loader`` means on this machine: ``"auto"`` is DALI where it is installed, for JPEG, PNG and WebP of the
    user's own; the embedded photographs are decoded once and kept, where DALI has nothing to win.

    Raises:
        DataError: DALI is asked for by name and is not installed, or does not read such images.
    """
    if loader not in ("auto", "dali", "torch"):
        raise ValueError(f"loader: expected 'auto', 'dali' or 'torch', got {loader!r}")
    arrays = sorted(format_.name for format_ in dataset.formats - _DALI_FORMATS)
    refused = (
        (dataset.channels != 3 and f"is opened for {dataset.channels} channels")
        or (dataset.value_range is not None and f"is opened with a range of values, {dataset.value_range}")
        or (arrays and f"has {' and '.join(arrays)} files")
    )
    if loader == "auto":
        return "dali" if has_dali() and not dataset.embedded and not refused else "torch"
    if loader == "dali" and refused:
        raise DataError(f"the DALI loader reads 8-bit RGB from JPEG, PNG and WebP; {dataset.root} {refused}: use torch")
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
    img_size: ImgSize,
    seed: int,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    augment: Augment | None = None,
    num_threads: int | None = None,
    prefetch: int | None = None,
    timeout: float = 600.0,
    known_bad: Iterable[LateBad] = (),
    limit_bad: bool = True,
    samples_per_step: int | None = None,
    hw_decoder_load: float = 0.65,
    cache_bytes: int = 256 << 20,
) -> Loader:
    """An endless iterator of ``Batch``, made ahead in background threads.

    Args:
        dataset: from ``open_dataset``.
        loader: ``"dali"``, ``"torch"``, or ``"auto"`` (see ``choose_loader``).
        batch_size: samples per batch, on this rank; with ``samples_per_step``, at most.
        img_size: height and width of the crops, or a function that gives them for an epoch; a step that straddles
            epochs has the size of the one in which it begins.
        seed: of order, crops and flips; in [0, 2**63).
        position: samples that all ranks together have consumed, whole steps; a run resumed from here gets the very
            batches that it would have got.
        rank, world_size: which slice of each global batch is this one's.
        device: where batches are handed out.
        augment: crop, flips and colours; None for ``Augment()``.
        num_threads: decoding threads; None for one per core, at most 16 (half the cores where ``device`` is the CPU).
        prefetch: most finished batches that wait; None for 2.
        timeout: seconds without a batch after which ``next`` raises.
        known_bad: ``Loader.late_bad`` of the run that is resumed.
        limit_bad: raise once more files are bad than ``max_bad_fraction`` allows, ``known_bad`` included. False where
            the caller judges what several ranks have found.
        samples_per_step: samples of an optimiser step on all ranks, which divide them into batches that differ by at
            most one sample (:func:`fastmae.data.sampler.micro_batches`). None: ``batch_size * world_size``.
        hw_decoder_load: with DALI on a GPU that has a hardware JPEG decoder, its share of the files.
        cache_bytes: the torch loader decodes each image once and keeps it, if all of them together take no more.

    Raises:
        ValueError: an argument out of range.
        DataError: DALI is asked for by name and is not installed.
    """
    samples_per_step = batch_size * world_size if samples_per_step is None else samples_per_step
    for name, good, expected, got in (
        ("batch_size", batch_size >= 1, "at least 1", batch_size),
        ("world_size", world_size >= 1, "at least 1", world_size),
        ("samples_per_step", samples_per_step >= 1, "at least 1", samples_per_step),
        ("img_size", callable(img_size) or min(img_size) >= 1, "at least 1", img_size),
        ("position", position >= 0, "at least 0", position),
        ("rank", 0 <= rank < world_size, f"a number from 0 to world_size - 1 = {world_size - 1}", rank),
        ("timeout", timeout > 0, "seconds above 0", timeout),
        ("hw_decoder_load", 0 <= hw_decoder_load <= 1, "a share from 0 to 1", hw_decoder_load),
    ):
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {got}")
    if not micro_batches(samples_per_step, batch_size, rank=world_size - 1, world_size=world_size)[-1]:
        raise ValueError(
            f"samples_per_step: expected at least one for each batch of {world_size} ranks, got {samples_per_step} "
            f"with batches of {batch_size}"
        )
    split_seed(seed)
    device, augment = torch.device(device), augment or Augment()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if augment.color_jitter and dataset.channels != 3:
        raise ValueError(f"color_jitter: hue and saturation need 3 channels, got {dataset.channels}")
    if augment.color_jitter and dataset.value_range is not None:
        raise ValueError("color_jitter: expected 8-bit images, got a value range, with which they are floats")
    kind = choose_loader(dataset, loader)
    img_size = img_size if callable(img_size) else tuple(img_size)
    order = batch_size, img_size, seed, position, rank, world_size
    planner = Planner(dataset, *order, augment, samples_per_step)
    batch_bytes = batch_size * math.prod(planner.size(0)) * dataset.channels * dataset.dtype.itemsize
    machine = choose_options(device, batch_bytes, world_size=world_size, num_threads=num_threads, prefetch=prefetch)
    if kind == "dali":
        from fastmae.data.dali import DaliDecoder

        special = {"device": device, "hw_decoder_load": hw_decoder_load}
        decoder = DaliDecoder(planner, machine.num_threads, known_bad, limit_bad=limit_bad, **special)
    else:
        decoder = HostDecoder(planner, machine.num_threads, known_bad, limit_bad=limit_bad, cache_bytes=cache_bytes)
    return Loader(planner, decoder, device=device, options=machine, timeout=timeout)


def fixed_crops(
    dataset: Dataset, img_size: tuple[int, int], *, seed: int, epoch: int, count: int, augment: Augment | None = None
) -> Tensor:
    """The first crops of an epoch as a loader with this seed gives them: always the same ones.

    Args:
        dataset: where from.
        img_size: height and width.
        seed: another one than training's gives crops that training has not seen.
        epoch: where to begin.
        count: n; beyond the data set's size they go on into the next epoch.
        augment: crop, flips and colours; None for ``Augment()``.

    Returns:
        (n, C, height, width) of the data set's dtype, a channels-last view. Files that do not decode are replaced as in
        training.

    Raises:
        DataError: a file cannot be read; or more do not decode than the data set's ``max_bad_fraction`` allows.
    """
    options = {"img_size": img_size, "seed": seed, "augment": augment, "loader": "torch"}
    with create_loader(dataset, batch_size=count, position=epoch * len(dataset), **options) as loader:
        return loader.produce(0).images
