"""What is in a data set: sizes, formats and modes by the index, mean and standard deviation by decoding a sample.

Every image has the same weight, however large: training resizes crops of all of them to one size, so that each gives
equally many pixels. ImageNet's usual standard deviation (0.229, 0.224, 0.225) is the mean over images of each image's
own (github.com/pytorch/vision/pull/1965); that of the pixels that a model sees, which makes them unit variance, also
counts how images differ in brightness and is about a fifth larger. Both are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from fastmae.data.dataset import Dataset, upright_shapes
from fastmae.data.decode import UndecodableImage, stored_values
from fastmae.data.formats import MODES, Format
from fastmae.data.loader import available_cores
from fastmae.data.sampler import permuted_ids
from fastmae.data.threads import in_order

_SCANNED = 65536
_CHUNK = 16
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_MAX_ROWS = 1 << 20
_PIXELS_AT_ONCE = 1 << 20
_PIXELS_FOR_RANGE = 1024
"""Drawn from each image."""
_OUTSIDE = 0.001
"""Share of a channel's values that a suggested range leaves out at each end."""


class Verdict(NamedTuple):
    """What decoding an image in full has shown.

    Attributes:
        sample_id: which image.
        size: bytes of the file.
        reason: why it cannot be trained on; None: it can.
        warning: what the decoder said about damage that it got over: part of the pixels may be grey or shifted.
    """

    sample_id: int
    size: int
    reason: str | None
    warning: str | None = None


def good_ids(dataset: Dataset, start: int = 0) -> Iterator[int]:
    """The images from ``start`` on that are not known to be bad, in order."""
    for first in range(start, len(dataset), _SCANNED):
        ids = np.arange(first, min(first + _SCANNED, len(dataset)))
        yield from ids[~dataset.is_bad(ids)].tolist()


def verify_images(
    dataset: Dataset,
    sample_ids: Iterable[int] | None = None,
    *,
    num_threads: int | None = None,
    take_warnings: Callable[[], Sequence[str]] | None = None,
) -> Iterator[Verdict]:
    """Decode images in full, in threads, and compare their shapes with what their headers say.

    Images are decoded as the torch loader does it. Nothing is stored: hand the reasons to ``Dataset.mark_bad``, all at
    once or whenever the iteration ends.

    A JPEG that lacks data in the middle decodes, to whatever comes out: libjpeg says so on stderr alone, and not of
    which file. Given somebody who listens there, images among which there was a warning are decoded again one by one.

    Args:
        dataset: whose images.
        sample_ids: which; None for all that are not known to be bad.
        num_threads: that decode; None for one a core. Each holds one decoded image.
        take_warnings: returns what decoders have said since it was called last; None: warnings go unnoticed.

    Yields:
        A verdict for each image, in the order of ``sample_ids``.

    Raises:
        DataError: a file cannot be read, even after waiting and trying again.
    """

    def verify(sample_id: int) -> Verdict:
        size, reason = int(dataset.rows(np.array([sample_id]))["size"][0]), None
        try:
            shape, expected = dataset.decode(sample_id).shape, (*dataset.shape(sample_id), dataset.channels)
            if shape != expected:
                reason = f"decodes to {shape}, its header said {expected}"
        except UndecodableImage as error:
            reason = str(error)
        return Verdict(sample_id, size, reason)

    num_threads = num_threads or available_cores()
    ids = iter(good_ids(dataset) if sample_ids is None else sample_ids)
    if take_warnings is None:
        yield from in_order(verify, ids, num_threads)
        return
    take_warnings()
    while chunk := list(islice(ids, _CHUNK * num_threads)):
        verdicts = list(in_order(verify, chunk, num_threads))
        if not take_warnings():
            yield from verdicts
            continue
        for verdict in verdicts:
            again, said = verify(verdict.sample_id), take_warnings()
            yield again._replace(warning=said[0] if said and again.reason is None else None)


@dataclass(frozen=True)
class Statistics:
    """A data set in numbers; of images that cannot be used, only their count.

    Attributes:
        images: that can be trained on.
        bytes: of their files.
        quantiles: of height, width (pixels, upright), megapixels and kilobytes, each at ``QUANTILES``; of a million
            images drawn at random if there are more.
        formats, modes: images by format and by mode, as in ``header.Header.mode``.
        rotated: images that EXIF turns or mirrors.
        labelled: images with a class.
        bad: images that cannot be used, by reason; numbers within reasons are left out.
        sampled: images that were decoded for what follows.
        mean: of the channels, in [0, 1], each image weighing the same.
        std: of the channels over the pixels of all images, each image weighing the same.
        std_within: mean over images of the standard deviation within an image.
    """

    images: int
    bytes: int
    quantiles: dict[str, list[float]]
    formats: dict[str, int]
    modes: dict[str, int]
    rotated: int
    labelled: int
    bad: dict[str, int]
    sampled: int
    mean: list[float]
    std: list[float]
    std_within: list[float]


def measure(
    dataset: Dataset,
    *,
    sample: int = 2000,
    seed: int = 0,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Describe a data set.

    Args:
        dataset: of any number of channels.
        sample: images to decode, drawn without repetition; 0 for none.
        seed: of the drawing.
        num_threads: that decode; None for one a core.
        progress: called from this thread with how many more images were decoded.

    Raises:
        ValueError: ``sample`` is negative.
        DataError: a file cannot be read.
    """
    if sample < 0:
        raise ValueError(f"sample: expected at least 0, got {sample}")
    total, formats, modes, rotated, labelled = 0, Counter(), Counter(), 0, 0
    for start in range(0, len(dataset), _SCANNED):
        rows = dataset.rows(np.arange(start, min(start + _SCANNED, len(dataset))))
        rows = rows[rows["bad"] == 0]
        total += int(rows["size"].sum())
        formats.update({Format(number).name: n for number, n in _counts(rows["format"])})
        modes.update({MODES[number] or "other": n for number, n in _counts(rows["mode"])})
        rotated += int((rows["orientation"] != 1).sum())
        labelled += int((rows["label"] >= 0).sum())
    moments, undecodable = _moments(dataset, sample, seed, num_threads or available_cores(), progress)
    mean, std, std_within = _mean_and_std(moments)
    reasons = Counter(_kind(reason) for reason in [*dataset.index.bad.values(), *undecodable])
    return Statistics(
        len(dataset) - len(dataset.index.bad) - len(undecodable),
        total,
        _quantiles(dataset, seed),
        dict(formats.most_common()),
        dict(modes.most_common()),
        rotated,
        labelled,
        dict(reasons.most_common()),
        len(moments),
        mean,
        std,
        std_within,
    )


def suggest_range(
    dataset: Dataset, *, sample: int = 2000, seed: int = 0, num_threads: int | None = None
) -> tuple[float, ...]:
    """A range for each channel, of images that are not of 8 bits: low and high that leave out 0.1 % at each end.

    Each image weighs the same. Values that are not finite do not count; bounds are rounded outwards to the third digit
    of the range.

    Args:
        dataset: opened with any ``value_range``, which is not used.
        sample, seed, num_threads: as for :func:`measure`; at least one image is decoded.

    Returns:
        2 * C numbers, as ``--data.value-range`` takes them; empty if all sampled images are of 8 bits or do not decode.
    """

    def drawn(sample_id: int) -> np.ndarray | None:
        accepts = dataset.accepts
        options = accepts.channels, accepts.value_range, accepts.channels_first
        try:
            values = stored_values(dataset.read(sample_id), *options).reshape(-1, dataset.channels)
        except Exception:  # whatever decoders raise at damaged bytes; measure reports it
            return None
        if values.dtype in (np.bool_, np.uint8):
            return None
        rows = np.random.default_rng((seed, sample_id)).integers(len(values), size=_PIXELS_FOR_RANGE)
        return values[rows].astype(np.float64)

    ids = _drawn(dataset, max(sample, 1), seed).tolist()
    found = [part for part in in_order(drawn, ids, num_threads or available_cores()) if part is not None]
    return tuple(bound for values in np.concatenate(found).T for bound in _bounds(values)) if found else ()


def _bounds(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (_OUTSIDE, 1 - _OUTSIDE)) if len(values) else (0.0, 1.0)
    if not low < high:
        return float(low), float(low + 1)
    step = 10.0 ** (np.floor(np.log10(high - low)) - 2)
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def _counts(values: np.ndarray) -> list[tuple[int, int]]:
    return [(int(value), int(count)) for value, count in zip(*np.unique(values, return_counts=True), strict=True)]


def _kind(reason: str) -> str:
    """A reason without what is special about one file."""
    words = reason.partition(":")
    return words[0] if any(character.isdigit() for character in words[2]) else reason


def _drawn(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    """Good images drawn at random, without repetition: int64 (at most ``count``,)."""
    wanted = min(len(dataset), count + len(dataset.index.bad))
    ids, _ = permuted_ids(np.arange(wanted), len(dataset), seed)
    return ids[~dataset.is_bad(ids)][:count]


def _quantiles(dataset: Dataset, seed: int) -> dict[str, list[float]]:
    rows = dataset.rows(np.sort(_drawn(dataset, _MAX_ROWS, seed)))
    heights, widths = upright_shapes(rows)
    values = {
        "height": heights,
        "width": widths,
        "megapixels": heights * widths / 1e6,
        "kilobytes": rows["size"] / 1e3,
    }
    return {name: np.quantile(value, QUANTILES).tolist() for name, value in values.items()}


def _moments(dataset: Dataset, sample: int, seed: int, num_threads: int, progress) -> tuple[np.ndarray, list[str]]:
    """Each sampled image's mean and mean square, float64 (n, 2, C) in [0, 1], and why others did not decode."""

    def moments(sample_id: int) -> np.ndarray | str:
        try:
            return _image_moments(dataset.decode(sample_id))
        except UndecodableImage as error:
            return str(error)

    found, reasons = [], []
    for result in in_order(moments, _drawn(dataset, sample, seed).tolist(), num_threads):
        (reasons if isinstance(result, str) else found).append(result)
        if progress is not None:
            progress(1)
    return np.array(found).reshape(-1, 2, dataset.channels), reasons


def _image_moments(pixels: np.ndarray) -> np.ndarray:
    """Mean and mean square of an image's channels: float64 (2, C), of pixels in [0, 1]. Exact sums, in pieces."""
    if pixels.dtype != np.uint8:
        return np.stack([pixels.mean((0, 1), np.float64), np.square(pixels, dtype=np.float64).mean((0, 1))])
    height, width, channels = pixels.shape
    sums = np.zeros((2, channels), np.uint64)
    rows_at_once = max(1, min(_PIXELS_AT_ONCE // width, 1 << 16))
    for top in range(0, height, rows_at_once):
        # Rows are added up as they lie in memory, which is fast; 2**16 squares of a byte fit into 32 bits.
        lines = np.ascontiguousarray(pixels[top : top + rows_at_once]).reshape(-1, width * channels)
        for power, values in enumerate((lines, np.square(lines, dtype=np.uint16))):
            sums[power] += values.sum(0, dtype=np.uint32).reshape(width, channels).sum(0, dtype=np.uint64)
    return sums / (height * width) / np.array([[255.0], [255.0**2]])


def _mean_and_std(moments: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    if not len(moments):
        return [], [], []
    means, squares = moments[:, 0], moments[:, 1]
    mean = means.mean(0)
    std = np.sqrt(np.maximum(squares.mean(0) - mean**2, 0))
    within = np.sqrt(np.maximum(squares - means**2, 0)).mean(0)
    return mean.tolist(), std.tolist(), within.tolist()
