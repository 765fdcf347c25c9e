"""A timm VisionTransformer pretrained as a masked autoencoder on photographs; its weights stay a timm model's."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fastmae import ops
from fastmae.data import create_loader, open_dataset


class TimmMAE(nn.Module):
    """Loss of masked autoencoding (He et al. 2022) with any timm ViT that has a class token as the encoder."""

    def __init__(self, vit: VisionTransformer, dim: int = 96, depth: int = 2, heads: int = 3):
        super().__init__()
        self.vit, self.patch_size = vit, vit.patch_embed.patch_size
        width, pixels = vit.embed_dim, vit.patch_embed.proj.weight[0].numel()
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(1, 1 + vit.patch_embed.num_patches, dim))
        self.decoder = nn.Sequential(*(Block(dim, heads) for _ in range(depth)), nn.LayerNorm(dim))
        self.head = nn.Linear(dim, pixels)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)), persistent=False)

    def forward(self, images: Tensor, m: ops.Masking) -> Tensor:
        """uint8 images (N, 3, H, W) and a masking to a scalar."""
        vit, proj = self.vit, self.vit.patch_embed.proj
        # The strided convolution of the patch embedding is a matrix product, and only visible patches need it.
        patches = ops.gather_patches(images, m.ids_keep, self.patch_size, self.mean, self.std)
        x = F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
        x = x + F.embedding(m.ids_keep, vit.pos_embed[0, 1:])
        class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = vit.norm(vit.blocks(vit.norm_pre(torch.cat([class_token, x], dim=1))))

        x = self.decoder_embed(x)
        x = ops.restore_tokens(x, self.mask_token, m.ids_restore, self.decoder_positions, num_prefix_tokens=1)
        pred = self.head(ops.gather_tokens(self.decoder(x), m.ids_mask + 1))  # + 1: behind the class token
        return ops.masked_patch_mse(pred, images, m.ids_mask, self.patch_size, True, self.mean, self.std)


def main(steps: int = 300, batch_size: int = 32) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=0)
    model = TimmMAE(vit).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    with create_loader(open_dataset(None), batch_size=batch_size, img_size=(64, 64), seed=0, device=device) as loader:
        for step, batch in zip(range(steps), loader, strict=False):
            masking = ops.random_masking(
                len(batch.images), 64, 0.75, seed=0, epoch=batch.epochs, sample_ids=batch.sample_ids
            )
            loss = model(batch.images, masking)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 20 == 0:
                print(f"step {step:4d}  loss {losses[-1]:.3f}")
    return losses  # vit.state_dict() is what timm.create_model(...).load_state_dict takes


if __name__ == "__main__":
    main()
