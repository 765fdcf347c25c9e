"""Heights and widths read from headers are Pillow's, and damaged headers have none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastmae.data.stored_size import stored_size

KINDS = {
    "jpeg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "with-profile": {"format": "JPEG", "icc_profile": bytes(150_000)},
    "with-exif": {"format": "JPEG", "exif": True},
    "png": {"format": "PNG"},
    "lossy-webp": {"format": "WEBP", "quality": 50},
    "lossless-webp": {"format": "WEBP", "lossless": True},
    "extended-webp": {"format": "WEBP", "icc_profile": b"profile"},
}


def encode(kind: str, height: int, width: int) -> np.ndarray:
    options = dict(KINDS[kind])
    if options.get("exif"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_file_was_made_with_and_damage_never_raises(kind):
    for size in [(1, 300), (257, 3), (40, 60)]:
        assert stored_size(encode(kind, *size)) == size
    encoded = encode(kind, 40, 60)
    for damaged in (encoded[:0], encoded[:1], encoded[:3], encoded[:13], np.zeros_like(encoded), encoded[1:]):
        assert stored_size(damaged) is None
    erased = encoded.copy()
    erased[2:30] = 0
    assert stored_size(erased) != (40, 60)
    generator = np.random.default_rng(1)
    for _ in range(50):
        stored_size(generator.permutation(encoded[:200]))
        changed = encoded[: int(generator.integers(1, len(encoded)))].copy()
        changed[generator.integers(0, len(changed), 20)] = generator.integers(0, 256, 20)
        stored_size(changed)


def test_a_frame_without_an_end_to_the_segments_before_it():
    assert stored_size(np.frombuffer(b"\xff\xd8\xff\xe0\xff\xff" + bytes(64), np.uint8)) is None
    assert stored_size(np.frombuffer(b"\xff\xd8" + b"\xff" * 64, np.uint8)) is None
