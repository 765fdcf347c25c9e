"""The trainer, from JPEGs on a disk, against the model alone: ``fastmae bench``, and what the targets say to that.

    python -m benchmarks.end_to_end OUT.json --recipe imagenet-vit-l --batch 256 [--images FOLDER] [flags of the bench]

Without --images a few thousand JPEGs of ImageNet's usual size, 500 x 375, are cut from the embedded photographs, so
that nothing has to be fetched. They are read through the page cache: the disk itself is not measured. The JSON is that
of ``fastmae bench --json`` with the targets added. A target that is missed is no failure: it is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from fastmae.cli import main as fastmae
from fastmae.data import fixed_crops, open_dataset

KEPT = 0.95
"""End to end, at least this share of the model alone."""
MFU = {"imagenet-vit-l": 0.50, "imagenet-vit-h": 0.55}
"""Of the model alone, at least this share of a large matrix product's rate."""

_SIZE, _QUALITY, _CHUNK = (375, 500), 97, 128


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of different crops of the embedded photographs, with little loss, as ImageNet's are."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = open_dataset(None)

    def write(index: int, pixels) -> None:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index:05}.jpg", quality=_QUALITY)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, _CHUNK):
            number = min(_CHUNK, count - start)
            crops = fixed_crops(photographs, _SIZE, seed=0, epoch=start, count=number)
            list(pool.map(write, range(start, start + number), crops))


def targets(found: dict, recipe: str) -> list[dict]:
    """What was wanted and what was found, for a ``fastmae bench`` of one of the paper's models on a GPU."""
    wanted = [("both / model, images a second", KEPT, found["both"]["images_per_second"] / _rate(found))]
    if recipe in MFU:
        wanted.append(("MFU, model alone", MFU[recipe], found["model"]["mfu"]))
    return [{"what": what, "target": goal, "found": value, "reached": value >= goal} for what, goal, value in wanted]


def _rate(found: dict) -> float:
    return found["model"]["images_per_second"]


def measure(argv: list[str]) -> dict:
    """What ``fastmae bench`` finds, with the targets. Raises ``RuntimeError`` where the bench fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="imagenet-vit-l")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=Path, help="a folder of images (default: cut from photographs)")
    parser.add_argument("--count", type=int, default=4096, help="images to cut")
    arguments, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, out = arguments.images or Path(name) / "images", Path(name) / "found.json"
        if arguments.images is None:
            begun = time.monotonic()
            write_photographs(folder, arguments.count)
            print(f"{arguments.count:,} JPEGs written in {time.monotonic() - begun:.1f} s", flush=True)
        batch = [f"--train.{which}={arguments.batch}" for which in ("global-batch-size", "batch-size")]
        command = ["bench", "--recipe", arguments.recipe, "--data.path", str(folder), *batch, *flags]
        if code := fastmae([*command, "--json", str(out)]):
            raise RuntimeError(f"fastmae {' '.join(command)}: exit code {code}")
        # Where the images lay for the moment means nothing to a reader of the results.
        text = out.read_text()
        found = json.loads(text if arguments.images else text.replace(str(folder), f"{arguments.count} JPEGs"))
    found["targets"] = targets(found, arguments.recipe)
    for one in found["targets"]:
        verdict = "reached" if one["reached"] else "missed"
        print(f"{verdict}: {one['what']}: {one['found']:.3f}, at least {one['target']:.2f} is wanted")
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(sys.argv[2:]), indent=1) + "\n")
