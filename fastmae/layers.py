"""The parts of the encoder and the decoder: patch projection, Transformer block, position table, initialisation.

Parameter names and shapes are those of facebookresearch/mae (and of timm's ViT), so that state dicts pass both ways.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.ops import attention, attention_qkvpacked, gather_tokens


def sincos_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine table (1, 1 + L, dim), float32, rows in patch order behind a zero row for the class token.

    The first half of the channels encodes the column and the second half the row; inside each half the sines come
    first (He et al., appendix A.1, in the layout of the authors' code).

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"embed_dim: two-dimensional sine-cosine positions need a multiple of 4, got {dim}")
    quarter = dim // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, cols = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in grid_size), indexing="ij")
    angles = torch.stack([cols, rows], dim=-1).reshape(-1, 2, 1) * frequency
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(-1, dim)
    return F.pad(table, (0, 0, 1, 0))[None].float()


class PatchEmbed(nn.Module):
    """Linear projection of patches. ``proj`` is stored as a convolution and applied as a matrix."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, K, ph*pw*C), channels innermost, to (N, K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, L, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(attention_qkvpacked(qkv, self.backend).flatten(2))

    def forward_queries(self, x: Tensor, ids: Tensor) -> Tensor:
        """The rows ``ids`` (N, M) of ``forward(x)``, as (N, M, D): keys and values for all, queries for those only."""
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(gather_tokens(x, ids), weight[:dim], bias[:dim]).unflatten(-1, (self.num_heads, -1))
        k, v = F.linear(x, weight[dim:], bias[dim:]).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v, self.backend).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU; the tanh approximation would be another model."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block (LayerNorm eps 1e-6, as in the paper's code)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, backend: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """(N, L, D) to (N, L, D), or with ``ids`` (N, M) to those rows of the same result, (N, M, D)."""
        if ids is None:
            x = x + self.attn(self.norm1(x))
        else:
            x = gather_tokens(x, ids) + self.attn.forward_queries(self.norm1(x), ids)
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """The paper's initialisation (appendix A.1), each parameter drawn on the CPU from a generator of its own.

    Matrices (the patch projection flattened to one) are Xavier-uniform, biases zero, LayerNorm scales one, tokens
    normal with a standard deviation of 0.02; parameters that are not trained (position tables) are left alone. The
    generator is keyed by ``(seed, parameter name)``, so that a parameter's value does not hang on the order of
    construction, on the device, or on which process draws it. Parameters on the meta device are skipped.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta:
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if name.endswith("token"):
            parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=0.02, generator=generator))
        elif parameter.ndim > 1:
            matrix = torch.empty(parameter.shape[0], parameter[0].numel(), device="cpu")
            nn.init.xavier_uniform_(matrix, generator=generator)
            parameter.copy_(matrix.view(parameter.shape))
        else:
            parameter.fill_(1.0 if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.0)
