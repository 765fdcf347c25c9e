"""Hugging Face's Trainer with a ViTMAE of transformers that runs on fastmae's ops."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

import fastmae


class Images(torch.utils.data.Dataset):
    """A folder per class, as dicts that the Trainer collates."""

    def __init__(self, data: str, size: int):
        crop = transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
        normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        flip, to_tensor = transforms.RandomHorizontalFlip(), transforms.ToTensor()
        self.images = ImageFolder(data, transforms.Compose([crop, flip, to_tensor, normalize]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index][0]}


def main(data: str, out: str = "vit-mae", config: ViTMAEConfig | None = None, **arguments: Any) -> list[float]:
    config = config or ViTMAEConfig(norm_pix_loss=True)
    model = fastmae.accelerate(ViTMAEForPreTraining(config), init=True, full_logits=False)
    defaults = {"learning_rate": 1.5e-4, "adam_beta2": 0.95, "weight_decay": 0.05, "logging_steps": 1}
    chosen = TrainingArguments(out, report_to="none", **defaults | arguments)
    trainer = Trainer(model, chosen, train_dataset=Images(data, config.image_size))
    trainer.train()
    trainer.save_model(Path(out) / "final")  # from_pretrained reads it, and so does fastmae.load
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
