"""Decoding every image in full, to find before training what an index cannot see: damage behind the header."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from fastmae.data.dataset import Dataset
from fastmae.data.decode import UndecodableImage
from fastmae.data.options import available_cores
from fastmae.data.parts import in_order

_SCANNED = 65536
_CHUNK = 16


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
