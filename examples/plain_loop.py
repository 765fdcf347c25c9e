"""Pretraining as a plain loop: fastmae's loader and model, PyTorch's optimiser, and nothing in between."""

from __future__ import annotations

import sys
from typing import Any

import torch

import fastmae
from fastmae.data import create_loader, open_dataset


def main(data: str, steps: int = 1000, batch_size: int = 64, lr: float = 1.5e-4, **sizes: Any) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fastmae.create_model("mae_vit_base_patch16", norm_pix_loss=True, **sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    options = {"batch_size": batch_size, "img_size": model.img_size, "seed": 0, "device": device}
    with create_loader(open_dataset(data), **options) as loader:
        for step, batch in zip(range(steps), loader, strict=False):
            with torch.autocast(device, torch.bfloat16):
                loss = model(batch.images, mask_ratio=0.75, full_pred=False).loss  # uint8 images
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 20 == 0:
                print(f"step {step:4d}  loss {losses[-1]:.3f}")
    torch.save({"model": model.state_dict()}, "mae.pth")  # as facebookresearch/mae does; fastmae.load reads it
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
