"""What packing photographs at a shorter side costs and saves: bytes, and how much a training crop differs.

For every image whose short side is longer than asked for: the image is shrunk, stored as JPEG at several qualities, and
a random crop (as in training) is taken from it and from the original, both resized to 224 x 224.

    python benchmarks/measure_shards.py IMAGES --out benchmarks/results/counted/shards.json
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.data import Augment, crop_boxes, open_dataset
from fastmae.data.decode import resize_crop_into

STORED = {
    "uncompressed": None,
    "75": {"quality": 75, "subsampling": "4:2:0"},
    "85": {"quality": 85, "subsampling": "4:2:0"},
    "90": {"quality": 90, "subsampling": "4:2:0"},
    "95": {"quality": 95, "subsampling": "4:2:0"},
    "90, full chroma": {"quality": 90, "subsampling": "4:4:4"},
}
SIZE = 224


def crop(pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    resize_crop_into(out, pixels, box)
    return out.astype(np.int64)


def compare(folder: Path, short_side: int, count: int) -> Iterator[tuple[str, int, int, float]]:
    """For each image and each way to store it: way, bytes, bytes of the original, mean absolute difference."""
    dataset = open_dataset(folder)
    ids = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
    heights, widths = dataset.shapes(ids)
    boxes = crop_boxes(ids, np.zeros_like(ids), heights, widths, seed=0, augment=Augment())
    sources = dataset.rows(ids)["size"].tolist()
    for i, height, width, box, source in zip(ids.tolist(), heights, widths, boxes, sources, strict=True):
        if min(height, width) <= short_side:
            continue
        scale = short_side / min(height, width)
        shape = round(height * scale), round(width * scale)
        ratio = np.array([shape[0] / height, shape[1] / width] * 2)
        small_box = np.maximum(np.rint(box * ratio).astype(int), [0, 0, 1, 1])
        small_box[2:] = np.minimum(small_box[2:], shape - small_box[:2])
        # The very region of the original that the small box stands for.
        large_box = np.rint(small_box / ratio).astype(int)
        large_box[2:] = np.minimum(large_box[2:], [height - large_box[0], width - large_box[1]])
        pixels = np.ascontiguousarray(dataset.decode(i))
        expected = crop(pixels, large_box)
        small = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0)
        for name, options in STORED.items():
            buffer = io.BytesIO()
            if options is not None:
                small.save(buffer, "JPEG", **options)
            stored = np.asarray(small if options is None else Image.open(buffer))
            yield name, buffer.tell(), source, float(np.abs(crop(stored, small_box) - expected).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[int, int, float]]] = {name: [] for name in STORED}
    for name, *values in compare(arguments.images, arguments.short_side, arguments.count):
        rows[name].append(tuple(values))
    result = {"short_side": arguments.short_side, "images": len(rows["90"]), "stored": {}}
    for name, values in rows.items():
        size, source, difference = np.array(values).T
        result["stored"][name] = {"share": size.sum() / source.sum(), "difference": difference.mean()}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
