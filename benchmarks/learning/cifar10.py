"""The smallest experiment that shows learning: CIFAR-10, 0.9 million weights, minutes of pretraining on one CPU core.

    python benchmarks/learning/cifar10.py FOLDER

FOLDER holds ``train/`` and ``test/``, each with a folder of images per class. Each seed draws weights, masks, crops and
which 50 images per class have labels; the 2,000 test images are always the same. Features are compared by two protocols
of ``fastmae evaluate``: the pretrained encoder's, the same encoder's before its training and after training on shuffled
pixels, where there is nothing to learn but colours, and two that need no encoder. The lines of ``results.csv`` for this
experiment are replaced, and ``cifar10.json`` gets the values of each seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from leaderboard import HERE, replace_rows, shuffle, summarize
from PIL import Image

import fastmae
from fastmae.environment import cpu_model
from fastmae.evaluate.frozen import Split
from fastmae.evaluate.knn import evaluate_knn
from fastmae.evaluate.linear import evaluate_logistic

CLASSES, PER_CLASS, TESTS_PER_CLASS = 10, 50, 200
MODEL = {
    "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_embed_dim": 64,
    "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": True,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip
TRAINING = {
    "global_batch_size": 64, "batch_size": 64, "base_lr": 6e-3, "scale": (0.5, 1.0),
    "precision": "fp32", "device": "cpu", "train_num_threads": 1, "data_num_threads": 1,
}  # fmt: skip
STEPS = 830
"""1.06 epochs, a tenth of them warm-up. The base rate is for a batch of 256: the peak is 1.5e-3."""
PROTOCOLS = {"linear": evaluate_logistic, "knn": evaluate_knn}


def draw(folder: Path, per_class: int, seed: int | None) -> list[Path]:
    """Images of each class, drawn by a seed, or evenly spread without one."""
    drawn = []
    for name in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        paths = sorted(name.iterdir())
        per_class = min(per_class, len(paths))
        rows = np.arange(per_class) * len(paths) // per_class
        if seed is not None:
            rows = np.sort(np.random.default_rng(seed).permutation(len(paths))[:per_class])
        drawn += [paths[row] for row in rows]
    return drawn


def encoded(model: torch.nn.Module, paths: list[Path], scratch: Path) -> np.ndarray:
    """The mean of the patch tokens of each image, (n, D)."""
    listed = scratch / "images.txt"
    listed.write_text("".join(f"{path.resolve()}\n" for path in paths))
    found = fastmae.extract_features(model, listed, crop_ratio=1, batch_size=100)
    assert found.paths == [str(path.resolve()) for path in paths]
    return found.features


def each(paths: list[Path], function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A function of the pixels, in [0, 1], of each image."""
    return np.stack([function(np.asarray(Image.open(path).convert("RGB"), np.float32) / 255) for path in paths])


def small_pixels(image: np.ndarray) -> np.ndarray:
    """The image at 8 x 8 pixels."""
    return image.reshape(8, 4, 8, 4, 3).mean((1, 3)).ravel()


def colour_statistics(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each channel."""
    return np.concatenate([image.mean((0, 1)), image.std((0, 1))])


def run(folder: Path, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Accuracies by features and protocol, and what the pretraining took."""
    known, tests = draw(folder / "train", PER_CLASS, seed), draw(folder / "test", TESTS_PER_CLASS, None)
    begun = time.monotonic(), time.process_time()
    with TemporaryDirectory() as name:
        scratch = Path(name)
        options = MODEL | TRAINING | {"steps": steps, "warmup_steps": steps // 10, "train_seed": seed}
        trained = fastmae.pretrain("small-data", folder / "train", scratch / "run", **options).model()
        costs = {"seconds": time.monotonic() - begun[0], "cpu_seconds": time.process_time() - begun[1]}
        images = (np.asarray(Image.open(path).convert("RGB")) for path in draw(folder / "train", 10**9, None))
        control = fastmae.pretrain("small-data", shuffle(images), scratch / "control", **options).model()
        fresh = fastmae.create_model("mae_vit_tiny_patch16", **MODEL, seed=seed)
        features = {
            "pretrained": lambda paths: encoded(trained, paths, scratch),
            "pretrained on shuffled pixels": lambda paths: encoded(control, paths, scratch),
            "random weights": lambda paths: encoded(fresh, paths, scratch),
            "8 x 8 pixels": lambda paths: each(paths, small_pixels),
            "colour statistics": lambda paths: each(paths, colour_statistics),
        }
        found = {name: (torch.from_numpy(of(known)), torch.from_numpy(of(tests))) for name, of in features.items()}
    labels, test_labels = (torch.arange(CLASSES).repeat_interleave(n) for n in (PER_CLASS, TESTS_PER_CLASS))
    accuracies = {}
    for name, (inputs, test_inputs) in found.items():
        split = Split(inputs, labels, test_inputs, test_labels, CLASSES)
        accuracies[name] = {protocol: of(split, seed=seed)["top1"] for protocol, of in PROTOCOLS.items()}
    return accuracies | {"pretraining": costs}


def lines(results: list[dict], steps: int, command: str) -> list[dict[str, object]]:
    """The lines of ``results.csv``."""
    images = steps * TRAINING["global_batch_size"]
    about = {
        "data": "CIFAR-10, 50 labels per class",
        "model": "128 wide, 4 deep, patch 4",
        "hardware": f"one thread of {cpu_model()}",
    }
    return summarize(results, about | {"command": command, "log": "cifar10.json"}, images, images / 50_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.csv and cifar10.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in range(args.seeds):
        results.append(run(args.folder, seed, args.steps))
        print(f"seed {seed}: {json.dumps(results[-1])}", flush=True)
    (args.out / "cifar10.json").write_text(json.dumps(results, indent=1) + "\n")
    given = [f"--{n} {getattr(args, n)}" for n in ("seeds", "steps") if getattr(args, n) != parser.get_default(n)]
    command = " ".join(["python benchmarks/learning/cifar10.py FOLDER", *given])
    replace_rows(lines(results, args.steps, command), "cifar10.json", args.out / "results.csv")


if __name__ == "__main__":
    main()
