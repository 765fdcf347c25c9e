"""An experiment that does not show learning: scikit-learn's digits, 8 x 8 pixels, in less than a minute.

    python benchmarks/learning/digits.py

10 labels per class, several draws of them per seed. Of about twenty settings that were tried, this one (patches of
2 x 2, half of them masked, plain pixels, 40 steps) gave the widest margin over random weights, on images that are not
used here. Most of the margin is also there after pretraining on images whose pixels are shuffled, so it says little
about digits.
"""

from __future__ import annotations

import json
import time
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

SEEDS, DRAWS, PER_CLASS, STEPS = 5, 8, 10, 40
KNOWN, TESTS = slice(0, 1000), slice(1400, 1797)
"""The 400 images between them were used to choose the setting."""
MODEL = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 128, "depth": 4, "num_heads": 4,
    "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2, "mean": (0.305,), "std": (0.376,),
}  # fmt: skip
TRAINING = {
    "mask_ratio": 0.5, "norm_pix_loss": False, "steps": STEPS, "warmup_steps": 4, "global_batch_size": 64,
    "batch_size": 64, "base_lr": 6e-3, "crop": "center", "hflip": 0.0, "precision": "fp32", "device": "cpu",
    "train_num_threads": 1, "data_num_threads": 1,
}  # fmt: skip


def run(images: np.ndarray, labels: torch.Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies by features and protocol, means over the draws, and what the pretraining took."""
    begun = time.monotonic(), time.process_time()
    with TemporaryDirectory() as folder:
        options = MODEL | TRAINING | {"train_seed": seed}
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
    torch.set_num_threads(1)
    pixels, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)[order]
    results = [run(images, torch.from_numpy(targets).long()[order], seed) for seed in range(SEEDS)]
    (HERE / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    about = {"data": "scikit-learn's digits, 10 labels per class", "model": "128 wide, 4 deep, patch 2"}
    about |= {
        "hardware": f"one thread of {cpu_model()}",
        "command": "python benchmarks/learning/digits.py",
        "log": "digits.json",
    }
    replace_rows(summarize(results, about, 64 * STEPS, 64 * STEPS / KNOWN.stop), "digits.json")


if __name__ == "__main__":
    main()
