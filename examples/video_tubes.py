"""A tube-masked video autoencoder in the manner of VideoMAE (Tong et al. 2022): 1,568 tokens, of which 160 are encoded.

One mask over space holds for all times. A pair of frames is an image of twice the channels, so the patch ops serve
tubelets of 2 x 8 x 8 pixels as they are; the token ops see time and space as one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae import ops

TIMES, SPACE, PATCH = 8, 196, 8  # 16 frames of 112 x 112


def transformer(dim: int, depth: int) -> nn.Module:
    block = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, nn.LayerNorm(dim), enable_nested_tensor=False)


class VideoMAE(nn.Module):
    def __init__(self, dim: int = 96, decoder_dim: int = 48, depth: int = 2):
        super().__init__()
        pixels = 2 * 3 * PATCH * PATCH
        self.embed = nn.Linear(pixels, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(TIMES * SPACE, dim))
        self.encoder, self.decoder = transformer(dim, depth), transformer(decoder_dim, 1)
        self.decoder_embed, self.head = nn.Linear(dim, decoder_dim), nn.Linear(decoder_dim, pixels)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(1, TIMES * SPACE, decoder_dim))

    def forward(self, videos: Tensor, m: ops.Masking) -> Tensor:
        """uint8 videos (N, 16, 3, 112, 112) and their tubes to a scalar."""
        pairs = videos.flatten(0, 1).unflatten(0, (-1, 2)).flatten(1, 2)
        # Tubes are the same places at all times, of which the first are those of an image.
        ids_keep, ids_mask = (
            ids[:, : ids.shape[1] // TIMES].repeat_interleave(TIMES, dim=0) for ids in (m.ids_keep, m.ids_mask)
        )
        patches = ops.gather_patches(pairs, ids_keep, PATCH).unflatten(0, (-1, TIMES)).flatten(1, 2)
        x = self.encoder(self.embed(patches) + F.embedding(m.ids_keep, self.positions))
        x = ops.restore_tokens(self.decoder_embed(x), self.mask_token, m.ids_restore, self.decoder_positions)
        pred = self.head(ops.gather_tokens(self.decoder(x), m.ids_mask))
        return ops.masked_patch_mse(
            pred.unflatten(1, (TIMES, -1)).flatten(0, 1), pairs, ids_mask, PATCH, norm_pix=False
        )


def moving_blobs(n: int) -> Tensor:
    """uint8 (n, 16, 3, 112, 112): a bright spot that crosses a coloured background."""
    start, speed = 112 * torch.rand(n, 1, 2), 4 * torch.randn(n, 1, 2)
    centre = (start + speed * torch.arange(16.0)[:, None]) % 112
    grid = torch.arange(112.0)
    rows, columns = (((grid - centre[..., i : i + 1]) / 15) ** 2 for i in (0, 1))
    spot = torch.exp(-rows[..., :, None] - columns[..., None, :])[:, :, None]
    return (255 * (0.3 + 0.3 * torch.rand(n, 1, 3, 1, 1) + 0.4 * spot)).byte()


def main(steps: int = 60, batch_size: int = 4) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = VideoMAE().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        m = ops.tube_masking(batch_size, TIMES, SPACE, 0.9, seed=0, epoch=step, device=device)
        loss = model(moving_blobs(batch_size).to(device), m)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
