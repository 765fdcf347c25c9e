"""One training step, the whole of it: fastmae, facebookresearch/mae's way of training, torch.compile, Hugging Face.

All competitors but Hugging Face's train the same parameters, in turn. A step begins with a batch on the device and ends
after the optimiser; bf16 autocast, or fp32 where the CPU is faster in it, unless the name says fp16. The baselines are
given the normalised float images for nothing, fastmae the raw bytes. Loading, logging and gradient norms are left out.

``facebookresearch-*``   the model of facebookresearch/mae: ``-plain`` with the attention of timm 0.3.2, which it pins,
                         ``-sdpa`` with that of today's timm; AdamW with PyTorch's defaults; ``-fp16`` with a GradScaler
                         as its training script
``reference-compile``    ``-sdpa`` with torch.compile and fused AdamW: the baseline to beat
``*-bf16-residual``      the blocks' residual stream in bfloat16, another computation (compiled: --bf16-residual)
``*-xformers``, ``*-apex-adam``  fastmae with xformers' attention, with apex's FusedAdam, where they are installed
``transformers-fastmae`` Hugging Face's model after ``fastmae.accelerate``
``lever: ...``           one change to ``facebookresearch-sdpa`` (with --levers)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from comparison import Comparison, Unavailable, later
from levers import LeverModel, share_parameters
from step_recipes import LEVERS, RECIPES, Recipe, compiled, in_graphs, in_precision, missing
from torch import Tensor

import fastmae
from fastmae.interop import decelerate
from fastmae.model import MaskedAutoencoderViT, create_model
from fastmae.ops import random_masking
from fastmae.train.compilation import uses_cuda_graphs
from fastmae.train.optim import parameter_groups

CUDA = torch.cuda.is_available()
MASK_RATIO = 0.75
# --model: name in tables, preset or arguments, batch on CUDA, batch on a CPU.
MODELS = {
    "large": ("ViT-L/16", "mae_vit_large_patch16", 256, 4),
    "base": ("ViT-B/16", "mae_vit_base_patch16", 256, 8),
    "huge": ("ViT-H/14", "mae_vit_huge_patch14", 128, 2),
    "small": ("ViT-S/16", "mae_vit_small_patch16", 1024, 8),
    "small-32px": (
        "192 wide, 12 deep, 32 px, patch 4",
        {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3,
         "decoder_embed_dim": 128, "decoder_depth": 4, "decoder_num_heads": 4}, 1024, 128,
    ),
    "tiny-test": (
        "2 blocks, 32 px",
        {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3,
         "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}, 64, 16,
    ),
}  # fmt: skip
DEFAULT_MODELS = ["large", "base"] if CUDA else ["tiny-test"]


class Track:
    """One set of parameters, the batch, and both optimisers, from which every competitor's step is made."""

    lr = 1e-5

    def __init__(self, architecture: str | dict, batch: int, device: torch.device, cuda: Any = torch.cuda):
        options = {"norm_pix_loss": True, "seed": 0}
        named = isinstance(architecture, str)
        self.fast = create_model(architecture, **options) if named else MaskedAutoencoderViT(**architecture, **options)
        self.fast.to(device).train()
        torch.backends.cudnn.benchmark = True  # as facebookresearch/mae's training script sets it
        self.batch, self.device, self.cuda, self.position = batch, device, cuda, 0
        self.images = self.draw_images().to(device)
        mean, std = (s.view(1, 3, 1, 1) for s in (self.fast.mean, self.fast.std))
        self.pixels = ((self.images / 255 - mean) / std).contiguous()
        self.optimizers = {fused: self.optimizer(self.fast, fused) for fused in (False, True)}
        self.capturable: torch.optim.Optimizer | None = None
        self.graph_memory: tuple[int, int] | None = None

    def draw_images(self) -> Tensor:
        """Raw bytes (N, 3, H, W), channels last in memory."""
        return torch.randint(0, 256, (self.batch, *self.fast.img_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def optimizer(self, model: torch.nn.Module, fused: bool) -> torch.optim.AdamW:
        groups = parameter_groups(model, weight_decay=0.05)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True if fused else None)

    def step(self, recipe: Recipe) -> Callable[[], None]:
        """A training step by a recipe."""
        around = nullcontext
        if recipe.levers is None:
            model = share_parameters(self.fast, residual_dtype=recipe.residual_dtype, attention=recipe.attention)

            def loss(masking):
                return model(self.images, masking=masking, full_pred=False).loss

            def around():  # as fastmae's trainer does
                return nullcontext() if recipe.dtype == torch.float32 else model.cast_weights(recipe.dtype)
        else:
            model = LeverModel(self.fast, recipe.levers)

            def loss(masking):
                return model(self.images, self.pixels, masking, MASK_RATIO)

        if recipe.graph:
            return self.train_in_graph(loss, recipe, around)
        needs_masking = recipe.levers is None or recipe.levers.ops or recipe.levers.masked_only
        optimizer = self.apex_adam() if recipe.apex_adam else self.optimizers[recipe.fused_adamw]
        return self.train(loss, needs_masking, recipe, optimizer, around)

    def apex_adam(self):
        from apex.optimizers import FusedAdam

        return FusedAdam(parameter_groups(self.fast, weight_decay=0.05), lr=1e-5, betas=(0.9, 0.95), adam_w_mode=True)

    def step_transformers(self, recipe: Recipe, accelerated: bool) -> Callable[[], Tensor]:
        """A training step of Hugging Face's ViTMAE, with fused AdamW."""
        import transformers

        a = self.fast.architecture
        config = transformers.ViTMAEConfig(
            hidden_size=a["embed_dim"], num_hidden_layers=a["depth"], num_attention_heads=a["num_heads"],
            intermediate_size=int(a["embed_dim"] * a["mlp_ratio"]), image_size=a["img_size"][0],
            patch_size=a["patch_size"][0], decoder_hidden_size=a["decoder_embed_dim"],
            decoder_num_hidden_layers=a["decoder_depth"], decoder_num_attention_heads=a["decoder_num_heads"],
            decoder_intermediate_size=int(a["decoder_embed_dim"] * a["mlp_ratio"]), layer_norm_eps=1e-6,
            mask_ratio=MASK_RATIO, norm_pix_loss=True,
        )  # fmt: skip
        with self.device:
            model = transformers.ViTMAEForPreTraining(config).train()
        # The weights that fastmae's model is drawn with: what a config makes has no positions.
        fastmae.accelerate(model, init=True, seed=0, full_logits=False)
        if not accelerated:
            decelerate(model)

        def loss(masking):
            return model(self.pixels, noise=None if masking is None else masking.ids_restore.float()).loss

        return self.train(loss, False, recipe, self.optimizer(model, fused=True))

    def train(
        self, loss: Callable, needs_masking: bool, recipe: Recipe, optimizer, around: Callable = nullcontext
    ) -> Callable[[], Tensor]:
        device, forward = self.device.type, compiled(loss, recipe)
        # A start from 65536, the default, would skip the first steps, and a skipped step is a fast one.
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=recipe.dtype == torch.float16)

        def step() -> Tensor:
            masking = self.draw_masks() if needs_masking else None
            if uses_cuda_graphs(recipe.compile_mode):
                torch.compiler.cudagraph_mark_step_begin()
            with around():
                with torch.autocast(device, dtype=recipe.dtype, enabled=recipe.dtype != torch.float32):
                    value = forward(masking)
                scaler.scale(value).backward()
            self.clip(recipe)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return value.detach()

        return step

    def clip(self, recipe: Recipe) -> None:
        if recipe.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.fast.parameters(), recipe.clip_grad)

    def draw_masks(self):
        self.position += 1
        return random_masking(
            self.batch, self.fast.num_patches, MASK_RATIO, seed=0, epoch=self.position, device=self.device
        )

    def train_in_graph(self, loss: Callable, recipe: Recipe, around: Callable) -> Callable[[], None]:
        """A training step that is one CUDA graph, from masks that lie where it reads them to the updated weights."""
        forward, masking = compiled(loss, recipe), self.draw_masks()
        if self.capturable is None:
            groups = parameter_groups(self.fast, weight_decay=0.05)
            lr = torch.tensor(1e-5, device=self.device)  # where a schedule would write it
            self.capturable = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=True)

        def work() -> None:
            with around():
                with torch.autocast(self.device.type, dtype=recipe.dtype):
                    value = forward(masking)
                value.backward()
            self.clip(recipe)
            self.capturable.step()
            self.capturable.zero_grad(set_to_none=True)

        aside = self.cuda.Stream()
        aside.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(aside):
            for _ in range(3):
                work()
        self.cuda.current_stream().wait_stream(aside)
        graph = self.cuda.CUDAGraph()
        # One graph leaves nothing that the next one has to find, so that all may use the same memory.
        with self.cuda.graph(graph, pool=self.graph_memory):
            work()
        self.graph_memory = graph.pool()

        def step() -> None:
            torch._foreach_copy_(list(masking), list(self.draw_masks()))
            graph.replay()

        return step


def chosen_models(config, default: list[str]) -> list[tuple[str, int]]:
    """Names and batches that --model names."""
    models = []
    for choice in config.getoption("--model") or default:
        name, _, batch = choice.partition(":")
        if name not in MODELS:
            raise pytest.UsageError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}")
        models.append((name, int(batch) if batch else MODELS[name][2 if CUDA else 3]))
    return models


def model_id(model: tuple[str, int]) -> str:
    return f"{model[0]}-{model[1]}"


def pytest_generate_tests(metafunc):
    recipes = RECIPES | (LEVERS if metafunc.config.getoption("--levers") else {})
    if not metafunc.config.getoption("--bf16-residual"):
        recipes = {name: recipe for name, recipe in recipes.items() if not name.endswith("-compile-bf16-residual")}
    metafunc.parametrize("model", chosen_models(metafunc.config, DEFAULT_MODELS), ids=model_id)
    metafunc.parametrize("competitor", list(recipes))


def build(
    model: tuple[str, int],
    recipes: dict[str, Recipe],
    device: torch.device,
    job: str = "training step",
    cuda: Any = torch.cuda,
) -> Comparison:
    name, batch = model
    track = Track(MODELS[name][1], batch, device, cuda)
    steps: dict = {}
    for competitor, recipe in recipes.items():
        reason = missing(competitor, recipe, device, cuda)
        if reason:
            steps[competitor] = Unavailable(reason)
        elif competitor.startswith("transformers"):
            steps[competitor] = later(partial(track.step_transformers, recipe, competitor == "transformers-fastmae"))
        else:
            steps[competitor] = later(partial(track.step, recipe))
    weights = sum(p.numel() * p.element_size() for p in track.fast.parameters())
    return Comparison(
        f"{job}, {MODELS[name][0]}, batch {batch}", steps, images=batch, flush=False, hides_host=False,
        resident_bytes=dict.fromkeys(steps, 3 * weights), calls=2 if CUDA else 1, seconds=20.0 if CUDA else 5.0,
        unseen_memory={competitor for competitor, recipe in recipes.items() if in_graphs(recipe)},
        dtype=recipes.get("fastmae", Recipe()).dtype,
    )  # fmt: skip


def bench_step(compete, device, dtype, model, competitor):
    compete(build, model, in_precision(RECIPES | LEVERS, dtype), device)
