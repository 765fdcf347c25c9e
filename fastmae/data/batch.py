"""What a loader hands out, and what it says when it cannot."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One rank's part of a global batch, on the loader's device.

    Attributes:
        images: uint8, or float32 in [0, 1] of data with a ``value_range``; logically (N, C, H, W), memory is
            (N, H, W, C), so this is a channels-last view.
        sample_ids: int64 (N,), the samples' positions in the index. A sample that replaces an undecodable one goes
            under the id of the one it replaces, so that keys for masks do not depend on when a bad file was found.
        epochs: int64 (N,); one batch may hold the end of an epoch and the beginning of the next.
    """

    images: Tensor
    sample_ids: Tensor
    epochs: Tensor


class BadFile(NamedTuple):
    """A file that training leaves out, and why."""

    path: str
    reason: str


class LateBad(NamedTuple):
    """A file that was found not to decode when training came to it.

    Attributes:
        sample_id: its number in the index.
        reason: why it does not decode.
        position: the global position at which it was found.
    """

    sample_id: int
    reason: str
    position: int


class DataError(Exception):
    """A problem with the data that its owner can solve; the message says what came and what was expected."""
