"""Dense tasks with small encoders on a CPU, pretrained against random weights, by ``examples/dense.py``.

    python benchmarks/learning/dense.py CAMVID PENNFUDAN COCO IMAGES

The first three are what the example takes, IMAGES is a folder of other photographs (1,000 of ImageNet:
github.com/EliSchwartz/imagenet-sample-images). Two encoders are pretrained for all tasks, on IMAGES and the images that
the tasks learn from, in 12 minutes of CPU time each; seeds take them in turn, and draw heads, batches and the random
weights. ``dense.json`` gets an entry per run, and runs that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from pathlib import Path

import torch
from leaderboard import HERE, ROOT
from PIL import Image

import fastmae

LOG = HERE / "dense.json"
ENCODERS = 2
PRETRAINING = {
    "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_embed_dim": 64,
    "decoder_depth": 1, "decoder_num_heads": 2, "global_batch_size": 64, "base_lr": 8e-3, "warmup_steps": 250,
    "steps": 2500, "precision": "fp32", "device": "cpu", "train_num_threads": 1, "data_num_threads": 1,
}  # fmt: skip
LINEAR = {"head": "linear", "frozen": True, "steps": 300, "lr": 2e-2}
RUNS = [
    ("segmentation", "camvid", LINEAR | {"size": (96, 128)}),
    ("segmentation", "coco", LINEAR | {"size": (96, 96)}),
    ("detection", "pennfudan", {"frozen": True, "side": 96, "steps": 150}),
    ("detection", "coco", {"frozen": True, "side": 96, "steps": 150}),
    ("segmentation", "camvid", {"head": "upernet", "frozen": False, "size": (96, 128), "steps": 150}),
    ("detection", "pennfudan", {"frozen": False, "side": 96, "steps": 150}),
]
"""Task, data and settings. Only the rate of the linear heads was chosen, on CamVid's validation images."""


def gather(example: dict, folders: dict[str, Path], to: Path) -> None:
    """Copies of the images to pretrain on, 160 pixels on the shorter side, which decode faster. No test images."""
    paths = sorted((folders["camvid"] / "train").glob("*.png"))
    paths += [path for path, *_ in example["pedestrians"](folders["pennfudan"], "train")]
    paths += sorted((folders["coco"] / "images" / "train2017").glob("*.jpg"))
    paths += sorted(folders["images"].glob("*.JPEG"))
    to.mkdir(parents=True)
    for i, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        scale = min(1, 160 / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.LANCZOS).save(to / f"{i:04}.jpg", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("camvid", "pennfudan", "coco", "images")
    for name in names:
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/dense"), help="folder of the pretrained encoders")
    args = parser.parse_args()
    folders = {name: getattr(args, name) for name in names}
    torch.set_num_threads(1)
    example = runpy.run_path(str(ROOT / "examples" / "dense.py"))
    if not (args.runs / "images").exists():
        gather(example, folders, args.runs / "images")
    log = json.loads(LOG.read_text())
    for seed in range(args.seeds):
        weights = args.runs / str(seed % ENCODERS)
        if not (weights / "model.safetensors").exists():
            fastmae.pretrain("small-data", args.runs / "images", weights, **PRETRAINING, train_seed=seed % ENCODERS)
        for task, data, options in RUNS:
            for random in (False, True):
                run = {"task": task, "data": data, "random": random, "seed": seed, **options}
                run = json.loads(json.dumps(run))
                if any(run.items() <= entry.items() for entry in log):
                    continue
                begun = time.process_time()
                losses, scores = example[task](folders[data], str(weights), random=random, seed=seed, **options)
                run |= {"first_loss": losses[0], "last_loss": sum(losses[-20:]) / 20, "scores": scores}
                log.append(run | {"cpu_seconds": round(time.process_time() - begun)})
                LOG.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
