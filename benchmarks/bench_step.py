"""One whole training step: fastmae, facebookresearch/mae's way of training, torch.compile, Hugging Face.

All competitors but Hugging Face's and table 1c's train the same parameters, in turn. A step begins with a batch on the
device and ends after the optimiser; bf16 autocast, or fp32 where the CPU is faster in it, unless the name says fp16.
The baselines get normalised float images at no cost, fastmae the raw bytes. Loading, logging and gradient norms are
left out.

``facebookresearch-*``   the model of facebookresearch/mae: ``-plain`` with the attention of timm 0.3.2, which it pins,
                         ``-sdpa`` with that of today's timm; AdamW with PyTorch's defaults; ``-fp16`` with a GradScaler
                         as its training script
``reference-compile``    ``-sdpa`` with torch.compile and fused AdamW: the baseline to beat
``*-bf16-residual``      the blocks' residual stream in bfloat16, another computation
``*-xformers``, ``*-apex-adam``  fastmae with xformers' attention, with apex's FusedAdam, where they are installed
``transformers-fastmae`` Hugging Face's model after ``fastmae.accelerate``
``*-graph``              forward, backward and optimiser as one CUDA graph
``encoder-mask-tokens``  table 1c of the paper: the encoder sees all positions, another computation (with --changes)
``change: ...``          one change to ``facebookresearch-sdpa`` (with --changes)
``fastmae-compile-...``  modes of torch.compile (with --changes); "reduce-overhead" and "max-autotune" replay graphs of
                         forward and backward. What does not win there does not become the default.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from benchmark import Benchmark, Unavailable, lazily
from facebook import Changes, FacebookMAE, share_parameters
from op_benchmark import CUDA
from torch import Tensor

import fastmae
from fastmae.interop import decelerate
from fastmae.model import MaskedAutoencoderViT, build_model, create_model
from fastmae.ops import attention, random_masking
from fastmae.train.compilation import uses_cuda_graphs
from fastmae.train.optim import create_apex_adam, parameter_groups, set_learning_rate

MASK_RATIO, BETAS = 0.75, (0.9, 0.95)
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


@dataclass(frozen=True)
class Recipe:
    """One way to train: facebookresearch's model with changes, or fastmae's (None), and what is around it."""

    changes: Changes | None = None
    residual_dtype: str = "float32"
    attention: str = "auto"
    encoder_mask_tokens: bool = False
    fused_adamw: bool = True
    apex_adam: bool = False
    compile: str = ""  # a mode of torch.compile, or not at all
    graph: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def in_graphs(self) -> bool:
        return self.graph or uses_cuda_graphs(self.compile)


BF16 = "bfloat16"
RECIPES = {
    "facebookresearch-plain-fp16": Recipe(Changes("plain"), fused_adamw=False, dtype=torch.float16),
    "facebookresearch-plain": Recipe(Changes("plain"), fused_adamw=False),
    "facebookresearch-sdpa": Recipe(Changes(), fused_adamw=False),
    "reference-compile": Recipe(Changes(), compile="default"),
    "reference-compile-bf16-residual": Recipe(Changes(bf16_residual=True), compile="default"),
    "transformers": Recipe(Changes()),
    "fastmae": Recipe(),
    "fastmae-compile": Recipe(compile="default"),
    "fastmae-graph": Recipe(graph=True),
    "transformers-fastmae": Recipe(Changes()),
    "fastmae-xformers": Recipe(attention="xformers"),
    "fastmae-apex-adam": Recipe(apex_adam=True),
    "fastmae-bf16-residual": Recipe(residual_dtype=BF16),
    "fastmae-compile-bf16-residual": Recipe(residual_dtype=BF16, compile="default"),
    "fastmae-graph-bf16-residual": Recipe(residual_dtype=BF16, graph=True),
}
CHANGES = {
    "change: fused AdamW": Recipe(Changes()),
    "change: attention backend": Recipe(Changes("fastmae"), fused_adamw=False),
    "change: patch and token ops": Recipe(Changes(ops=True), fused_adamw=False),
    "change: fused blocks": Recipe(Changes(blocks=True), fused_adamw=False),
    "change: fused blocks, weights cast once": Recipe(Changes(blocks=True, cast_once=True), fused_adamw=False),
    "change: bf16 residual": Recipe(Changes(bf16_residual=True), fused_adamw=False),
    "change: torch.compile": Recipe(Changes(), fused_adamw=False, compile="default"),
    "encoder-mask-tokens": Recipe(encoder_mask_tokens=True),
    "fastmae-compile-graph": Recipe(compile="default", graph=True),
    "fastmae-compile-reduce-overhead": Recipe(compile="reduce-overhead"),
    "fastmae-compile-max-autotune": Recipe(compile="max-autotune"),
}


def in_precision(recipes: dict[str, Recipe], dtype: torch.dtype) -> dict[str, Recipe]:
    """The recipes for bf16 in another dtype; those whose name says fp16 stay what they are."""
    return {name: replace(r, dtype=dtype) if r.dtype == torch.bfloat16 else r for name, r in recipes.items()}


def missing(competitor: str, recipe: Recipe, device: torch.device, cuda: Any = torch.cuda) -> str | None:
    """Why a competitor cannot run here, or None; ``cuda`` may be an imitation of ``torch.cuda``."""
    changes, on_cuda = recipe.changes or Changes(), device.type == "cuda"
    if recipe.dtype == torch.float16 and not on_cuda:
        return "fp16 training is for CUDA"
    in_bf16 = recipe.residual_dtype == BF16 or changes.bf16_residual or changes.cast_once
    if in_bf16 and recipe.dtype == torch.float32:
        return "a change to bf16 training"
    if recipe.in_graphs and not on_cuda and cuda is torch.cuda:
        return "graphs are for CUDA"
    if competitor.startswith("transformers") and find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        if recipe.attention != "auto":
            q = torch.zeros(1, 16, 1, 32, device=device, dtype=recipe.dtype)
            attention(q, q, q, recipe.attention)
        if recipe.apex_adam:
            if not on_cuda:
                return "apex's FusedAdam is for CUDA"
            create_apex_adam([{"params": [torch.zeros(1, device=device, requires_grad=True)]}], BETAS)
    except ValueError as error:
        return str(error)
    return None


def available(recipes: dict[str, Recipe], device: torch.device, start: Callable, cuda: Any = torch.cuda) -> dict:
    """Calls for a benchmark: ``start`` gets a name and a recipe, and makes a step when it is first called for."""
    steps = {}
    for name, recipe in recipes.items():
        reason = missing(name, recipe, device, cuda)
        steps[name] = Unavailable(reason) if reason else lazily(partial(start, name, recipe))
    return steps


class Setting:
    """One set of parameters, a batch and optimisers, from which every competitor's step is made."""

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
        self.optimizers = {fused: self.adamw(self.fast, fused=fused or None) for fused in (False, True)}
        self.capturable: torch.optim.Optimizer | None = None
        self.graph_memory: tuple[int, int] | None = None

    def draw_images(self) -> Tensor:
        """Raw bytes (N, 3, H, W), channels last in memory."""
        return torch.randint(0, 256, (self.batch, *self.fast.img_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def draw_masks(self) -> fastmae.ops.Masking:
        self.position += 1
        return random_masking(
            self.batch, self.fast.num_patches, MASK_RATIO, seed=0, epoch=self.position, device=self.device
        )

    def adamw(self, model: torch.nn.Module, **options) -> torch.optim.AdamW:
        groups = parameter_groups(model, weight_decay=0.05)
        return torch.optim.AdamW(groups, **{"lr": self.lr, "betas": BETAS, **options})

    def step(self, name: str, recipe: Recipe) -> Callable[[], object]:
        """A training step by a recipe."""
        if name.startswith("transformers"):
            return self.step_transformers(recipe, accelerated=name == "transformers-fastmae")
        around, optimizer = nullcontext, self.optimizers[recipe.fused_adamw]
        if recipe.changes is None:
            if recipe.encoder_mask_tokens:
                model = build_model(self.fast.architecture | {"encoder_mask_tokens": True}).to(self.device).train()
                optimizer = self.adamw(model, fused=True)
            else:
                model = share_parameters(self.fast, residual_dtype=recipe.residual_dtype, attention=recipe.attention)
            loss = lambda masking: model(self.images, masking=masking, full_pred=False).loss  # noqa: E731
            if recipe.dtype != torch.float32:  # as fastmae's trainer does
                around = partial(model.cast_weights, recipe.dtype)
        else:
            model = FacebookMAE(self.fast, recipe.changes)
            loss = lambda masking: model(self.images, self.pixels, masking, MASK_RATIO)  # noqa: E731
        if recipe.graph:
            return self.train_in_graph(loss, recipe, around)
        needs_masking = recipe.changes is None or recipe.changes.ops
        if recipe.apex_adam:
            optimizer = create_apex_adam(parameter_groups(self.fast, weight_decay=0.05), BETAS)
            set_learning_rate(optimizer, self.lr)
        return self.train(loss, needs_masking, recipe, optimizer, around)

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
        # The weights that fastmae's model is drawn with: a model made from a config has no positions.
        fastmae.accelerate(model, init=True, seed=0, full_logits=False)
        if not accelerated:
            decelerate(model)

        def loss(masking):
            return model(self.pixels, noise=None if masking is None else masking.ids_restore.float()).loss

        return self.train(loss, False, recipe, self.adamw(model, fused=True))

    def compiled(self, loss: Callable, mode: str) -> Callable:
        if not mode:
            return loss
        if self.cuda is not torch.cuda:  # an imitation, for which nothing is generated
            return torch.compile(loss, dynamic=False, backend="eager")
        return torch.compile(loss, dynamic=False, mode=mode)

    def train(
        self, loss: Callable, needs_masking: bool, recipe: Recipe, optimizer, around: Callable = nullcontext
    ) -> Callable[[], Tensor]:
        device, forward = self.device.type, self.compiled(loss, recipe.compile)
        # A start from 65536, the default, would skip the first steps, and a skipped step is a fast one.
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=recipe.dtype == torch.float16)

        def step() -> Tensor:
            masking = self.draw_masks() if needs_masking else None
            if uses_cuda_graphs(recipe.compile):
                torch.compiler.cudagraph_mark_step_begin()
            with around():
                with torch.autocast(device, dtype=recipe.dtype, enabled=recipe.dtype != torch.float32):
                    value = forward(masking)
                scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return value.detach()

        return step

    def train_in_graph(self, loss: Callable, recipe: Recipe, around: Callable) -> Callable[[], None]:
        """A training step that is one CUDA graph, from masks that lie where it reads them to the updated weights."""
        forward, masking = self.compiled(loss, recipe.compile), self.draw_masks()
        if self.capturable is None:
            lr = torch.tensor(self.lr, device=self.device)  # where a schedule would write it
            self.capturable = self.adamw(self.fast, lr=lr, fused=True, capturable=True)

        def work() -> None:
            with around():
                with torch.autocast(self.device.type, dtype=recipe.dtype):
                    value = forward(masking)
                value.backward()
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


def build(model: tuple[str, int], recipes: dict, device: torch.device, cuda: Any = torch.cuda) -> Benchmark:
    """``model``: a name of ``MODELS`` and a batch size."""
    name, batch = model
    setting = Setting(MODELS[name][1], batch, device, cuda)
    weights = sum(p.numel() * p.element_size() for p in setting.fast.parameters())
    return Benchmark(
        f"training step, {MODELS[name][0]}, batch {batch}", available(recipes, device, setting.step, cuda),
        images=batch, flush=False, hide_host=False, repeats=2 if CUDA else 1, seconds=20.0 if CUDA else 5.0,
        # The allocator does not count the memory of graphs.
        resident_bytes={competitor: 3 * weights for competitor, recipe in recipes.items() if not recipe.in_graphs},
        dtype=recipes["fastmae"].dtype,
    )  # fmt: skip


def pytest_generate_tests(metafunc):
    config, models = metafunc.config, []
    for choice in config.getoption("--model") or (["large", "base"] if CUDA else ["tiny-test"]):
        name, _, batch = choice.partition(":")
        if name not in MODELS:
            raise pytest.UsageError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}")
        models.append((name, int(batch or MODELS[name][2 if CUDA else 3])))
    metafunc.parametrize("model", models, ids=lambda model: f"{model[0]}-{model[1]}")
    metafunc.parametrize("competitor", list(RECIPES | (CHANGES if config.getoption("--changes") else {})))


def bench_step(compete, device, dtype, timer, model, competitor):
    compete(build, model, in_precision(RECIPES | CHANGES, dtype), device, timer.cuda)
