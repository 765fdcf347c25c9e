"""The code that GPUs would run for the patch ops: no spills, and accesses as wide as the memory layout allows."""

from __future__ import annotations

from importlib import import_module

import pytest

pytest.importorskip("triton")

import torch
from cross_compile import TARGETS, assert_fits, compile_for, needs_compiler
from patch_cases import Case, make_ids, make_images, make_mean_std

pytestmark = needs_compiler
# The package's names of these are the functions.
GATHER, MSE = (import_module(f"fastmae.ops.{name}") for name in ("gather_patches", "masked_patch_mse"))

VIT_B = Case(2, 3, (224, 224), (16, 16), 0.75)
VIT_H = Case(2, 3, (224, 224), (14, 14), 0.75)
SMALL = Case(2, 3, (64, 64), (8, 8), 0.75)
ONE_CHANNEL = Case(2, 1, (64, 64), (8, 8), 0.75)
LARGE = Case(2, 3, (224, 224), (32, 32), 0.75)
LARGEST = Case(1, 4, (128, 128), (64, 64), 0.5)


class Recorder:
    """Stands in for a module of kernels and keeps the launches that the op asked for."""

    def __init__(self, kernels):
        self.kernels, self.launches = kernels, []

    def __getattr__(self, name):
        return _Launcher(getattr(self.kernels, name), self.launches)


class _Launcher:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture
def compiled(monkeypatch):
    """Runs an op as if on a GPU of the target, and compiles for it what the op would have launched."""

    def run(target, module, call):
        with monkeypatch.context() as patch:
            recorder = Recorder(module._kernels)
            patch.setattr(module, "_kernels", recorder)
            patch.setattr(module, "takes_triton", lambda *_: True)
            patch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
            call()
        ((kernel, args, options),) = recorder.launches
        names = [p.name for p in kernel.params if p.is_constexpr]
        constexprs = {name: options.pop(name) for name in names}
        return compile_for(target, kernel, args, constexprs, **options)

    return run


def gather(case, layout, images_dtype=torch.uint8, dtype=torch.bfloat16, tables=True):
    images, ids = make_images(case, layout, images_dtype), make_ids(case)
    affine = make_mean_std(case.channels) if tables else (None, None)
    return lambda: GATHER.gather_patches(images, ids, case.patch, *affine, dtype)


def gather_backward(case, layout, dtype=torch.bfloat16):
    ids = make_ids(case)
    grad = torch.zeros(*ids.shape, case.pixels, dtype=dtype)
    shape = (case.n, case.channels, *case.image)
    return lambda: GATHER._gather_patches_backward(
        grad, ids, shape, layout == "channels_last", *case.patch, torch.float32
    )


def mse(case, layout, images_dtype=torch.uint8, dtype=torch.bfloat16, full=False):
    images, ids = make_images(case, layout, images_dtype), make_ids(case)
    pred = torch.zeros(case.n, case.num_patches if full else ids.shape[1], case.pixels, dtype=dtype)
    return lambda: MSE.masked_patch_mse(pred, images, ids, case.patch, True, *make_mean_std(case.channels))


def mse_backward(case, layout, images_dtype=torch.uint8, dtype=torch.bfloat16, full=False):
    images, ids = make_images(case, layout, images_dtype), make_ids(case)
    mean, std = MSE.patches.check_statistics(images, *make_mean_std(case.channels))
    pred = torch.zeros(case.n, case.num_patches if full else ids.shape[1], case.pixels, dtype=dtype)
    grad = torch.ones(()).expand(ids.shape)
    return lambda: MSE._masked_patch_mse_backward(grad, pred, images, ids, mean, std, *case.patch, True, 1e-6)


def full(make):
    return lambda case, layout: make(case, layout, full=True)


OPS = {
    "gather": (GATHER, gather),
    "gather_backward": (GATHER, gather_backward),
    "mse": (MSE, mse),
    "mse_full": (MSE, full(mse)),
    "mse_backward": (MSE, mse_backward),
    "mse_backward_full": (MSE, full(mse_backward)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_at_the_training_shape(compiled, target, op):
    module, make = OPS[op]
    # Triton 3.8 takes 80 at most, 3.6 takes 83.
    assert_fits(compiled(target, module, make(VIT_B, "channels_last")), target, max_registers=96)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("target", "case", "layout"),
    [("sm_80", LARGE, "channels_last"), ("sm_100", LARGE, "channels_last"), ("sm_90", ONE_CHANNEL, "nchw"),
     ("sm_80", VIT_H, "nchw"), ("sm_90", LARGEST, "channels_last"), ("gfx942", LARGEST, "nchw")],
    ids=lambda value: value if isinstance(value, str) else f"p{value.patch[0]}c{value.channels}",
)  # fmt: skip
def test_no_spills_elsewhere(compiled, target, case, layout, op):
    module, make = OPS[op]
    assert_fits(compiled(target, module, make(case, layout)), target, max_registers=128)


@pytest.mark.parametrize(
    ("target", "case", "layout", "bits"),
    [
        *((target, VIT_B, "channels_last", 128) for target in TARGETS),
        *(
            (target, *rest)
            for target in ("sm_90", "gfx942")
            for rest in (
                (LARGE, "channels_last", 128),
                (SMALL, "channels_last", 64),
                (VIT_H, "channels_last", 16),
                (VIT_B, "nchw", 8),
                (VIT_B, "cropped", 8),
            )
        ),
    ],
    ids=lambda value: f"p{value.patch[0]}" if isinstance(value, Case) else str(value),
)
def test_width_of_pixel_loads(compiled, target, case, layout, bits):
    """Without tables the only other loads are the ids, whose width is 64 bits, or 32 for the half that is used."""
    code = compiled(target, GATHER, gather(case, layout, tables=False))
    pixel_loads = set(code.loads) - ({32, 64} - {bits})
    assert pixel_loads == {bits}, code
    assert set(code.stores) == ({64} if case is VIT_H else {128}), code


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_predictions_are_read_wide(compiled, target):
    """Pixels and pred by 128 bits; narrower loads are ids, mean and std, six numbers, alone."""
    code = compiled(target, MSE, mse(VIT_B, "channels_last"))
    assert set(code.loads) <= {32, 64, 128}
    assert sum(n for bits, n in code.loads.items() if bits < 128) <= 2 + 6, code
    code = compiled(target, MSE, mse_backward(VIT_B, "channels_last"))
    assert set(code.stores) == {128}, code


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_floating_channels_last_images_are_read_wide(compiled, target):
    code = compiled(target, GATHER, gather(VIT_B, "channels_last", torch.float32))
    assert code.loads[128] > 0
    assert code.loads[8] == code.loads[16] == 0
