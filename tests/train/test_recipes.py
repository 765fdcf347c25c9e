"""Recipes: each version's values stay what they are, and the documentation states them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from fastmae.model import PRESETS
from fastmae.train.config import PretrainConfig, RecipeName, from_json, to_json
from fastmae.train.optim import create_schedule
from fastmae.train.recipes import DESCRIPTIONS, NEEDS_WEIGHTS, RECIPES, apply_flags, describe, starting_config

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
IMAGENET = 1_281_167

# What a digest covers. A field that is added later counts where a recipe sets it to something else than its default.
COVERED = """
    model.name model.img_size model.patch_size model.in_chans model.mean model.std model.mask_ratio model.mask_strategy
    model.norm_pix_loss model.embed_dim model.depth model.num_heads model.decoder_embed_dim model.decoder_depth
    model.decoder_num_heads model.attention model.residual_dtype data.path data.loader data.value_range
    data.max_bad_fraction data.max_pixels data.crop data.scale data.ratio data.hflip data.vflip data.color_jitter
    data.progressive_sizes data.num_threads data.prefetch data.timeout train.global_batch_size train.batch_size
    train.masks_per_image train.epochs train.steps train.warmup_epochs train.warmup_steps train.base_lr train.min_lr
    train.weight_decay train.betas train.optimizer train.init_from train.clip_grad train.seed train.precision
    train.compile train.parallel train.shard_size train.activation_checkpointing train.reshard_after_forward
    train.device train.num_threads train.max_minutes train.log_every_steps train.checkpoint_every_steps
    train.checkpoint_every_seconds train.keep_checkpoints train.keep_every_steps train.background_save
"""

# Of the newest versions. Whoever changes a recipe raises its version: runs say in config.json which one they had.
DIGESTS = {
    ("photographs", 2): "df6c2f00656c3730",
    ("imagenet-vit-b", 3): "76904dbe14e81175",
    ("imagenet-vit-l", 3): "e18ba5f6159836eb",
    ("imagenet-vit-h", 3): "fe91a8b572fc921b",
    ("imagenet-vit-b-1600", 3): "08fd01ca90a31540",
    ("imagenet-vit-l-1600", 3): "664873a73399c0ab",
    ("imagenet-vit-h-1600", 3): "5003406069eada66",
    ("imagenet-vit-b-100", 3): "d4510ce1d7918f90",
    ("small-data", 3): "db534e6a3aba73ff",
    ("adapt-vit-b", 3): "64ad2d9293ae6539",
    ("photographs", 3): "2d129984a9559d68",
}


def flat(config: PretrainConfig) -> dict[str, object]:
    values = to_json(config)
    return {f"{part}.{key}": value for part in ("model", "data", "train") for key, value in values[part].items()}


def digest(recipe: PretrainConfig) -> str:
    values, defaults = flat(recipe), flat(PretrainConfig())
    covered = {name: values[name] for name in COVERED.split()} | {n: v for n, v in values.items() if v != defaults[n]}
    # 800 and 800.0 are the same length.
    plain = {name: float(v) if type(v) is int else v for name, v in covered.items()}
    # Digests are older than the names of what is compiled.
    plain["train.compile"] = {"none": False, "model": True}.get(plain["train.compile"], plain["train.compile"])
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", RECIPES)
def test_a_version_keeps_its_values(name):
    recipe = RECIPES[name]
    known = DIGESTS.get((name, recipe.recipe_version))
    assert digest(recipe) == known, f"values of {name} changed: raise its recipe_version and put the new digest here"


def test_names_are_those_of_the_command_line():
    assert set(get_args(RecipeName)) == set(RECIPES) == set(DESCRIPTIONS)
    assert set(RECIPES) > NEEDS_WEIGHTS


def test_a_resumed_run_keeps_the_version_of_its_recipe(tmp_path):
    saved = replace(RECIPES["small-data"], recipe_version=0)
    (tmp_path / "config.json").write_text(json.dumps(to_json(saved)))
    assert starting_config(out=tmp_path, resume=True) == apply_flags(saved, saved, set()) == saved
    values = to_json(saved)
    del values["recipe_version"]  # before versions were counted
    assert from_json(values).recipe_version == 1


@pytest.mark.parametrize("size", "blh")
@pytest.mark.parametrize(("suffix", "epochs"), [("", 800), ("-1600", 1600), ("-100", 100)])
def test_imagenet_recipes_are_table_8_of_the_paper(size, suffix, epochs):
    if (suffix, size) in {("-100", "l"), ("-100", "h")}:
        return
    recipe = RECIPES[f"imagenet-vit-{size}{suffix}"]
    train = recipe.train
    assert recipe.model.name.startswith({"b": "mae_vit_base", "l": "mae_vit_large", "h": "mae_vit_huge"}[size])
    assert (train.epochs, train.warmup_epochs) == (epochs, min(40, epochs / 20))
    assert (train.global_batch_size, train.base_lr, train.weight_decay) == (4096, 1.5e-4, 0.05)
    assert train.betas == (0.9, 0.95)
    assert (recipe.model.mask_ratio, recipe.model.img_size, recipe.data.scale) == (0.75, 224, (0.2, 1.0))
    assert create_schedule(train, IMAGENET).peak_lr == pytest.approx(2.4e-3)


def test_a_run_prints_what_differs_from_its_recipe():
    recipe = RECIPES["imagenet-vit-b"]
    changed = replace(recipe, train=replace(recipe.train, epochs=100), data=replace(recipe.data, scale=(0.5, 1.0)))
    for config, lines in (
        (recipe, []),
        (
            apply_flags(changed, recipe, {"epochs"}),
            [
                "  --data.scale 0.5 1.0  (recipe: 0.2 1.0)",
                "  --train.epochs 100  (recipe: 800)",
                "  --train.warmup-epochs 5.0  (recipe: 40.0)  the recipe's fraction of the run",
            ],
        ),
    ):
        first, *others = describe(config)
        assert first.startswith(f"Recipe imagenet-vit-b, version {recipe.recipe_version}: ViT-B/16")
        assert others == lines


def row(name: str) -> str:
    recipe = RECIPES[name]
    model, train = recipe.model, recipe.train
    if train.epochs is None:
        length, warmup = f"{'at most ' * train.fit_steps}{train.steps:,} steps", f"{train.warmup_steps:,} steps"
    else:
        length, warmup = f"{train.epochs:g} epochs", f"{train.warmup_epochs:g} epochs"
    patch = model.patch_size or PRESETS[model.name]["patch_size"]
    return (
        f"| `{name}` | {recipe.recipe_version} | {DESCRIPTIONS[name]} | {model.img_size} / {patch} | {length} "
        f"| {warmup} | {train.global_batch_size:,} | {train.batch_size or '-'} | {train.base_lr:g} "
        f"| {train.base_lr * train.global_batch_size / 256:.3g} |"
    )


def test_the_table_in_the_documentation_is_that_of_the_code():
    rows = [line for line in PAGE.read_text().splitlines() if line.count("|") == 11 and "`" in line]
    assert rows == [row(name) for name in RECIPES]
