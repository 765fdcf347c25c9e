"""The encoder without masking: a classifier, and token maps of its blocks, on the same ops as pretraining.

State-dict keys are those of facebookresearch/mae's ``models_vit.py``, so fine-tuned weights go both ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.model.blocks import Block, PatchEmbed, Stream, recompute
from fastmae.model.image_model import NORM_EPS, ImageModel, check_weights
from fastmae.model.initialization import initialize_parameters, sincos_positions
from fastmae.model.presets import PRESETS
from fastmae.ops._check import check

POOLS = ("cls", "avg")
POSITIONS = ("recompute", "interpolate")


class DropPathBlock(Block):
    """A block with stochastic depth (Huang et al., ECCV 2016): training leaves out its branches for some images."""

    def forward(self, stream: Stream, scales: Tensor | None = None) -> Stream:
        """The stream after this block.

        Args:
            stream: (N, L, D).
            scales: (2, N), factors of the attention's and the MLP's output for each image: 0 leaves a branch out.
                None: both stay as they are.
        """
        if scales is None:
            return super().forward(stream)
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            return recompute(self, self.mlp.fc2, self._scaled, stream, scales)
        return self._scaled(stream, scales)

    def _scaled(self, stream: Stream, scales: Tensor) -> Stream:
        if self.activation_checkpointing == "selective" and torch.is_grad_enabled():
            stream = recompute(self.attn, self.attn.proj, self.attn, stream, self.norm1)
        else:
            stream = self.attn(stream, self.norm1)
        return _scale(self.mlp(_scale(stream, scales[0]), self.norm2), scales[1])


def _scale(stream: Stream, scale: Tensor) -> Stream:
    branch, scale = stream.branch, scale.to(stream.branch.dtype).view(-1, 1, 1)
    if stream.bias is None:
        return Stream(stream.x, branch * scale)
    # One pass, in the dtype of the branch: a float32 bias would make it twice as large.
    return Stream(stream.x, torch.addcmul(stream.bias.to(branch.dtype) * scale, branch, scale))


class VisionTransformer(ImageModel):
    """A Vision Transformer that classifies whole images.

    Args:
        num_classes: classes K of the head; 0 for none, so that the output is the pooled feature.
        img_size: (height, width) in pixels, or an int for a square.
        patch_size: (height, width) in pixels, or an int; must divide ``img_size``.
        in_chans: channels C.
        embed_dim, depth, num_heads: width D, blocks, heads.
        mlp_ratio: hidden width of an MLP relative to D.
        pool: "cls": the class token after the last norm. "avg": the mean of the patch tokens before any norm, then a
            norm of its own, ``fc_norm`` (both as in the paper's code).
        drop_path: probability that training leaves out a branch of the last block for an image; it rises linearly
            from 0 in the first.
        class_token: False for an encoder that was pretrained without one; then ``pool`` is "avg".
        mean, std: per-channel statistics of pixels in [0, 1], applied to ``uint8`` images only. None: ImageNet's for
            three channels, 0.5 otherwise.
        attention: backend of :func:`fastmae.ops.attention`.
        norm_eps: added to the variance by every LayerNorm.
        seed: keys the initialisation, together with each parameter's name. None draws a seed.

    Attributes:
        architecture: the arguments that rebuild this model, JSON-able.

    Raises:
        ValueError: sizes that do not fit each other, or a probability outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        *,
        pool: str = "cls",
        drop_path: float = 0.0,
        class_token: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "auto",
        norm_eps: float = NORM_EPS,
        seed: int | None = None,
    ):
        super().__init__(img_size, patch_size, in_chans, mean, std, attention, norm_eps)
        check(num_classes >= 0, "num_classes", "at least 0", num_classes)
        check(pool in POOLS, "pool", f"one of {', '.join(POOLS)}", pool)
        check(0 <= drop_path < 1, "drop_path", "a probability in [0, 1)", drop_path)
        check(embed_dim % num_heads == 0, "embed_dim", f"a multiple of num_heads={num_heads}", embed_dim)
        check(class_token or pool == "avg", "pool", "avg without a class token", pool)
        self.num_classes, self.pool, self.drop_path = num_classes, pool, drop_path
        self.num_prefix_tokens = int(class_token)
        self.architecture: dict[str, Any] = {
            "num_classes": num_classes, "img_size": list(self.img_size), "patch_size": list(self.patch_size),
            "in_chans": in_chans, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads,
            "mlp_ratio": mlp_ratio, "pool": pool, **self._statistics,
        } | ({} if norm_eps == NORM_EPS else {"norm_eps": norm_eps})  # fmt: skip
        self.architecture |= {} if class_token else {"class_token": False}
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid_size))
        self.blocks = nn.ModuleList(
            DropPathBlock(embed_dim, num_heads, mlp_ratio, attention, norm_eps) for _ in range(depth)
        )
        norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.norm, self.fc_norm = (norm, nn.Identity()) if pool == "cls" else (nn.Identity(), norm)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.initialize_weights(int(torch.randint(1 << 62, (), device="cpu")) if seed is None else seed)

    def initialize_weights(self, seed: int) -> None:
        """Draw all weights but the positions (appendix A.1), each keyed by ``(seed, parameter name)``.

        The head's weights are drawn a thousand times smaller, so that predictions are nearly uniform at first.
        """
        positions = self.pos_embed.detach().clone()
        initialize_parameters(self, seed)
        with torch.no_grad():
            self.pos_embed.copy_(positions)
            if self.num_classes:
                self.head.weight.mul_(1e-3)

    def forward(self, images: Tensor, *, path_scales: Tensor | None = None) -> Tensor:
        """Logits (N, K).

        Args:
            images: (N, C, H, W), any strides. ``uint8`` is raw and normalised with the model's statistics; floating
                point is taken as already normalised.
            path_scales: (depth, 2, N), factors of the blocks' branches; see :func:`path_scales`. None: in training
                with ``drop_path`` they are drawn from torch's default generator, otherwise all branches stay.
        """
        return self.head(self.forward_features(images, path_scales=path_scales))

    def forward_features(self, images: Tensor, *, path_scales: Tensor | None = None) -> Tensor:
        """The pooled feature (N, D): what the head takes."""
        if path_scales is None and self.training and self.drop_path:
            uniform = torch.rand(len(self.blocks), 2, len(images), device=images.device)
            path_scales = scales_of(uniform, self.drop_path)
        stream = Stream(self.embed(images))
        for i, block in enumerate(self.blocks):
            stream = block(stream, None if path_scales is None else path_scales[i])
        x = stream.sum()
        if self.pool == "avg":
            return self.fc_norm(x[:, self.num_prefix_tokens :].mean(1))
        return self.norm(x[:, 0])

    def encode(self, images: Tensor) -> Tensor:
        """All tokens behind the last block, (N, 1 + L, D), and behind the last norm with ``pool="cls"``."""
        stream = Stream(self.embed(images))
        for block in self.blocks:
            stream = block(stream)
        return self.norm(stream.sum())

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], *, norm: bool = False) -> list[Tensor]:
        """Token maps of some blocks, for dense tasks.

        Args:
            images: as for :meth:`forward`.
            indices: which blocks, from 0; negative ones count from the last.
            norm: apply the last norm to each map (with ``pool="avg"``, whose norm is of the pooled feature: none).

        Returns:
            For each index (N, D, rows, columns), the patch tokens behind that block.
        """
        depth = len(self.blocks)
        check(all(-depth <= i < depth for i in indices), "indices", f"blocks from {-depth} to {depth - 1}", indices)
        wanted, maps = [i % depth for i in indices], {}
        stream = Stream(self.embed(images))
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            stream = block(stream)
            if i in wanted:
                tokens = self.norm(stream.sum()) if norm else stream.sum()
                maps[i] = tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid_size)
        return [maps[i] for i in wanted]

    def embed(self, images: Tensor) -> Tensor:
        """Class token and embedded patches with their positions, (N, 1 + L, D): the first block's input."""
        expected = (self.in_chans, *self.img_size)
        fits = tuple(images.shape[1:]) == expected and (images.dtype == torch.uint8 or images.is_floating_point())
        check(fits, "images", f"(N, {', '.join(map(str, expected))}), uint8 or floating point", images)
        patches = self.embed_patches(images, self._all_ids(len(images), images.device))
        if self.cls_token is None:
            return patches + self.pos_embed[:, 1:]
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed

    @torch.no_grad()
    def load_encoder(self, weights: Mapping[str, Tensor], *, positions: str = "recompute") -> list[str]:
        """Take a pretrained encoder's weights, and a head's if they hold one of the same classes.

        Args:
            weights: a state dict of a masked autoencoder or of a classifier, under facebookresearch/mae's names.
                Decoder and mask token are left out.
            positions: for tables of another grid. "recompute": sine-cosine tables are computed for this grid;
                learnt ones are refused. "interpolate": bicubic, antialiased.

        Returns:
            The names of this model's parameters that the weights do not have (head, ``fc_norm``): they keep their
            values.

        Raises:
            ValueError: a tensor that is missing, unknown, not finite or of another shape; names it.
        """
        given = {n: t for n, t in weights.items() if not n.startswith("decoder_") and not n.endswith("mask_token")}
        table = given.get("pos_embed")
        if table is not None and table.shape != self.pos_embed.shape:
            side = round((table.shape[1] - 1) ** 0.5)
            known = table.ndim == 3 and side * side == table.shape[1] - 1 and table.shape[2] == self.pos_embed.shape[2]
            check(known, "pos_embed", f"(1, 1 + L, {self.pos_embed.shape[2]}) of a square grid, or of this one", table)
            given["pos_embed"] = resize_positions(table, (side, side), self.grid_size, positions)
        if self.pool == "avg":  # its norm is of the pooled feature, and the encoder's last one is not used
            given = {n: t for n, t in given.items() if not n.startswith("norm.")}
        own = dict(self.named_parameters())
        free = {name for name in own if name.startswith(("head.", "fc_norm."))}
        check_weights(own, given, free)
        for name, tensor in given.items():
            own[name].copy_(tensor)
        return sorted(own.keys() - given.keys())


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], rule: str) -> Tensor:
    """A position table (1, 1 + L, D) of a grid for another grid; the class token's row stays.

    Args:
        rule: "recompute": sine-cosine positions are computed for the new grid; a learnt table is refused.
            "interpolate": bicubic, antialiased.

    Raises:
        ValueError: naming the rule that can, if this one cannot.
    """
    check(rule in POSITIONS, "positions", f"one of {', '.join(POSITIONS)}", rule)
    width = table.shape[2]
    if rule == "interpolate":
        patches = table[:, 1:].float().unflatten(1, grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, new_grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([table[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)
    if not torch.allclose(table.float().cpu(), sincos_positions(width, grid), atol=1e-4):
        sizes = "{} x {} patches cannot be recomputed for {} x {}".format(*grid, *new_grid)
        raise ValueError(f'pos_embed: a learnt table for {sizes}; pass positions="interpolate"')
    return sincos_positions(width, new_grid, grid)


def scales_of(uniform: Tensor, drop_path: float) -> Tensor:
    """Factors of the blocks' branches under stochastic depth.

    Args:
        uniform: (depth, 2, N), numbers drawn uniformly from [0, 1).
        drop_path: probability for the last block; the first has 0, and it rises linearly in between.

    Returns:
        (depth, 2, N): 0 where a branch is left out, the reciprocal of the probability of keeping it elsewhere.
    """
    keep = 1 - torch.linspace(0, drop_path, len(uniform), device=uniform.device).view(-1, 1, 1)
    return (uniform < keep) / keep


def create_vision_transformer(name: str, num_classes: int, **overrides: Any) -> VisionTransformer:
    """An encoder by name, ``vit_{tiny,small,base,large}_patch16`` or ``vit_huge_patch14``, with a head.

    Raises:
        ValueError: an unknown name (the message lists them), or what the constructor raises.
    """
    names = [preset.removeprefix("mae_") for preset in PRESETS]
    check(name in names, "name", f"one of {', '.join(names)}", name)
    preset = {key: v for key, v in PRESETS[f"mae_{name}"].items() if not key.startswith("decoder_")}
    return VisionTransformer(num_classes, **preset | {key: v for key, v in overrides.items() if v is not None})
