"""Fine-tuning in timm: ``fastmae convert WEIGHTS encoder/ --to timm``, then a timm model like any other."""

from __future__ import annotations

import sys

import timm
import torch
from timm.optim import create_optimizer_v2
from torchvision.datasets import ImageFolder


def main(
    encoder: str,
    data: str,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 5e-4,
    layer_decay: float = 0.75,
    augment: str | None = "rand-m9-mstd0.5-inc1",
) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = ImageFolder(data)
    model = timm.create_model(f"local-dir:{encoder}", pretrained=True, num_classes=len(images.classes)).to(device)
    # Size and statistics are those of the pretraining, which the folder says.
    cfg = timm.data.resolve_data_config(model=model)
    images.transform = timm.data.create_transform(**cfg, is_training=True, auto_augment=augment)
    loader = torch.utils.data.DataLoader(images, batch_size, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05, layer_decay=layer_decay)
    losses = []
    while len(losses) < steps:
        for x, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(x.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
