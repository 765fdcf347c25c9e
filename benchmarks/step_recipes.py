"""The ways to train that the step benchmark compares: each by name, and what it needs to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from levers import Levers

from fastmae.ops import attention
from fastmae.train.autotune import measure_products
from fastmae.train.compilation import uses_cuda_graphs


@dataclass(frozen=True)
class Recipe:
    """One way to train: the model (levers, or None for fastmae's own with a residual dtype), and what is around it."""

    levers: Levers | None = None
    residual_dtype: str = "float32"
    attention: str = "auto"
    fused_adamw: bool = True
    apex_adam: bool = False
    compile: bool = False
    compile_mode: str = "default"
    backend: str = "inductor"
    graph: bool = False
    clip_grad: float | None = None
    dtype: torch.dtype = torch.bfloat16


RECIPES = {
    "facebookresearch-plain-fp16": Recipe(Levers("plain"), fused_adamw=False, dtype=torch.float16),
    "facebookresearch-plain": Recipe(Levers("plain"), fused_adamw=False),
    "facebookresearch-sdpa": Recipe(Levers(), fused_adamw=False),
    "reference-compile": Recipe(Levers(), compile=True),
    "reference-compile-bf16-residual": Recipe(Levers(bf16_residual=True), compile=True),
    "transformers": Recipe(Levers()),
    "fastmae": Recipe(),
    "fastmae-compile": Recipe(compile=True),
    "transformers-fastmae": Recipe(Levers()),
    "fastmae-xformers": Recipe(attention="xformers"),
    "fastmae-apex-adam": Recipe(apex_adam=True),
    "fastmae-bf16-residual": Recipe(residual_dtype="bfloat16"),
    "fastmae-compile-bf16-residual": Recipe(residual_dtype="bfloat16", compile=True),
}
LEVERS = {
    "lever: fused AdamW": Recipe(Levers()),
    "lever: attention backend": Recipe(Levers("fastmae"), fused_adamw=False),
    "lever: patch and token ops": Recipe(Levers(ops=True), fused_adamw=False),
    "lever: masked rows only": Recipe(Levers(masked_only=True), fused_adamw=False),
    "lever: fused blocks": Recipe(Levers(blocks=True), fused_adamw=False),
    "lever: fused blocks, weights cast once": Recipe(Levers(blocks=True, cast_once=True), fused_adamw=False),
    "lever: bf16 residual": Recipe(Levers(bf16_residual=True), fused_adamw=False),
    "lever: torch.compile": Recipe(Levers(), fused_adamw=False, compile=True),
}
MODES = {
    "fastmae": Recipe(),
    "fastmae-compile": Recipe(compile=True),
    "fastmae-graph": Recipe(graph=True),
    "fastmae-compile-graph": Recipe(compile=True, graph=True),
    "fastmae-compile-reduce-overhead": Recipe(compile=True, compile_mode="reduce-overhead"),
    "fastmae-compile-max-autotune-no-cudagraphs": Recipe(compile=True, compile_mode="max-autotune-no-cudagraphs"),
    "fastmae-compile-max-autotune": Recipe(compile=True, compile_mode="max-autotune"),
}


def compiled(loss: Callable, recipe: Recipe) -> Callable:
    if not recipe.compile:
        return loss
    mode = recipe.compile_mode if recipe.backend == "inductor" else None
    return torch.compile(loss, dynamic=False, mode=mode, backend=recipe.backend)


def usual_precision(device: torch.device) -> tuple[str, str]:
    """The precision that ``--train.precision auto`` takes for a ViT-B on a device, and why."""
    if device.type != "cpu":
        return "bf16", "the default on a GPU"
    speeds = measure_products(width=768)
    return "bf16" if speeds.bf16 > speeds.fp32 else "fp32", f"matrix products run at {speeds}"


def in_precision(recipes: dict[str, Recipe], dtype: torch.dtype) -> dict[str, Recipe]:
    """The recipes for bf16 in another dtype; those whose name says fp16 stay what they are."""
    return {name: replace(r, dtype=dtype) if r.dtype == torch.bfloat16 else r for name, r in recipes.items()}


def in_graphs(recipe: Recipe) -> bool:
    return recipe.graph or uses_cuda_graphs(recipe.compile_mode)


def missing(competitor: str, recipe: Recipe, device: torch.device, cuda: Any = torch.cuda) -> str | None:
    """Why a competitor cannot run here, or None; ``cuda`` may be a stand-in for ``torch.cuda``."""
    if recipe.dtype == torch.float16 and device.type != "cuda":
        return "fp16 training is for CUDA"
    levers = recipe.levers or Levers()
    in_bf16 = recipe.residual_dtype == "bfloat16" or levers.bf16_residual or levers.cast_once
    if recipe.dtype == torch.float32 and in_bf16:
        return "a lever of bf16 training"
    if in_graphs(recipe) and device.type != "cuda" and cuda is torch.cuda:
        return "graphs are for CUDA"
    if competitor.startswith("transformers") and find_spec("transformers") is None:
        return "transformers is not installed"
    if recipe.attention != "auto":
        q = torch.zeros(1, 16, 1, 32, device=device, dtype=recipe.dtype)
        try:
            attention(q, q, q, recipe.attention)
        except ValueError as error:
            return str(error)
    if recipe.apex_adam:
        if device.type != "cuda":
            return "apex's FusedAdam is for CUDA"
        try:
            import amp_C  # noqa: F401
            from apex.optimizers import FusedAdam  # noqa: F401
        except Exception as error:  # an unrelated package, or extensions that were built for another torch
            return f"NVIDIA's apex does not load: {error}"
    return None
