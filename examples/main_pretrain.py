"""The flow of facebookresearch/mae's ``main_pretrain.py`` with one import changed: ``models_mae`` is fastmae's.

The model's names, arguments, outputs and state dict are the same, so the rest of such a script stays as it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastmae import model as models_mae  # was: import models_mae


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("MAE pre-training")
    parser.add_argument("--data_path", required=True, help="a folder per class, as ImageNet's train folder")
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--model", default="mae_vit_large_patch16")
    parser.add_argument("--input_size", default=224, type=int)
    parser.add_argument("--mask_ratio", default=0.75, type=float)
    parser.add_argument("--norm_pix_loss", action="store_true")
    parser.add_argument("--batch_size", default=64, type=int)
    parser.add_argument("--accum_iter", default=1, type=int)
    parser.add_argument("--epochs", default=400, type=int)
    parser.add_argument("--warmup_epochs", default=40, type=int)
    parser.add_argument("--blr", default=1e-3, type=float, help="learning rate for 256 images")
    parser.add_argument("--weight_decay", default=0.05, type=float)
    parser.add_argument("--num_workers", default=10, type=int)
    parser.add_argument("--device", default="cuda")
    return parser


def main(args: argparse.Namespace) -> list[float]:
    augmentation = transforms.Compose([
        transforms.RandomResizedCrop(args.input_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        ImageFolder(args.data_path, augmentation), args.batch_size, True, num_workers=args.num_workers, drop_last=True
    )
    model = models_mae.__dict__[args.model](img_size=args.input_size, norm_pix_loss=args.norm_pix_loss)
    model.to(args.device)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(args.device, enabled=args.device == "cuda")
    lr, losses = args.blr * args.batch_size * args.accum_iter / 256, []
    for epoch in range(args.epochs):
        for i, (samples, _) in enumerate(loader):
            at = epoch + i / len(loader)
            past = max(at - args.warmup_epochs, 0) / max(args.epochs - args.warmup_epochs, 1)
            scale = at / args.warmup_epochs if at < args.warmup_epochs else 0.5 * (1 + math.cos(math.pi * past))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            samples = samples.to(args.device, non_blocking=True)
            with torch.autocast(args.device, enabled=args.device == "cuda"):
                loss, _, _ = model(samples, mask_ratio=args.mask_ratio)
            scaler.scale(loss / args.accum_iter).backward()
            if (i + 1) % args.accum_iter == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}  loss {losses[-1]:.3f}")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": args.epochs - 1, "args": args}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.save(state, Path(args.output_dir) / f"checkpoint-{args.epochs - 1}.pth")
    return losses


if __name__ == "__main__":
    main(get_args_parser().parse_args())
