"""Describe a data set, and decode all of it once.

Statistics weigh every image the same, however large it is, because training resizes crops of all images to one size.
ImageNet's usual standard deviation (0.229, 0.224, 0.225) is the mean over images of each image's own
(github.com/pytorch/vision/pull/1965). That of all pixels, which gives the model's input unit variance, also counts how
images differ in brightness, and is about a fifth larger. Both are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastmae.data.dataset import Dataset, upright_shapes
from fastmae.data.decode import UndecodableImage, stored_values
from fastmae.data.formats import MODES, Format
from fastmae.data.processes import available_cores
from fastmae.data.sampler import permuted_ids
from fastmae.data.threads import in_order

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SCANNED_ROWS, _MAX_ROWS = 1 << 16, 1 << 20
_PER_THREAD = 16
_PIXELS_FOR_RANGE, _OUTSIDE_RANGE = 1024, 0.001


class Verdict(NamedTuple):
    """The outcome of decoding an image in full.

    ``reason`` says why it cannot be trained on. ``warning`` is the decoder's, of damage that it worked around, after
    which part of the pixels may be grey or shifted.
    """

    sample_id: int
    reason: str | None
    warning: str | None = None


def verify_images(
    dataset: Dataset,
    *,
    start: int = 0,
    num_threads: int | None = None,
    take_warnings: Callable[[], Sequence[str]] = list,
) -> Iterator[Verdict]:
    """Decode images in full, as the torch loader does, and compare their shapes with their headers.

    Nothing is stored: pass the reasons to ``Dataset.mark_bad``. Images that are known to be bad are skipped.

    Args:
        start: id of the first image.
        num_threads: decoding threads, each of which holds one image; None for one per core.
        take_warnings: returns the decoders' warnings since the last call. A JPEG that lacks data in the middle decodes,
            and libjpeg says so on stderr without naming the file, so images among which there was a warning are decoded
            again one by one. By default warnings go unnoticed.

    Yields:
        A verdict per image, in order.

    Raises:
        DataError: a file cannot be read, even after retries.
    """

    def verify(sample_id: int) -> Verdict:
        try:
            shape, expected = dataset.decode(sample_id).shape, (*dataset.shape(sample_id), dataset.channels)
        except UndecodableImage as error:
            return Verdict(sample_id, str(error))
        return Verdict(sample_id, None if shape == expected else f"decodes to {shape}, its header said {expected}")

    num_threads = num_threads or available_cores()
    at_once = _PER_THREAD * num_threads
    take_warnings()
    for first in range(start, len(dataset), at_once):
        ids = np.arange(first, min(first + at_once, len(dataset)))
        some = ids[~dataset.is_bad(ids)].tolist()
        verdicts = list(in_order(verify, some, num_threads))
        if not take_warnings():
            yield from verdicts
            continue
        for sample_id in some:
            verdict, warnings = verify(sample_id), take_warnings()
            yield verdict._replace(warning=warnings[0]) if warnings and verdict.reason is None else verdict


@dataclass(frozen=True)
class Statistics:
    """A data set in numbers. Images that cannot be used are only counted.

    Attributes:
        images: images that can be trained on; ``bytes``: of their files.
        quantiles: height and width (pixels, upright), megapixels and kilobytes at ``QUANTILES``; of a million images
            drawn at random if there are more.
        formats, modes: number of images per format and per mode (``formats.Header.mode``).
        rotated: images that EXIF turns or mirrors; ``labelled``: with a class.
        bad: number of unusable images per reason; numbers within reasons are left out.
        sampled: images decoded for the statistics below.
        mean: per channel, in [0, 1].
        std: per channel, over the pixels of all images.
        std_within: per channel, mean over images of the standard deviation within an image.
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
    progress: Callable[[int], None] = lambda images: None,
) -> Statistics:
    """Describe a data set.

    Args:
        sample: number of images to decode, drawn without repetition by ``seed``; 0 for none.
        num_threads: decoding threads; None for one per core.
        progress: called from this thread with the number of images decoded since the last call.

    Raises:
        ValueError: ``sample`` is negative.
        DataError: a file cannot be read.
    """
    if sample < 0:
        raise ValueError(f"sample: expected at least 0, got {sample}")
    total, rotated, labelled, formats, modes = 0, 0, 0, Counter(), Counter()
    for start in range(0, len(dataset), _SCANNED_ROWS):
        rows = dataset.rows(np.arange(start, min(start + _SCANNED_ROWS, len(dataset))))
        rows = rows[rows["bad"] == 0]
        total += int(rows["size"].sum())
        formats.update(rows["format"].tolist())
        modes.update(rows["mode"].tolist())
        rotated += int((rows["orientation"] != 1).sum())
        labelled += int((rows["label"] >= 0).sum())

    def moments(sample_id: int) -> np.ndarray | str:
        try:
            return _image_moments(dataset.decode(sample_id))
        except UndecodableImage as error:
            return str(error)

    found, reasons = [], list(dataset.index.bad.values())
    for result in in_order(moments, _drawn(dataset, sample, seed).tolist(), num_threads or available_cores()):
        (reasons if isinstance(result, str) else found).append(result)
        progress(1)
    mean = std = within = np.empty(0)
    if found:
        means, squares = np.stack(found, 1)
        mean, within = means.mean(0), np.sqrt(np.maximum(squares - means**2, 0)).mean(0)
        std = np.sqrt(np.maximum(squares.mean(0) - mean**2, 0))
    return Statistics(
        images=len(dataset) - len(reasons),
        bytes=total,
        quantiles=_quantiles(dataset, seed),
        formats={Format(number).name: count for number, count in formats.most_common()},
        modes={MODES[number] or "other": count for number, count in modes.most_common()},
        rotated=rotated,
        labelled=labelled,
        bad=dict(Counter(map(_kind, reasons)).most_common()),
        sampled=len(found),
        mean=mean.tolist(),
        std=std.tolist(),
        std_within=within.tolist(),
    )


def suggest_range(
    dataset: Dataset, *, sample: int = 2000, seed: int = 0, num_threads: int | None = None
) -> tuple[float, ...]:
    """A value range per channel for images that are not of 8 bits. It leaves out 0.1 % of the values at each end.

    Each image weighs the same. Values that are not finite do not count. Bounds are rounded outwards to the third digit
    of the range. The data set is opened with any range, which is not used; the other arguments are those of
    :func:`measure`, but at least one image is decoded.

    Returns:
        2 * C numbers, as ``--data.value-range`` takes them; empty if all sampled images are of 8 bits or do not decode.
    """
    accepts = dataset.accepts

    def drawn(sample_id: int) -> np.ndarray | None:
        options = accepts.channels, accepts.value_range, accepts.channels_first
        try:
            values = stored_values(dataset.read(sample_id), *options).reshape(-1, dataset.channels)
        except Exception:  # decoders raise anything at damaged bytes, and measure reports it
            return None
        if values.dtype in (np.bool_, np.uint8):
            return None
        chosen = np.random.default_rng((seed, sample_id)).integers(len(values), size=_PIXELS_FOR_RANGE)
        return values[chosen].astype(np.float64)

    ids = _drawn(dataset, max(sample, 1), seed).tolist()
    found = [part for part in in_order(drawn, ids, num_threads or available_cores()) if part is not None]
    return tuple(bound for values in np.concatenate(found).T for bound in _bounds(values)) if found else ()


def _bounds(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (_OUTSIDE_RANGE, 1 - _OUTSIDE_RANGE)) if len(values) else (0.0, 1.0)
    if not low < high:
        return float(low), float(low + 1)
    step = 10.0 ** (np.floor(np.log10(high - low)) - 2)
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def _kind(reason: str) -> str:
    kind, _, detail = reason.partition(":")
    return kind if any(character.isdigit() for character in detail) else reason


def _drawn(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    """Good images drawn at random, without repetition: int64 (at most ``count``,)."""
    ids, _ = permuted_ids(np.arange(min(len(dataset), count + len(dataset.bad_ids))), len(dataset), seed)
    return ids[~dataset.is_bad(ids)][:count]


def _quantiles(dataset: Dataset, seed: int) -> dict[str, list[float]]:
    rows = dataset.rows(np.sort(_drawn(dataset, _MAX_ROWS, seed)))
    heights, widths = upright_shapes(rows)
    values = {"height": heights, "width": widths, "megapixels": heights * widths / 1e6, "kilobytes": rows["size"] / 1e3}
    return {name: np.quantile(value, QUANTILES).tolist() for name, value in values.items()}


def _image_moments(pixels: np.ndarray) -> np.ndarray:
    """Mean and mean square of an image's channels: float64 (2, C), of pixels in [0, 1]."""
    kind, white = (np.uint64, 255.0) if pixels.dtype == np.uint8 else (np.float64, 1.0)
    # By columns first, which is three times as fast as all at once.
    sums = np.einsum("hwc->wc", pixels, dtype=kind), np.einsum("hwc,hwc->wc", pixels, pixels, dtype=kind)
    return np.stack(sums).sum(1) / pixels[..., 0].size / np.array([[white], [white**2]])
