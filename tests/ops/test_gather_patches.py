"""gather_patches against patchify-then-gather written out in PyTorch."""

from __future__ import annotations

import pytest
import torch
from patch_cases import CASES, LAYOUTS, Case, make_ids, make_images, make_mean_std, normalised, patchify, take
from property_cases import BF16, F16, F32, F64, assert_as_accurate, plain_only

from fastmae.ops import patches
from fastmae.ops.gather_patches import gather_patches

pytestmark = pytest.mark.ops


# Each case in one layout, and each layout in one case at least.
COMBINED = [pytest.param(CASES[name], LAYOUTS[i % 4], id=f"{name}-{LAYOUTS[i % 4]}") for i, name in enumerate(CASES)]


@pytest.mark.parametrize(("case", "layout"), COMBINED)
def test_float_patches_are_copied_exactly(case, layout):
    images, ids = make_images(case, layout, (F32, F64, BF16, F16)[LAYOUTS.index(layout)]), make_ids(case)
    out = gather_patches(images, ids, case.patch)
    assert out.is_contiguous()
    torch.testing.assert_close(out, take(patchify(images, case.patch), ids), rtol=0, atol=0)


@pytest.mark.parametrize(("case", "layout"), COMBINED)
def test_bytes_are_normalised(case, layout):
    images, ids, affine = make_images(case, layout, torch.uint8), make_ids(case), make_mean_std(case.channels)
    assert gather_patches(images, ids, case.patch, *affine).dtype == F32
    # The zero carries the precision of the definition.
    assert_as_accurate(
        lambda x: gather_patches(images, ids, case.patch, *affine),
        lambda x: take(patchify(normalised(images, *affine, x.dtype), case.patch), ids),
        (torch.zeros(()),),
    )


def test_each_channel_has_its_own_mean_and_std():
    case = Case(2, 13, (12, 10), (6, 5), 0.5)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    mean, std = torch.stack([torch.rand(13), torch.rand(13) + 0.1], 1).unbind(1)
    expected = take(patchify(normalised(images, mean, std, F64), case.patch), ids)
    torch.testing.assert_close(
        gather_patches(images, ids, case.patch, mean, std).double(), expected, rtol=1e-6, atol=2e-6
    )


def test_statistics_are_read_at_each_call():
    case = CASES["p16"]
    images, ids, (mean, std) = make_images(case, "channels_last", torch.uint8), make_ids(case), make_mean_std(3)
    gather_patches(images, ids, case.patch, mean, std)
    mean += 0.1
    std *= 2
    expected = take(patchify(normalised(images, mean, std, F32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, case.patch, mean, std), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [Case(2, 1, (3, 5), (1, 1), 0.5), Case(1, 3, (64, 64), (32, 32), 0.75), Case(1, 3, (128, 96), (64, 96), 0.5)],
    ids=lambda case: f"{case.pixels} values",
)
def test_tiny_and_huge_patches(case):
    images, ids, (mean, std) = make_images(case, "nchw", torch.uint8), make_ids(case), make_mean_std(case.channels)
    expected = take(patchify(normalised(images, mean, std, F32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, case.patch, mean, std), expected)


@plain_only
@pytest.mark.parametrize(("n", "masks"), [(13, 1), (7, 3)])
def test_more_images_than_one_chunk_of_the_plain_path(n, masks):
    case = Case(n, 3, (128, 128), (16, 16), 0.5)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case._replace(n=masks * n))
    mean, std = make_mean_std(3)
    assert 1 < len(list(patches.chunks(images, ids, case.patch))) < case.n
    repeated = images.repeat_interleave(masks, 0)
    expected = take(patchify(normalised(repeated, mean, std, F32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, 16, mean, std), expected, rtol=1e-5, atol=1e-6)


def test_default_dtype():
    case = CASES["p16"]
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    assert gather_patches(images, ids, 16).dtype == F32
    assert gather_patches(images.half(), ids, 16).dtype == F16
    with torch.autocast("cpu", BF16):
        assert gather_patches(images, ids, 16).dtype == BF16
        assert gather_patches(images.float(), ids, 16).dtype == BF16
        assert gather_patches(images, ids, 16, dtype=F32).dtype == F32


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_gradient_has_the_layout_of_the_images(layout):
    images, ids = make_images(CASES["wide-patch"], layout, F32).requires_grad_(), make_ids(CASES["wide-patch"])
    (grad,) = torch.autograd.grad(gather_patches(images, ids, (8, 16)).sum(), images)
    assert grad.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert grad.is_contiguous() == (layout == "nchw")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, F32, BF16, F64])
@pytest.mark.parametrize(("case", "layout"), COMBINED)
def test_cuda_equals_cpu(case, layout, dtype):
    images, (mean, std) = make_images(case, layout, dtype), make_mean_std(case.channels)
    ids = make_ids(case._replace(n=2 * case.n))
    expected = gather_patches(images, ids, case.patch, mean, std)
    out = gather_patches(*(x.cuda() for x in (images, ids)), case.patch, mean.cuda(), std.cuda())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6 if dtype == torch.uint8 else 0, atol=1e-6)
    if dtype != torch.uint8:
        on_cpu, on_gpu = images.requires_grad_(), images.detach().cuda().requires_grad_()
        weight = torch.randn_like(expected)
        (want,) = torch.autograd.grad(gather_patches(on_cpu, ids, case.patch), on_cpu, weight)
        (got,) = torch.autograd.grad(gather_patches(on_gpu, ids.cuda(), case.patch), on_gpu, weight.cuda())
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.gpu
def test_pixels_beyond_two_gigabytes():
    images = torch.empty(2, 3, 20480, 20480, 2, dtype=torch.uint8, device="cuda")[..., 1]
    images[1, :, -16:, -16:] = 7
    last = torch.full((2, 1), 1280 * 1280 - 1, device="cuda")
    assert (gather_patches(images, last, 16)[1] * 255).round().eq(7).all()
