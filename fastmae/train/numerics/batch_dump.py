"""The batch of a step that had no finite gradient, for later study: which images it was made of, and what each gave.

A batch is a pure function of its position, so it is decoded again, and its losses are computed again, image by image,
on the weights that are there.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmae import ops
from fastmae.data import Batch
from fastmae.data.plan import Plan
from fastmae.train import model_state
from fastmae.train.checkpoint.format import save_tensors
from fastmae.train.ranks import Ranks

FOLDER = "non_finite"

KEPT = 3
"""Dumps whose tensors are kept, the newest; of older ones the JSON remains."""

_NAMED = 3


class Forward(NamedTuple):
    """One forward pass: a batch, its plan, its masks, and the loss of each mask (N * R,), float32 on the device."""

    batch: Batch
    plan: Plan
    masking: ops.Masking
    losses: Tensor


class Dumped(NamedTuple):
    """What was written.

    Attributes:
        folder: of the dump.
        text: what was found, in a line.
    """

    folder: Path
    text: str


@torch.no_grad()
def losses_by_mask(model: nn.Module, images: Tensor, masking: ops.Masking) -> Tensor:
    """The loss of every mask, float32 (N * R,): the mean over its patches, as the training's mean is made of them."""
    out = model(images, masking=masking, full_pred=False)
    statistics = model.patch_size, model.norm_pix_loss, model.mean, model.std
    return ops.masked_patch_mse(out.pred, images, masking.ids_mask, *statistics, reduction="none").mean(1)


def write_dump(
    parent: Path,
    step: int,
    time: int,
    now: int,
    decode: Callable[[], Sequence[tuple[Batch, Plan]]],
    forward: Callable[[Batch], tuple[ops.Masking, Tensor]],
    dataset: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> Dumped:
    """Write ``non_finite/step-N/`` (``step-N-K/`` the K-th time); every rank calls it.

    The folder has ``batch.json`` and a ``rank-R.safetensors`` for each rank.
    ``batch.json`` lists every image of the global batch, those whose loss is not finite first, then by falling loss,
    with position, id, path, epoch, label, crop box, flips, rank, row in the rank's file and loss; and says whether
    weights or moments are not finite. The tensor files have ``images`` (n, C, H, W), ``sample_ids``, ``epochs``,
    ``losses`` (n, R), ``ids_keep`` and ``ids_mask`` (n, R, K and M).

    Args:
        parent: the run folder.
        step: the step, counted from 1.
        time: that the run goes back, counted from 1: it may be at the same step with other images.
        now: the step after which the weights are those that the losses are computed on.
        decode: makes this rank's batches of the step.
        forward: gives a batch's masks and their losses, float32 (N * R,); may use collectives.

    Raises:
        CheckpointError: on all ranks alike, if any of them fails; there is then no folder of the step.
    """
    folder = parent / FOLDER / (f"step-{step}" if time == 1 else f"step-{step}-{time}")
    partial = folder.with_name(f".{folder.name}.tmp")
    decoded: list[tuple[Batch, Plan]] = []

    def begin() -> None:
        decoded.extend(decode())
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write_own() -> tuple[list[dict[str, Any]], dict[str, Any], int]:
        done = [Forward(batch, plan, *forward(batch)) for batch, plan in decoded]
        path = partial / f"rank-{ranks.rank}.safetensors"
        save_tensors(path, _tensors(done))
        return _images(done, dataset, ranks.rank), _state(model, optimizer), path.stat().st_size

    def finish(found: Sequence[tuple[list[dict[str, Any]], dict[str, Any], int]]) -> str:
        images = sorted((image for rank in found for image in rank[0]), key=_worst_first)
        bad = [image for image in images if not math.isfinite(float(image["loss"]))]
        values = {
            "step": step,
            "weights_after_step": now,
            "images_without_finite_loss": len(bad),
            **_merge([rank[1] for rank in found]),
        }
        (partial / "batch.json").write_text(json.dumps({**values, "images": images}, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _forget_tensors(folder.parent)
        size = sum(rank[2] for rank in found) / 1e6
        return f"{len(images):,} images, {size:,.2f} MB. {_conclusion(values, bad, images)}"

    what = f"dumping the batch of step {step}"
    try:
        ranks.gather(what, begin)  # all have decoded before one needs the others in a forward
        found = ranks.gather(what, write_own)
        return Dumped(folder, ranks.first(what, lambda: finish(found)))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _images(forwards: Sequence[Forward], dataset: Any, rank: int) -> list[dict[str, Any]]:
    """A JSON-able description of each image, in the order of the tensor file's rows."""
    described: list[dict[str, Any]] = []
    for _, plan, _, losses in forwards:
        losses = losses.view(len(plan.positions), -1).mean(1).tolist()
        labels = dataset.labels(plan.source_ids).tolist()
        for j, loss in enumerate(losses):
            own, source = int(plan.sample_ids[j]), int(plan.source_ids[j])
            image = {
                "loss": loss if math.isfinite(loss) else str(loss),  # JSON has neither NaN nor infinity
                "position": int(plan.positions[j]),
                "sample_id": own,
                "path": dataset.path(source),
                "epoch": int(plan.epochs[j]),
                "label": labels[j] if labels[j] >= 0 else None,
                "box": plan.boxes[j].tolist(),
                "flips": plan.flips[j].tolist(),
                "jitter": None if plan.jitter is None else plan.jitter[j].tolist(),
                "rank": rank,
                "row": len(described),
            }
            described.append(image if source == own else image | {"replaces": dataset.path(own)})
    return described


def _tensors(forwards: Sequence[Forward]) -> dict[str, Tensor]:
    def cat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.detach().cpu() for part in parts]).contiguous()

    count = sum(len(forward.batch.images) for forward in forwards)
    ids_keep, ids_mask = (cat([getattr(f.masking, name) for f in forwards]) for name in ("ids_keep", "ids_mask"))
    return {
        "images": cat([f.batch.images for f in forwards]),
        "sample_ids": cat([f.batch.sample_ids for f in forwards]),
        "epochs": cat([f.batch.epochs for f in forwards]),
        "losses": cat([f.losses for f in forwards]).view(count, -1),
        "ids_keep": ids_keep.view(count, -1, ids_keep.shape[1]),
        "ids_mask": ids_mask.view(count, -1, ids_mask.shape[1]),
    }


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this rank's part of weights and moments looks like: names of what is not finite, the largest weight."""
    largest = largest_values(model_state.collect(model, optimizer))
    weights = {name.removeprefix("model."): v for name, v in largest.items() if name.startswith("model.")}
    name = max(weights, key=lambda name: weights[name] if math.isfinite(weights[name]) else -1.0, default=None)
    return {
        "weights_not_finite": [n for n, value in weights.items() if not math.isfinite(value)],
        "moments_not_finite": [n for n, v in largest.items() if n.startswith("optimizer.") and not math.isfinite(v)],
        "largest_weight": [name, weights[name]] if name and math.isfinite(weights[name]) else None,
    }


@torch.no_grad()
def largest_values(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The largest magnitude in each tensor, or in this rank's shard of it; not finite if any element is not."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    local = {name: t for name, t in local.items() if t.is_floating_point() and t.numel()}
    return {name: float(t.abs().max()) for name, t in local.items()}


def _merge(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One description of the weights from those of all ranks."""
    merged: dict[str, Any] = {
        key: sorted({name for state in states for name in state[key]})
        for key in ("weights_not_finite", "moments_not_finite")
    }
    largest = [state["largest_weight"] for state in states if state["largest_weight"]]
    return merged | {"largest_weight": max(largest, key=lambda pair: pair[1], default=None)}


def _worst_first(image: dict[str, Any]) -> tuple[bool, float, int]:
    loss = float(image["loss"])
    return math.isfinite(loss), -loss if math.isfinite(loss) else 0.0, image["position"]


def _conclusion(values: dict[str, Any], bad: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]) -> str:
    """What the dump points at, in words."""
    if names := values["weights_not_finite"]:
        return f"{len(names)} weights are not finite, {names[0]} among them"
    if len(bad) == len(images):
        return "No image has a finite loss: the weights are at fault, not the images"
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        return f"No finite loss: {', '.join(image['path'] for image in bad[:_NAMED])}{more}"
    return (
        f"Computed again, all losses are finite, the largest {images[0]['loss']:.3g}: the gradient overflowed on its "
        "way back, or the step does not repeat"
    )


def _forget_tensors(folder: Path) -> None:
    """Delete the tensors of all dumps but the newest."""
    # By time, since steps come again; and not the folder's own, which changes with what is deleted in it.
    dumps = sorted(folder.glob("step-*/batch.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in dumps[KEPT:]:
        for file in old.parent.glob("*.safetensors"):
            file.unlink()
