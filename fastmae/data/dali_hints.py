"""How large the images are, for a GPU decoder that allocates its memory once and not whenever a larger image comes."""

from __future__ import annotations

import numpy as np

from fastmae.data.dataset import Dataset

_LOOKED_AT = 4096
_MOST_SIDE = 4096
_DEVICE_PADDING, _HOST_PADDING = 16 << 20, 8 << 20


def decoder_hints(dataset: Dataset, hw_decoder_load: float) -> dict[str, float | int]:
    """Arguments for DALI's ``mixed`` decoder.

    The largest height, width and file among 4,096 images, evenly spread over the index; sides count up to 4,096 pixels,
    for the decoder keeps such a buffer for each thread. Whatever is larger costs an allocation when it comes.

    Args:
        dataset: the images.
        hw_decoder_load: the share of the JPEG files for the hardware decoder, if there is one.
    """
    rows = dataset.rows(np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).astype(np.int64))
    height, width = (min(int(rows[side].max()), _MOST_SIDE) for side in ("height", "width"))
    return {
        "hw_decoder_load": hw_decoder_load,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "device_memory_padding": max(_DEVICE_PADDING, 3 * height * width),
        "host_memory_padding": max(_HOST_PADDING, min(int(rows["size"].max()), 3 * height * width)),
    }
