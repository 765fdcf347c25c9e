"""Weights for images of another size, patches of another size or other channels, each by a rule with a name.

What the decoder predicts changes as its images do: predictions of resized patches are resized predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae.model.classifier import POSITIONS, resize_positions
from fastmae.ops._check import as_pair, check, grid_of

PATCHES = ("pseudo-inverse",)
CHANNELS = ("repeat", "average", "first-layer")
SIZES = ("img_size", "patch_size", "in_chans")
STATISTICS = ("mean", "std")


def adapt(
    weights: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    positions: str | None = None,
    patches: str | None = None,
    channels: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and their architecture, for other images.

    Args:
        weights: under facebookresearch/mae's names.
        architecture: of the model that they are of.
        wanted: ``img_size``, ``patch_size`` and ``in_chans`` of the new model; those that are left out stay.
        positions: for another grid of patches. "recompute" or "interpolate"; see :func:`resize_positions`.
        patches: for another size of patches. "pseudo-inverse": the projection of FlexiViT (Beyer et al., CVPR 2023,
            section 3.4), which gives enlarged patches the embedding of the originals.
        channels: for another number of channels. "repeat": channels are the old ones in turn, which share their
            weights. "average": all channels get the mean of the weights, so grey images keep their embedding.
            "first-layer": the first channels keep their weights, and new ones start at zero.

    Raises:
        ValueError: a rule is needed that is not given.
    """
    weights, result = dict(weights), dict(architecture)
    here = {name: as_pair(name, result[name]) for name in SIZES[:2]} | {"in_chans": result["in_chans"]}
    there = {name: as_pair(name, wanted.get(name, here[name])) for name in SIZES[:2]}
    there["in_chans"] = wanted.get("in_chans", here["in_chans"])
    old_grid, grid = (grid_of(sizes["img_size"], sizes["patch_size"], "img_size") for sizes in (here, there))
    given = {"in_chans": (channels, "channels", CHANNELS), "patch_size": (patches, "patches", PATCHES)}
    for name, (rule, argument, rules) in given.items():
        check(here[name] == there[name] or rule in rules, argument, f"{_change(name, here, there)}, {_or(rules)}", rule)
    expected = f"{_change('img_size' if here['patch_size'] == there['patch_size'] else 'patch_size', here, there)}, "
    check(old_grid == grid or positions in POSITIONS, "positions", expected + _or(POSITIONS), positions)
    predicts_pixels = "num_outputs" not in result

    if here["in_chans"] != there["in_chans"]:
        copies, shares = _channel_maps(here["in_chans"], there["in_chans"], channels)
        _map_projection(weights, "nchw,dc->ndhw", shares)
        if predicts_pixels:
            _map_predictions(weights, here["patch_size"], "hwce,dc->hwde", copies)
        for name in STATISTICS:
            values = copies @ torch.tensor(result[name], dtype=torch.float64)
            result[name] = torch.where(copies.any(1), values, 0.5).tolist()
    if here["patch_size"] != there["patch_size"]:
        resize = _resize_map(here["patch_size"], there["patch_size"])
        inverse = torch.linalg.pinv(resize.flatten(2).flatten(0, 1)).T
        _map_projection(weights, "nchw,pqhw->ncpq", inverse.reshape(resize.shape))
        if predicts_pixels:
            _map_predictions(weights, here["patch_size"], "hwce,pqhw->pqce", resize)
    if old_grid != grid:
        for name in {"pos_embed", "decoder_pos_embed"} & weights.keys():
            weights[name] = resize_positions(weights[name], old_grid, grid, positions)
    return weights, result | {name: list(there[name]) for name in SIZES[:2]} | {"in_chans": there["in_chans"]}


def _change(name: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    return f"a rule for {name} {here[name]} -> {there[name]}"


def _or(rules: tuple[str, ...]) -> str:
    return " or ".join(rules)


def _channel_maps(old: int, new: int, rule: str) -> tuple[Tensor, Tensor]:
    """Two matrices (new, old): of what a new channel shows, and of its share of the old ones' weights."""
    if rule == "first-layer":
        same = torch.eye(new, old, dtype=torch.float64)
        return same, same
    if rule == "average":
        mean = torch.full((new, old), 1 / old, dtype=torch.float64)
        return mean, mean * old / new
    check(new >= old, "in_chans", f"at least the {old} that are repeated", new)
    copies = F.one_hot(torch.arange(new) % old, old).double()
    return copies, copies / copies.sum(0)


def _resize_map(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased resizing of a patch, as a linear map (new rows, new columns, old rows, old columns)."""
    units = torch.eye(old[0] * old[1], dtype=torch.float64).unflatten(1, (1, *old))
    resized = F.interpolate(units, new, mode="bilinear", antialias=True, align_corners=False)
    return resized.squeeze(1).permute(1, 2, 0).unflatten(2, old)


def _map_projection(weights: dict[str, Tensor], equation: str, linear: Tensor) -> None:
    name = "patch_embed.proj.weight"
    weights[name] = torch.einsum(equation, weights[name].double(), linear).to(weights[name].dtype).contiguous()


def _map_predictions(weights: dict[str, Tensor], patch_size: tuple[int, int], equation: str, linear: Tensor) -> None:
    for name in {"decoder_pred.weight", "decoder_pred.bias"} & weights.keys():
        tensor = weights[name]
        pixels = tensor.double().reshape(*patch_size, -1, tensor[0].numel())
        mapped = torch.einsum(equation, pixels, linear).reshape(-1, *tensor.shape[1:])
        weights[name] = mapped.to(tensor.dtype)
