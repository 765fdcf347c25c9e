"""Recipes: complete configurations that give the flags of ``fastmae pretrain`` their defaults.

Each has a version, which the configuration of a run carries. Whoever changes a value of a recipe, or a default that one
depends on, gives it the next version; a test fails otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastmae.train.config import (
    SECTIONS,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    RecipeName,
    ReportConfig,
    TrainConfig,
    read_config,
)

PHOTOGRAPHS = PretrainConfig(
    recipe="photographs",
    recipe_version=3,
    model=ModelConfig(
        name="mae_vit_tiny_patch16",
        img_size=64,
        patch_size=8,
        embed_dim=128,
        depth=3,
        num_heads=4,
        decoder_embed_dim=192,
        decoder_depth=1,
        decoder_num_heads=6,
    ),
    # Fourteen photographs are soon known by heart: smaller crops and vertical flips make more of them.
    data=DataConfig(scale=(0.1, 1.0), vflip=0.25),
    train=TrainConfig(
        global_batch_size=32,
        # More of them go on lowering the error on new crops, and raise it on a photograph that the model has not seen.
        steps=1_750,
        warmup_steps=200,
        base_lr=1.2e-2,
        # A step takes a third longer than AdamW's, and half as many steps reach the same error (docs/photographs.md).
        optimizer="muon",
        muon_lr=6e-2,
        weight_decay=0.15,
        # Two threads wait for each other at every operation, spinning: beside a busy neighbour a step then takes tens
        # of times as long (docs/photographs.md).
        num_threads=1,
        max_minutes=3.9,
        fit_steps=True,
        log_every_steps=50,
        checkpoint_every_seconds=30.0,
        keep_checkpoints=2,
    ),
    # At most four pictures, at half a second each: 1 % of the run.
    report=ReportConfig(picture_every_steps=1500),
)
"""A small model on the embedded photographs: minutes on two CPU cores, with as many steps as fit into them."""


def _imagenet(recipe: RecipeName, name: str, epochs: float = 800) -> PretrainConfig:
    """Table 8 of the paper, with the normalised pixels of its best models and of facebookresearch/mae's command.

    The paper trains for 800 epochs in its ablations and for 1600 in its comparisons, with 40 of warm-up (table 8).
    """
    return PretrainConfig(
        recipe=recipe,
        recipe_version=3,
        model=ModelConfig(name=name, norm_pix_loss=True),
        train=TrainConfig(
            global_batch_size=4096,
            batch_size="auto",
            epochs=epochs,
            # A run shorter than the paper's keeps the paper's share, 1/20: at 40 epochs of 100 the cosine would have
            # little left. The share is our choice; the paper has no such run.
            warmup_epochs=min(40.0, epochs / 20),
            base_lr=1.5e-4,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
    )


SMALL_DATA = PretrainConfig(
    recipe="small-data",
    recipe_version=3,
    # ViT-S: on little data large models overfit under masked image modelling (Xie et al., CVPR 2023, "On Data Scaling
    # in Masked Image Modeling"). Normalised pixels: paper, table 1d.
    model=ModelConfig(name="mae_vit_small_patch16", norm_pix_loss=True),
    train=TrainConfig(
        # 1,000 images make 4 steps of 256 an epoch, but only one of the paper's 4,096 in four. Table 8's rate is per
        # 256, so this is the batch at which nothing is scaled.
        global_batch_size=256,
        batch_size="auto",
        # The paper's longest run, whose accuracy had not saturated (figure 7). Steps are what little data lacks: 1,600
        # epochs are 6,250 of them for 1,000 images and 312,500 for 50,000, where the paper's 800 epochs of ImageNet are
        # 250,000. Masked image modelling stands many passes over small sets (El-Nouby et al. 2021, "Are Large-scale
        # Datasets Necessary for Self-Supervised Pre-training?").
        epochs=1600,
        # Table 8's 40 epochs: 156 steps for 1,000 images and 7,800 for 50,000, where ImageNet's are 12,500. The second
        # moment of AdamW with beta 0.95 averages over some 20 steps, so 156 are still enough for it to settle.
        warmup_epochs=40,
        base_lr=1.5e-4,  # these three: table 8
        weight_decay=0.05,
        betas=(0.9, 0.95),
    ),
)
"""Own images by the thousand, 1,000 to 50,000, from scratch. The choice of values is argued and not measured."""


ADAPT = PretrainConfig(
    recipe="adapt-vit-b",
    recipe_version=3,
    # The model of the published ViT-B weights; normalised pixels: paper, table 1d.
    model=ModelConfig(name="mae_vit_base_patch16", norm_pix_loss=True),
    train=TrainConfig(
        # With table 8's base rate this peaks at 1.5e-4, a sixteenth of the 2.4e-3 that the weights were trained with:
        # where table 8's cosine is after 84 % of its length. So they are moved on, and not thrown away.
        global_batch_size=256,
        batch_size="auto",
        # An eighth of the paper's 800: pretraining that starts from pretrained weights converges several times faster
        # (Reed et al., WACV 2022, "Self-Supervised Pretraining Improves Self-Supervised Pretraining": up to 80 times).
        epochs=100,
        # Table 8's share, 40 of 800: AdamW begins without moments, and perhaps with a decoder drawn anew.
        warmup_epochs=5,
        base_lr=1.5e-4,  # these three: table 8
        weight_decay=0.05,
        betas=(0.9, 0.95),
    ),
)
"""Continue from weights on other images (domain adaptation). The choice of values is argued and not measured."""


_DESCRIBED = (
    ("the embedded photographs, minutes on a CPU", PHOTOGRAPHS),
    ("ViT-B/16, table 8 of the paper, 800 epochs", _imagenet("imagenet-vit-b", "mae_vit_base_patch16")),
    ("ViT-L/16, table 8 of the paper, 800 epochs", _imagenet("imagenet-vit-l", "mae_vit_large_patch16")),
    ("ViT-H/14, table 8 of the paper, 800 epochs", _imagenet("imagenet-vit-h", "mae_vit_huge_patch14")),
    ("ViT-B/16, table 8 of the paper, 1600 epochs", _imagenet("imagenet-vit-b-1600", "mae_vit_base_patch16", 1600)),
    ("ViT-L/16, table 8 of the paper, 1600 epochs", _imagenet("imagenet-vit-l-1600", "mae_vit_large_patch16", 1600)),
    ("ViT-H/14, table 8 of the paper, 1600 epochs", _imagenet("imagenet-vit-h-1600", "mae_vit_huge_patch14", 1600)),
    (
        "ViT-B/16, table 8 of the paper but 100 epochs: to try something out",
        _imagenet("imagenet-vit-b-100", "mae_vit_base_patch16", 100),
    ),
    ("ViT-S/16 from scratch on 1,000 to 50,000 own images", SMALL_DATA),
    ("ViT-B/16 continued from weights on other images (domain adaptation)", ADAPT),
)
RECIPES: dict[str, PretrainConfig] = {recipe.recipe: recipe for _, recipe in _DESCRIBED}
DESCRIPTIONS: dict[str, str] = {recipe.recipe: text for text, recipe in _DESCRIBED}

DEFAULT_RECIPE, OWN_IMAGES_RECIPE = "photographs", "small-data"
"""Where the user names no recipe: for the embedded photographs, and for images of the user's own."""

NEEDS_WEIGHTS = {"adapt-vit-b"}
"""Recipes that make sense only with ``--train.init-from``."""


def starting_config(
    recipe: str | None = None, *, out: Path | None = None, resume: bool = False, own_images: bool = False
) -> PretrainConfig:
    """The configuration that gives options their defaults: that of the run to resume, or a recipe.

    Without a recipe, images of the user's own get ``small-data``: the recipe of the embedded photographs (64 pixels,
    minutes, eighty times table 8's learning rate) would train on them without complaint, and badly.

    Raises:
        ValueError: for an unknown recipe, for ``resume`` without a run folder, with another recipe than the run's, or
            without anything to resume or start.
    """
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, got {recipe}")
    if resume:
        if out is None:
            raise ValueError("--resume: expected --out with the run folder to continue, got none")
        saved = read_config(out)
        if saved is not None and recipe not in (None, saved.recipe):
            raise ValueError(f"--recipe: the run in {out} was started with {saved.recipe}, got {recipe}")
        if saved is not None:
            return replace(saved, resume=False)
        if recipe is None and not own_images:
            raise ValueError(
                f"--resume: expected a run to continue in {out}, found none; --recipe or --data.path starts one"
            )
    return RECIPES[recipe or (OWN_IMAGES_RECIPE if own_images else DEFAULT_RECIPE)]


def apply_flags(config: PretrainConfig, defaults: PretrainConfig, given: Set[str]) -> PretrainConfig:
    """Settle what flags imply for the defaults that they did not name; those of ``train`` that they did are ``given``.

    A length in steps replaces a recipe's length in epochs, and the other way round, and turns fit_steps off; a
    warm-up that was not given keeps at most its share of the run; a micro-batch that was not given becomes a multiple
    of the masks per image.
    """
    train, base = config.train, defaults.train
    for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if one in given and other not in given:
            train = replace(train, **{other: None})
        elif other in given and one not in given:
            train = replace(train, **{one: None})
    if given & {"epochs", "steps"} and "fit_steps" not in given:
        train = replace(train, fit_steps=False)
    if given & {"epochs", "steps"} and not given & {"warmup_epochs", "warmup_steps"}:
        train = replace(train, **scaled_warmup(train, base))
    if "masks_per_image" in given and "batch_size" not in given and isinstance(train.batch_size, int):
        masks = max(train.masks_per_image, 1)
        train = replace(train, batch_size=max(train.batch_size // masks, 1) * masks)
    return replace(config, train=train)


def scaled_warmup(train: TrainConfig, base: TrainConfig) -> dict[str, Any]:
    """The base's warm-up for a run of another length: unchanged, but never a larger share of the run."""
    warmup = {"warmup_epochs": base.warmup_epochs, "warmup_steps": base.warmup_steps}
    if (base.epochs is None) == (base.warmup_epochs is None):
        length, width = (base.epochs, base.warmup_epochs) if base.epochs else (base.steps, base.warmup_steps)
        share = (width or 0) / length if length else 0
        if train.steps is not None:
            most = round(share * train.steps)
            warmup = {"warmup_epochs": None, "warmup_steps": most if base.epochs else min(width or 0, most)}
        elif train.epochs is not None:
            most = share * train.epochs
            warmup = {"warmup_steps": None, "warmup_epochs": min(width or 0, most) if base.epochs else most}
    return warmup


def describe(config: PretrainConfig) -> Iterator[str]:
    """The recipe of a run, and as flags what differs from it; ``config.json`` has everything."""
    recipe = RECIPES[config.recipe]
    later = f" (today's is {recipe.recipe_version})" if config.recipe_version != recipe.recipe_version else ""
    yield f"Recipe {config.recipe}, version {config.recipe_version}{later}: {DESCRIPTIONS[config.recipe]}"
    yield from different_flags(config, recipe)


def different_flags(config: Any, recipe: Any) -> Iterator[str]:
    """As flags, one per line, what differs from a recipe of the same class."""
    warmup = scaled_warmup(config.train, recipe.train)
    for section in SECTIONS:
        for field in fields(getattr(config, section)):
            value, usual = (getattr(getattr(c, section), field.name) for c in (config, recipe))
            if value != usual:
                why = "" if usual is None else f"  (recipe: {_as_flag(usual)})"
                if section == "train" and value is not None and warmup.get(field.name) == value:
                    why += "  the recipe's fraction of the run"
                yield f"  --{section}.{field.name}".replace("_", "-") + f" {_as_flag(value)}{why}"


def _as_flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
