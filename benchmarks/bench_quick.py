"""Three ways to train one small model, side by side: how fast each step is, and that all reach the same loss.

    pytest --benchmark -k quick

facebookresearch's way in plain PyTorch (attention written out as in its day, and through PyTorch's SDPA), Hugging
Face's ViTMAE, and fastmae. Each trains a copy of the same weights on the same crops of the embedded photographs, with
the same masks (which spares the others their own), AdamW and learning rate. The first losses differ by rounding alone,
the later ones by what rounding grows to. Takes a minute or two on two cores.
"""

from __future__ import annotations

from collections.abc import Callable

import bench_step
import pytest
import torch
from benchmark import Benchmark
from op_benchmark import CUDA
from torch import Tensor

from fastmae.data import fixed_crops, open_dataset

COMPETITORS = ["facebookresearch-plain", "facebookresearch-sdpa", "transformers", "fastmae"]
COMPETITORS += ["reference-compile", "fastmae-compile"]


class OnPhotographs(bench_step.Setting):
    """A competitor's own weights, trained on photographs and given masks; keeps every loss."""

    lr = 3e-4

    def draw_images(self) -> Tensor:
        return fixed_crops(open_dataset(None), self.fast.img_size, seed=0, epoch=0, count=self.batch)

    def train(self, loss: Callable, needs_masking: bool, *args) -> Callable[[], None]:
        step, self.losses = super().train(loss, True, *args), []
        return lambda: self.losses.append(step())


def build(model: str, device: torch.device, dtype: torch.dtype) -> Benchmark:
    label, architecture, *batches = bench_step.MODELS[model]
    batch, settings = batches[0 if CUDA else 1], {}

    def start(name: str, recipe: bench_step.Recipe) -> Callable[[], object]:
        settings[name] = OnPhotographs(architecture, batch, device)
        return settings[name].step(name, recipe)

    def losses(name: str, rounds: int) -> dict:
        found = settings[name].losses
        return {"losses": [found[0].item(), found[-1].item()], "steps": len(found)}

    recipes = bench_step.in_precision({name: bench_step.RECIPES[name] for name in COMPETITORS}, dtype)
    return Benchmark(
        f"training to the same loss, {label}, batch {batch}", bench_step.available(recipes, device, start),
        images=batch, flush=False, dtype=dtype, seconds=20.0 if CUDA else 60.0, facts=losses,
    )  # fmt: skip


@pytest.mark.parametrize("competitor", COMPETITORS)
def bench_quick(compete, request, device, dtype, competitor):
    model = "tiny-test" if request.config.getoption("--tiny") else "base" if CUDA else "small"
    compete(build, model, device, dtype)
