"""Learning without a download: scikit-learn's digits, 8 x 8 pixels, about a minute per seed on one CPU core.

    python benchmarks/learning/digits.py

10 labels per class, several draws of them per seed; means of patch tokens are judged on images that were not used to
choose the setting. ``tests/evaluate/test_digits.py`` asserts the margin of a shorter run over random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from leaderboard import HERE, replace_rows, shuffle, summarize
from sklearn.datasets import load_digits

import fastmae
from fastmae.environment import cpu_model
from fastmae.evaluate.frozen import Split
from fastmae.evaluate.knn import evaluate_knn
from fastmae.evaluate.linear import evaluate_logistic

DRAWS, PER_CLASS, STEPS = 8, 10, 800
KNOWN, TESTS = slice(0, 1000), slice(1400, 1797)
"""The 400 images between them were used to choose the setting."""
MODEL = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4,
    "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2, "mean": (0.305,), "std": (0.376,),
}  # fmt: skip
TRAINING = {
    "mask_ratio": 0.5, "norm_pix_loss": False, "global_batch_size": 64, "batch_size": 64, "base_lr": 1.2e-2,
    "crop": "center", "hflip": 0.0, "precision": "fp32", "device": "cpu", "train_num_threads": 1, "data_num_threads": 1,
}  # fmt: skip
"""The base rate is for a batch of 256: the peak is 3e-3."""


def run(images: np.ndarray, labels: torch.Tensor, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Accuracies by features and protocol, means over the draws, and what the pretraining took."""
    begun = time.monotonic(), time.process_time()
    with TemporaryDirectory() as folder:
        options = MODEL | TRAINING | {"steps": steps, "warmup_steps": steps // 20, "train_seed": seed}
        known = list(images[KNOWN])
        trained = fastmae.pretrain("small-data", known, f"{folder}/run", **options).model()
        costs = {"seconds": time.monotonic() - begun[0], "cpu_seconds": time.process_time() - begun[1]}
        control = fastmae.pretrain("small-data", shuffle(known), f"{folder}/control", **options).model()
    fresh = fastmae.create_model("mae_vit_tiny_patch16", **MODEL, seed=seed)
    models = {"pretrained": trained, "pretrained on shuffled pixels": control, "random weights": fresh}
    found = {name: fastmae.extract_features(m, list(images), crop_ratio=1).features for name, m in models.items()}
    found["pixels"] = images.reshape(len(images), -1).astype(np.float32)
    accuracies = {}
    for name, features in found.items():
        features = torch.from_numpy(features)
        features = (features - features[KNOWN].mean(0)) / features[KNOWN].std(0).clamp_min(1e-6)
        each = [judge(features, labels, 100 * seed + draw) for draw in range(DRAWS)]
        accuracies[name] = {protocol: mean(one[protocol] for one in each) for protocol in each[0]}
    return accuracies | {"pretraining": costs}


def judge(features: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, float]:
    """Accuracies on the test images, learned from a draw of labels."""
    order = torch.randperm(KNOWN.stop, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[labels[order] == digit][:PER_CLASS] for digit in range(10)])
    split = Split(features[rows], labels[rows], features[TESTS], labels[TESTS], 10)
    found = {"linear": evaluate_logistic(split, l2=0.1), "knn": evaluate_knn(split, k=5, temperature=0.07)}
    return {protocol: result["top1"] for protocol, result in found.items()}


def main() -> None:
    """Run all seeds, and replace the lines of ``results.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.csv and digits.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pixels, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)[order]
    labels = torch.from_numpy(targets).long()[order]
    results = []
    for seed in range(args.seeds):
        results.append(run(images, labels, seed, args.steps))
        print(f"seed {seed}: {json.dumps(results[-1])}", flush=True)
    (args.out / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    given = [f"--{n} {getattr(args, n)}" for n in ("seeds", "steps") if getattr(args, n) != parser.get_default(n)]
    about = {
        "data": "scikit-learn's digits, 10 labels per class",
        "model": "64 wide, 3 deep, patch 2",
        "hardware": f"one thread of {cpu_model()}",
        "command": " ".join(["python benchmarks/learning/digits.py", *given]),
        "log": "digits.json",
    }
    images_seen = TRAINING["global_batch_size"] * args.steps
    rows = summarize(results, about, images_seen, images_seen / KNOWN.stop)
    replace_rows(rows, "digits.json", args.out / "results.csv")


if __name__ == "__main__":
    main()
