"""Configuration: recipes are valid, flags settle what they imply, mistakes are named with what was expected."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fastmae.model import ACTIVATION_CHECKPOINTING, RESIDUAL_DTYPES
from fastmae.ops.attention import BACKENDS
from fastmae.train.checkpoint.state import compare_configs
from fastmae.train.config import ActivationCheckpointing, ModelConfig, PretrainConfig, from_json, read_config, to_json
from fastmae.train.optim import create_schedule
from fastmae.train.recipes import RECIPES, apply_flags
from fastmae.train.rules import progressive_sizes, validate
from fastmae.train.task import create_resolution

PHOTOGRAPHS, LARGE = RECIPES["photographs"], RECIPES["imagenet-vit-l"]


CONFIG = "fastmae.train.config"


@pytest.mark.parametrize("module", ["fastmae.cli.commands", "fastmae.train.classification", CONFIG])
def test_every_flag_is_documented(module):
    """``--help`` shows the string below a field."""
    classes = [
        n
        for n in ast.parse(inspect.getsource(import_module(module))).body
        if isinstance(n, ast.ClassDef) and n.name.endswith("Config")
    ]
    assert classes
    for cls in classes:
        assert ast.get_docstring(cls)
        for field, below in zip(cls.body, [*cls.body[1:], None], strict=True):
            # Classes of flags say themselves what they are.
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).rstrip("]").endswith("Config"):
                assert isinstance(below, ast.Expr), f"{cls.name}.{field.target.id}"
                assert isinstance(below.value.value, str)


def changed(config: PretrainConfig, section: str, **values) -> PretrainConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name):
    recipe = RECIPES[name]
    validate(recipe)
    assert recipe.recipe == name
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def test_paths_and_pairs_survive_json(tmp_path):
    config = changed(PHOTOGRAPHS, "model", img_size=(64, 96), in_chans=2, mean=(0.25, 0.5), std=(0.5, 0.5))
    data = {"path": Path("/images"), "progressive_sizes": (32, 64)}
    data |= {"value_range": (0.0, 4095.0, -1.0, 1.0), "channels_first": True}
    config = replace(changed(changed(config, "data", **data), "train", fit_steps=False), out=tmp_path)
    validate(config)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert read_config(tmp_path) == config
    assert config.img_size == (64, 96)
    assert read_config(tmp_path / "elsewhere") is None


MISTAKES = r"""
model.name='resnet50'                | --model.name: unknown model 'resnet50'; the presets are mae_vit_tiny_patch16
model.mask_ratio=1.0                 | --model.mask-ratio: .*strictly between 0 and 1, got 1.0
model.mask_ratio=0.999               | --model.mask-ratio: .*0.999 of 64 patches keeps 0
model.img_size=(64, 60)              | --model.img-size: size 64x60 does not divide into patches of 8x8
model.img_size='large'               | --model.img-size: expected an integer, got 'large'
model.patch_size=-8                  | --model.patch-size: expected a positive int .*got -8
model.mask_strategy='tube'           | --model.mask-strategy: .*one of random, block, grid, fixed-grid, got 'tube'
model.mask_strategy='grid', model.mask_ratio=0.5     | --model.mask-strategy: .*0.75 .*got 0.5
model.mask_strategy='grid', model.img_size=(64, 72)  | --model.mask-strategy: .*even .*got \(8, 9\)
model.depth=-1                       | --model.depth: expected a positive number, got -1
model.num_heads=5                    | --model.embed-dim: expected a multiple of num_heads=5, got 128
model.in_chans=5                     | --model.in-chans: expected 3, as the embedded photographs have, .*got 5
model.mean=(0.5, 0.5)                | --model.mean: expected one value for each of the 3 channels
model.mean=(0.5, math.nan, 0.5)      | --model.mean: expected finite numbers
model.std=(0.5, 0.0, 0.5)            | --model.std: expected positive values
data.max_bad_fraction=1.5            | --data.max-bad-fraction: expected a number from 0 to 1, got 1.5
data.max_pixels=1 << 40              | --data.max-pixels: expected a number from 1 to 178956970, got 1099511627776
data.value_range=(1.0, 1.0)          | --data.value-range: .*smallest first.* got \(1.0, 1.0\)
data.value_range=(0.0, 1.0, 0.0)     | --data.value-range: .* or 6 with those of each channel in turn, got
data.value_range=(0.0, 1.0), data.color_jitter=0.4   | --data.color-jitter: expected 0 with --data.value-range
data.scale=(0.5, 0.2)                | --data.scale: .*got \(0.5, 0.2\)
data.scale=(0.5, 2.0)                | --data.scale: expected at most 1, got
data.progressive_sizes=(32, 60, 64)  | --data.progressive-sizes: size 60x60 does not divide into patches of 8x8
data.progressive_sizes=(32, 48)      | --data.progressive-sizes: .*the image size 64x64 last, got 48x48
data.progressive_sizes=(0, 64)       | --data.progressive-sizes: .*got 0
data.progressive_sizes=(8, 64)       | --model.mask-ratio with images of 8x8: .*of 1 patches keeps 0
data.progressive_sizes=(32, 64)      | --train.fit-steps: expected False with --data.progressive-sizes
train.max_minutes=None               | --train.max-minutes: expected a time for --train.fit-steps, .*got None
train.shard_size=4                   | --train.shard-size: expected none without --train.parallel hsdp, got 4
train.timeout=600.0                  | --train.timeout: expected more than --data.timeout 600, .*got 600
train.optimizer='apex', train.parallel='fsdp'        | --train.optimizer: .*no shards
train.optimizer='apex', train.device='cpu'           | --train.optimizer: expected adamw on the CPU, got 'apex'
train.optimizer='muon', train.parallel='fsdp'        | --train.optimizer: .*--train.parallel fsdp; muon knows no
train.optimizer='muon', train.cuda_graph=True        | --train.cuda-graph: expected no CUDA graph with .* muon
train.reduce_every='micro-batch'     | --train.reduce-every: expected step without --train.parallel fsdp or hsdp, .*got
train.masks_per_image=512            | --train.masks-per-image: expected a number from 1 to 256, got 512
train.masks_per_image=3              | --train.global-batch-size: .*multiple of --train.masks-per-image 3, got 32
train.masks_per_image=4, train.batch_size=2          | --train.batch-size: .*--train.masks-per-image 4, got 2
train.epochs=3                       | --train.epochs and --train.steps: expected one of them, got 3 and
train.warmup_epochs=3                | --train.warmup-epochs and --train.warmup-steps: .*got 3 and 200
train.steps=None                     | --train.epochs or --train.steps: .*neither
train.steps=None, train.epochs=math.inf              | --train.epochs: expected a positive number, got inf
train.seed=-1                        | --train.seed: .*got -1
train.base_lr=math.nan               | --train.base-lr: .*got nan
report.probe_path=Path('val')        | --report.probe-path: expected none without --report.probe-every-epochs
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_name_flag_value_and_expectation(mistake):
    changes, message = mistake.split(" | ")
    config = PHOTOGRAPHS
    for change in re.split(r", (?=\w+\.\w+=)", changes):
        name, value = change.split("=", 1)
        section, field = name.strip().split(".")
        config = changed(config, section, **{field: eval(value, {"math": math, "Path": Path})})
    with pytest.raises(ValueError, match=message.strip()):
        validate(config)


@pytest.mark.parametrize(("saved", "now"), [(True, "model"), (False, "none"), ("blocks", "blocks")])
def test_a_saved_bool_of_compile_means_what_it_meant(saved, now):
    values = to_json(PretrainConfig())
    values["train"]["compile"] = saved
    config = from_json(values)
    assert config.train.compile == now
    assert compare_configs(values, to_json(config)) == []


def test_a_compiled_model_has_no_more_sizes_than_graphs():
    config = changed(PHOTOGRAPHS, "data", progressive_sizes=(16, 24, 32, 40, 48, 56, 72, 80, 64))
    config = changed(config, "train", fit_steps=False)
    validate(config)
    with pytest.raises(ValueError, match=r"--data.progressive-sizes: expected at most 8 .*--train.compile"):
        validate(changed(config, "train", compile="blocks"))


def test_image_sizes_get_equal_shares_of_the_run_in_whole_epochs():
    config = changed(LARGE, "data", progressive_sizes=(160, 192, 224))
    validate(config)
    resolution = create_resolution(config, create_schedule(config.train, 1_281_167).total_steps, 1_281_167)
    assert str(resolution) == "160x160 from pass 0, 192x192 from pass 267, 224x224 from pass 533"
    sizes = [resolution(epoch)[0] for epoch in (0, 266, 267, 532, 533, 799, 10**6)]
    assert sizes == [160, 160, 192, 192, 224, 224, 224]
    several = changed(config, "train", masks_per_image=4)
    assert create_resolution(several, create_schedule(several.train, 1_281_167).total_steps, 1_281_167).starts == (
        0,
        67,
        133,
    )
    assert create_resolution(LARGE, 10, 100)(5) == (224, 224)


@pytest.mark.parametrize(("steps", "starts"), [(30, (0, 1, 2)), (31, (0, 1, 2)), (45, (0, 2, 3)), (60, (0, 2, 4))])
def test_a_last_epoch_cut_short_is_no_share_of_its_own(steps, starts):
    config = changed(PHOTOGRAPHS, "data", progressive_sizes=(32, 48, 64))
    config = changed(config, "train", global_batch_size=32)
    assert create_resolution(config, steps, 320).starts == starts


def test_heights_have_widths_in_proportion():
    assert progressive_sizes((16, 64), (64, 96)) == ((16, 24), (64, 96))
    with pytest.raises(ValueError, match="widths in proportion to 64x96 are whole, got 15"):
        progressive_sizes((15, 64), (64, 96))
    with pytest.raises(ValueError, match=r"--data.progressive-sizes: .*at least one pass over the 320 images"):
        create_resolution(changed(PHOTOGRAPHS, "data", progressive_sizes=(32, 48, 64)), 29, 320)


def test_unknown_field_of_a_saved_config_is_named():
    saved = to_json(PHOTOGRAPHS)
    saved["train"]["sharpness"] = 1
    with pytest.raises(ValueError, match=r"train\.sharpness"):
        from_json(saved)


def flags(recipe: PretrainConfig, **train):
    return apply_flags(changed(recipe, "train", **train), recipe, set(train)).train


def test_a_length_replaces_the_recipes_and_keeps_at_most_its_share_of_warmup():
    steps = flags(LARGE, steps=1000)
    assert (steps.steps, steps.epochs, steps.warmup_steps, steps.warmup_epochs) == (1000, None, 50, None)
    assert flags(LARGE, epochs=1600).warmup_epochs == 40
    assert flags(LARGE, epochs=100).warmup_epochs == 5
    length, warmup = PHOTOGRAPHS.train.steps, PHOTOGRAPHS.train.warmup_steps
    assert flags(PHOTOGRAPHS, steps=2 * length).warmup_steps == warmup
    assert flags(PHOTOGRAPHS, steps=length // 100).warmup_steps == warmup // 100
    epochs = flags(PHOTOGRAPHS, epochs=length / 100)
    assert (epochs.epochs, epochs.steps, epochs.warmup_steps) == (length / 100, None, None)
    assert epochs.warmup_epochs == pytest.approx(warmup / 100)
    assert flags(LARGE, epochs=100, warmup_steps=7).warmup_steps == 7
    both = flags(PHOTOGRAPHS, steps=10, epochs=2)
    assert (both.steps, both.epochs) == (10, 2)  # left for validation to refuse


def test_a_length_that_is_named_turns_fit_steps_off():
    assert PHOTOGRAPHS.train.fit_steps
    for given, kept in (("steps", False), ("epochs", False), ("max_minutes", True), ("steps fit_steps", True)):
        assert apply_flags(PHOTOGRAPHS, PHOTOGRAPHS, set(given.split())).train.fit_steps == kept


def test_the_micro_batch_holds_all_masks_of_an_image():
    base = replace(LARGE, train=replace(LARGE.train, batch_size=256))
    assert flags(base, global_batch_size=96).batch_size == 256  # the most, of which 96 are less
    assert flags(base, masks_per_image=5).batch_size == 255
    assert flags(base, masks_per_image=5, batch_size=8).batch_size == 8  # validation refuses it
    assert flags(LARGE, masks_per_image=4).batch_size == "auto"


def test_choices_are_the_models():
    """Written out for the command line, which must not import PyTorch to print its help."""
    hints = get_type_hints(ModelConfig)
    assert set(get_args(hints["attention"])) == set(BACKENDS)
    assert set(get_args(hints["residual_dtype"])) == set(RESIDUAL_DTYPES)
    assert get_args(ActivationCheckpointing) == ACTIVATION_CHECKPOINTING
