"""Masked Autoencoders in plain PyTorch: the specification that everything else in fastmae is held against.

Reads next to the paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Section numbers below
are the paper's. Parameter names and shapes are those of facebookresearch/mae, so that one state dict fits both. Nothing
here is written for speed.

Shapes: N images, C channels, L patches of ph x pw pixels (P = ph * pw * C values), K visible, D encoder width,
E decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, L, P): row-major patches, and inside a patch rows, columns, then channels."""
    n, c, height, width = images.shape
    ph, pw = patch_size
    x = images.reshape(n, c, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // ph) * (width // pw), ph * pw * c)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """(N, L, P) -> (N, C, H, W): the inverse of :func:`patchify`."""
    n, _, p = patches.shape
    (ph, pw), (rows, cols) = patch_size, grid_size
    x = patches.reshape(n, rows, cols, ph, pw, p // (ph * pw))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, p // (ph * pw), rows * ph, cols * pw)


def sincos_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine position table (1, 1 + L, dim), appendix A.1; the class token's row is zero.

    The first half of the channels encodes the column, the second half the row, as in the authors' code.
    """
    if dim % 4:
        raise ValueError(f"dim: sine-cosine positions in two dimensions need a multiple of 4, got {dim}")
    rows, cols = grid_size
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.to(torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column, row = torch.arange(cols).repeat(rows), torch.arange(rows).repeat_interleave(cols)
    table = torch.cat([encode(column), encode(row)], dim=1)
    return torch.cat([table.new_zeros(1, dim), table])[None].float()


def random_masking(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle the tokens and keep the first part, section 3 "Simple implementation".

    Args:
        x: tokens (N, L, D).
        mask_ratio: share of the tokens that is removed.
        noise: (N, L); the tokens with the smallest noise are kept. None draws it uniformly.

    Returns:
        visible tokens (N, K, D), mask (N, L) with 1 for removed tokens, ids_restore (N, L).
    """
    n, length, dim = x.shape
    keep = int(length * (1 - mask_ratio))
    if noise is None:
        noise = torch.rand(n, length, device=x.device)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    visible = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
    mask = torch.ones(n, length, device=x.device)
    mask[:, :keep] = 0
    return visible, mask.gather(1, ids_restore), ids_restore


class PatchEmbed(nn.Module):
    """Linear projection of flattened patches, written as a strided convolution like in ViT."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, dim))


class MLP(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoder(nn.Module):
    """The masked autoencoder of section 3: a ViT on visible patches, a light decoder on all of them.

    Args:
        img_size, patch_size: (height, width).
        in_chans: channels C.
        embed_dim, depth, num_heads: encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: decoder; the defaults are the paper's (section 4.1).
        mlp_ratio: hidden width of the MLPs over their width.
        norm_pix_loss: predict pixels normalised by their own patch's mean and standard deviation.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size[0] * patch_size[1] * in_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform matrices (the patch projection is one), zero biases, normal(0.02) tokens (appendix A.1).

        facebookresearch/mae leaves the bias of the patch projection at Conv2d's default instead of zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward_encoder(
        self, images: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Section 3 "MAE encoder": only visible patches. Returns latent (N, 1 + K, D), mask, ids_restore (N, L)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, ids_restore = random_masking(x, mask_ratio, noise)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Section 3 "MAE decoder": encoded patches and mask tokens in their places. Returns pred (N, L, P)."""
        x = self.decoder_embed(latent)
        n, visible, dim = x.shape
        mask_tokens = self.mask_token.expand(n, ids_restore.shape[1] + 1 - visible, dim)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, dim))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Section 3 "Reconstruction target": mean squared error over masked patches only."""
        target = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        error = ((pred - target) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss (), pred (N, L, P) and mask (N, L; 1 = masked) for normalised images (N, C, H, W)."""
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, pred, mask), pred, mask
