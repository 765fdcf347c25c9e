"""Detection and instance masks with a pretrained encoder, on Penn-Fudan: 170 photographs with pedestrians.

    git clone https://github.com/gmguarino/PennFudan
    fastmae pretrain --data.path PennFudan/data/PennFudanPed/PNGImages --out runs/pedestrians
    python examples/detection.py PennFudan/data/PennFudanPed --weights runs/pedestrians

Needs ``pip install "fastmae[dense]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import masks_to_boxes

from fastmae import create_classifier
from fastmae.evaluate.dense import mask_rcnn


def read(folder: Path, name: str, side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image of at most ``side`` pixels, float (3, H, W) in [0, 1], and its pedestrians: boxes, labels and masks."""
    image = Image.open(folder / "PNGImages" / f"{name}.png").convert("RGB")
    numbers = Image.open(folder / "PedMasks" / f"{name}_mask.png")
    image.thumbnail((side, side))
    numbers = torch.from_numpy(np.array(numbers.resize(image.size, Image.Resampling.NEAREST)))
    masks = numbers == torch.arange(1, int(numbers.max()) + 1).view(-1, 1, 1)
    masks = masks[(masks.any(1).sum(1) > 1) & (masks.any(2).sum(1) > 1)]  # a box has two sides
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    labels = torch.ones(len(masks), dtype=torch.int64)
    return pixels, {"boxes": masks_to_boxes(masks), "labels": labels, "masks": masks.to(torch.uint8)}


def main(
    folder: Path | str,
    weights: Path | str | None = None,
    side: int = 256,
    steps: int = 400,
    batch_size: int = 4,
    lr: float = 5e-4,
    seed: int = 0,
    **architecture: int,
) -> tuple[list[float], dict[str, float]]:
    """Fine-tune on four of five images; the losses, and the average precision of boxes and masks on the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    names = sorted(path.stem for path in (Path(folder) / "PNGImages").glob("*.png"))
    data = [read(Path(folder), name, side) for name in names]
    train = [one for i, one in enumerate(data) if i % 5]
    name = None if weights else "vit_small_patch16"
    encoder = create_classifier(name, 0, checkpoint=weights, img_size=side, seed=seed, **architecture)
    model = mask_rcnn(encoder, 2, out_channels=128).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(train), (batch_size,)).tolist()
        images = [train[row][0].to(device) for row in rows]
        targets = [{name: value.to(device) for name, value in train[row][1].items()} for row in rows]
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"))
    model.eval()
    with torch.no_grad():
        for image, target in data[::5]:
            (found,) = model([image.to(device)])
            found["masks"] = found["masks"][:, 0] > 0.5
            metric.update([{k: v.cpu() for k, v in found.items()}], [target | {"masks": target["masks"].bool()}])
    scores = {name: float(metric.compute()[f"{kind}_map_50"]) for name, kind in (("boxes", "bbox"), ("masks", "segm"))}
    print(f"average precision at an overlap of 0.5: boxes {scores['boxes']:.3f}, masks {scores['masks']:.3f}")
    return losses, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with PNGImages and PedMasks")
    parser.add_argument("--weights", help="whatever fastmae.load takes; none: random")
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
