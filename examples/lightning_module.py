"""A Lightning module of the masked autoencoder, on fastmae's loader."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as lightning
import torch

import fastmae
from fastmae.data import create_loader, open_dataset


class MAE(lightning.LightningModule):
    def __init__(self, lr: float = 1.5e-4, **sizes: Any):
        super().__init__()
        self.save_hyperparameters()
        self.model = fastmae.create_model("mae_vit_base_patch16", norm_pix_loss=True, **sizes)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(batch.images, mask_ratio=0.75, full_pred=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.05)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        return batch  # is there already


def main(data: str, steps: int = 1000, batch_size: int = 64, **options: Any) -> list[float]:
    module, losses = MAE(**options), []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    trainer = lightning.Trainer(
        max_steps=steps, devices=1, callbacks=[Losses()], logger=False, enable_checkpointing=False
    )
    device = trainer.strategy.root_device
    sizes = {"batch_size": batch_size, "img_size": module.model.img_size}
    with create_loader(open_dataset(data), seed=0, device=device, **sizes) as loader:
        trainer.fit(module, loader)
    torch.save({"model": module.model.state_dict()}, "mae.pth")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
