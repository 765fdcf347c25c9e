"""Half of the patches dropped in training, as in PatchDropout (Liu et al. 2022) and FLIP (Li et al. 2023)."""

import torch
from torch import Tensor, nn

from fastmae import ops


class ViT(nn.Module):
    def __init__(self, classes: int, dim: int = 64, depth: int = 2):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, dim))
        block = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor, step: int = 0) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        if self.training:
            masking = ops.random_masking(len(x), 64, mask_ratio=0.5, seed=0, epoch=step, device=x.device)
            x = ops.gather_tokens(x, masking.ids_keep)
        return self.head(self.blocks(x).mean(dim=1))


def stripes(labels: Tensor, classes: int) -> Tensor:
    """Noisy pictures (n, 3, 32, 32) of stripes; the label says in which direction they run."""
    angle, phase = (labels * torch.pi / classes)[:, None, None], 6.3 * torch.rand(len(labels), 1, 1)
    waves = torch.sin(0.8 * (torch.arange(32.0) * angle.cos() + torch.arange(32.0)[:, None] * angle.sin()) + phase)
    return waves[:, None] + 0.5 * torch.randn(len(labels), 3, 32, 32)


def main(steps: int = 100, classes: int = 6) -> list[float]:
    torch.manual_seed(0)
    model, losses, labels = ViT(classes), [], torch.arange(30) % classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(stripes(labels, classes), step), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    accuracy = (model.eval()(stripes(labels, classes)).argmax(1) == labels).float().mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; accuracy with all patches {accuracy:.0%}")
    return losses


if __name__ == "__main__":
    main()
