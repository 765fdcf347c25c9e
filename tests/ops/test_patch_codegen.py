"""The code for other shapes and layouts than in training: nothing spills, accesses are wide where the layout allows."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest

pytest.importorskip("triton")

import torch
from cross_compile import assert_fits, needs_compiler, record_launches
from patch_cases import Case, make_ids, make_images, make_mean_std

pytestmark = needs_compiler
# The package's names of these are the functions.
MODULES = ("gather_patches", "masked_patch_mse", "masking")
GATHER, MSE, MASKING = (import_module(f"fastmae.ops.{name}") for name in MODULES)

VIT_B = Case(2, 3, (224, 224), (16, 16), 0.75)
VIT_H = Case(2, 3, (224, 224), (14, 14), 0.75)
SMALL = Case(2, 3, (64, 64), (8, 8), 0.75)
ONE_CHANNEL = Case(2, 1, (64, 64), (8, 8), 0.75)
LARGE = Case(2, 3, (224, 224), (32, 32), 0.75)
LARGEST = Case(1, 4, (128, 128), (64, 64), 0.5)


@pytest.fixture
def compiled(monkeypatch):
    """Runs an op as if on a GPU of the target, and compiles for it what the op would have launched last."""

    def run(target, module, call):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
            launches = record_launches(patch, module)
            call()
        return launches[-1].compile(target)

    return run


def gather(case, layout, images_dtype=torch.uint8, tables=True):
    images, ids = make_images(case, layout, images_dtype), make_ids(case)
    affine = make_mean_std(case.channels) if tables else (None, None)
    return lambda: GATHER.gather_patches(images, ids, case.patch, *affine, torch.bfloat16)


def gather_backward(case, layout):
    images, ids = make_images(case, layout, torch.float32).requires_grad_(), make_ids(case)
    return lambda: GATHER.gather_patches(images, ids, case.patch, dtype=torch.bfloat16).sum().backward()


def mse(case, layout, full=False, backward=False):
    images, ids = make_images(case, layout, torch.uint8), make_ids(case)
    shape = case.n, case.num_patches if full else ids.shape[1], case.pixels
    pred = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=backward)

    def call():
        loss = MSE.masked_patch_mse(pred, images, ids, case.patch, True, *make_mean_std(case.channels))
        return loss.backward() if backward else loss

    return call


OPS = {
    "gather": (GATHER, gather),
    "gather_backward": (GATHER, gather_backward),
    "mse": (MSE, mse),
    "mse_full": (MSE, partial(mse, full=True)),
    "mse_backward": (MSE, partial(mse, backward=True)),
    "mse_backward_full": (MSE, partial(mse, full=True, backward=True)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("target", "case", "layout"),
    [("sm_80", VIT_H, "nchw"), ("sm_90", LARGEST, "channels_last"), ("gfx942", LARGEST, "nchw"),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("sm_80", LARGE, "channels_last"), ("sm_100", LARGE, "channels_last"), ("sm_90", ONE_CHANNEL, "nchw")))],
    ids=lambda value: value if isinstance(value, str) else f"p{value.patch[0]}c{value.channels}",
)  # fmt: skip
def test_no_spills(compiled, target, case, layout, op):
    module, make = OPS[op]
    assert_fits(compiled(target, module, make(case, layout)), target, max_registers=128)


@pytest.mark.parametrize(
    ("target", "case", "layout", "bits"),
    [
        ("sm_90", VIT_B, "channels_last", 128),
        ("gfx942", VIT_B, "channels_last", 128),
        ("sm_90", SMALL, "channels_last", 64),
        ("gfx942", VIT_H, "channels_last", 16),
        ("sm_90", VIT_H, "channels_last", 16),
        ("sm_90", VIT_B, "nchw", 8),
        ("gfx942", VIT_B, "cropped", 8),
    ],
    ids=lambda value: f"p{value.patch[0]}" if isinstance(value, Case) else str(value),
)
def test_width_of_pixel_loads(compiled, target, case, layout, bits):
    """Without tables the only other loads are the ids, whose width is 64 bits, or 32 for the half that is used."""
    code = compiled(target, GATHER, gather(case, layout, tables=False))
    pixel_loads = set(code.loads) - ({32, 64} - {bits})
    assert pixel_loads == {bits}, code
    assert set(code.stores) == ({64} if case is VIT_H else {128}), code


def test_floating_channels_last_images_are_read_wide(compiled):
    code = compiled("sm_90", GATHER, gather(VIT_B, "channels_last", torch.float32))
    assert code.loads[128] > 0
    assert code.loads[8] == code.loads[16] == 0


@pytest.mark.parametrize(
    ("target", "strategy", "registers"),
    [("sm_80", "random", 128), ("gfx942", "random", 128), ("sm_90", "block", 192), ("gfx942", "block", 192)],
)
def test_masks_of_many_patches(compiled, target, strategy, registers):
    """Longer than a block of the kernel: the mask grows in memory."""
    options = {"sample_ids": torch.arange(4), "strategy": strategy, "grid_size": (100, 100), "masks_per_image": 2}
    code = compiled(target, MASKING, lambda: MASKING.random_masking(4, 100 * 100, 0.75, seed=1, **options))
    assert_fits(code, target, max_registers=registers)
