"""One training step, the whole of it: fastmae, facebookresearch/mae's way of training, torch.compile, Hugging Face.

All competitors but Hugging Face's train the same parameters, in turn. A step begins with a batch on the device and ends
after the optimiser; bf16 autocast unless the name says fp16. The baselines are given the normalised float images for
nothing, fastmae the raw bytes. Left out for all: loading, logging, gradient norms.

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
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from contest import Contest, Unavailable, later
from levers import LeverModel, Levers, share_parameters

import fastmae
from fastmae.model import MaskedAutoencoderViT, create_model
from fastmae.ops import attention, random_masking
from fastmae.train.optim import parameter_groups

CUDA = torch.cuda.is_available()
MASK_RATIO = 0.75
# --model: name in tables, preset or arguments, batch on CUDA, batch on a CPU.
MODELS = {
    "large": ("ViT-L/16", "mae_vit_large_patch16", 256, 4),
    "base": ("ViT-B/16", "mae_vit_base_patch16", 256, 8),
    "huge": ("ViT-H/14", "mae_vit_huge_patch14", 128, 2),
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


@dataclass(frozen=True)
class Recipe:
    """One way to train: the model (levers, or None for fastmae's own with a residual dtype), and what is around it."""

    levers: Levers | None = None
    residual_dtype: str = "float32"
    attention: str = "auto"
    fused_adamw: bool = True
    apex_adam: bool = False
    compile: bool = False
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


class Track:
    """One set of parameters, the batch, and both optimisers, from which every competitor's step is made."""

    def __init__(self, architecture: str | dict, batch: int, device: torch.device):
        options = {"norm_pix_loss": True, "seed": 0}
        named = isinstance(architecture, str)
        self.fast = create_model(architecture, **options) if named else MaskedAutoencoderViT(**architecture, **options)
        self.fast.to(device).train()
        torch.backends.cudnn.benchmark = True  # as facebookresearch/mae's training script sets it
        self.batch, self.device, self.position = batch, device, 0
        shape = (batch, *self.fast.img_size, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        mean, std = (s.view(1, 3, 1, 1) for s in (self.fast.mean, self.fast.std))
        self.pixels = ((self.images / 255 - mean) / std).contiguous()
        self.optimizers = {fused: self.optimizer(self.fast, fused) for fused in (False, True)}

    def optimizer(self, model: torch.nn.Module, fused: bool) -> torch.optim.AdamW:
        groups = parameter_groups(model, weight_decay=0.05)
        return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True if fused else None)

    def step(self, recipe: Recipe) -> Callable[[], None]:
        """A training step by a recipe."""
        around = nullcontext
        if recipe.levers is None:
            model = share_parameters(self.fast, residual_dtype=recipe.residual_dtype, attention=recipe.attention)

            def loss(masking):
                return model(self.images, masking=masking, full_pred=False).loss

            def around():  # as fastmae's trainer does
                return model.cast_weights(recipe.dtype)
        else:
            model = LeverModel(self.fast, recipe.levers)

            def loss(masking):
                return model(self.images, self.pixels, masking, MASK_RATIO)

        needs_masking = recipe.levers is None or recipe.levers.ops or recipe.levers.masked_only
        optimizer = self.apex_adam() if recipe.apex_adam else self.optimizers[recipe.fused_adamw]
        return self.train(loss, needs_masking, recipe, optimizer, around)

    def apex_adam(self):
        from apex.optimizers import FusedAdam

        return FusedAdam(parameter_groups(self.fast, weight_decay=0.05), lr=1e-5, betas=(0.9, 0.95), adam_w_mode=True)

    def step_transformers(self, accelerated: bool) -> Callable[[], None]:
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
            for parameter in model.parameters():
                if parameter.ndim == 3:  # position tables and tokens, which are zero in a model built from a config
                    torch.nn.init.normal_(parameter, std=0.02)
        if accelerated:
            fastmae.accelerate(model, full_logits=False)
        recipe = Recipe(Levers())
        return self.train(lambda _: model(self.pixels).loss, False, recipe, self.optimizer(model, fused=True))

    def train(
        self, loss: Callable, needs_masking: bool, recipe: Recipe, optimizer, around: Callable = nullcontext
    ) -> Callable[[], None]:
        device, forward = self.device.type, torch.compile(loss, dynamic=False) if recipe.compile else loss
        # A start from 65536, the default, would skip the first steps, and a skipped step is a fast one.
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=recipe.dtype == torch.float16)

        def step() -> None:
            masking = None
            if needs_masking:
                self.position += 1
                masking = random_masking(
                    self.batch, self.fast.num_patches, MASK_RATIO, seed=0, epoch=self.position, device=self.device
                )
            with around():
                with torch.autocast(device, dtype=recipe.dtype):
                    value = forward(masking)
                scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return step


def pytest_generate_tests(metafunc):
    models = []
    for choice in metafunc.config.getoption("--model") or DEFAULT_MODELS:
        name, _, batch = choice.partition(":")
        if name not in MODELS:
            raise pytest.UsageError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}")
        models.append((name, int(batch) if batch else MODELS[name][2 if CUDA else 3]))
    recipes = RECIPES | (LEVERS if metafunc.config.getoption("--levers") else {})
    if not metafunc.config.getoption("--bf16-residual"):
        recipes = {name: recipe for name, recipe in recipes.items() if not name.endswith("-compile-bf16-residual")}
    metafunc.parametrize("model", models, ids=lambda model: f"{model[0]}-{model[1]}")
    metafunc.parametrize("competitor", list(recipes))


def missing(competitor: str, recipe: Recipe, device: torch.device) -> str | None:
    """Why a competitor cannot run here, or None."""
    if recipe.dtype == torch.float16 and device.type != "cuda":
        return "fp16 training is for CUDA"
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


def build(model: tuple[str, int], names: list[str], device: torch.device) -> Contest:
    name, batch = model
    track = Track(MODELS[name][1], batch, device)
    steps: dict = {}
    for competitor in names:
        recipe = (RECIPES | LEVERS)[competitor]
        reason = missing(competitor, recipe, device)
        if reason:
            steps[competitor] = Unavailable(reason)
        elif competitor.startswith("transformers"):
            steps[competitor] = later(partial(track.step_transformers, competitor == "transformers-fastmae"))
        else:
            steps[competitor] = later(partial(track.step, recipe))
    weights = sum(p.numel() * p.element_size() for p in track.fast.parameters())
    return Contest(
        f"training step, {MODELS[name][0]}, batch {batch}", steps, images=batch, flush=False,
        resident_bytes=dict.fromkeys(steps, 3 * weights), calls=2 if CUDA else 1, seconds=20.0 if CUDA else 5.0,
    )  # fmt: skip


def bench_step(compete, device, model, competitor):
    names = list(RECIPES | LEVERS)
    compete(build, model, names, device)
