"""gather_patches against patchify-then-gather written out in PyTorch."""

from __future__ import annotations

import pytest
import torch
from patch_cases import (
    CASES,
    LAYOUTS,
    Case,
    assert_as_accurate,
    make_ids,
    make_images,
    make_mean_std,
    normalised,
    patchify,
    take,
)
from property_cases import plain_only

from fastmae.ops import patches
from fastmae.ops.gather_patches import gather_patches

pytestmark = pytest.mark.ops


def dtype_of(case, layout, *dtypes: torch.dtype) -> torch.dtype:
    """One of four: each case and each layout meets each of them."""
    return dtypes[(list(CASES.values()).index(case) + LAYOUTS.index(layout)) % 4]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float_patches_are_copied_exactly(case, layout):
    dtype = dtype_of(case, layout, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    images, ids = make_images(case, layout, dtype), make_ids(case)
    out = gather_patches(images, ids, case.patch)
    assert out.is_contiguous()
    torch.testing.assert_close(out, take(patchify(images, case.patch), ids), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bytes_are_normalised(case, layout):
    images, ids = make_images(case, layout, torch.uint8), make_ids(case)
    mean, std = make_mean_std(case.channels)
    exact, plain = (
        take(patchify(normalised(images, mean, std, dtype), case.patch), ids)
        for dtype in (torch.float64, torch.float32)
    )
    out = gather_patches(images, ids, case.patch, mean, std)
    assert out.dtype == torch.float32
    assert_as_accurate(out, plain, exact, tiny=1e-6)
    half = gather_patches(images, ids, case.patch, mean, std, torch.bfloat16)
    # One unit in the last place, not half of one: Triton's interpreter truncates where hardware rounds.
    torch.testing.assert_close(half.double(), exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 7, 13])
def test_each_channel_has_its_own_mean_and_std(channels):
    case = Case(2, channels, (12, 10), (6, 5), 0.5)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.1
    expected = take(patchify(normalised(images, mean, std, torch.float64), case.patch), ids)
    torch.testing.assert_close(
        gather_patches(images, ids, case.patch, mean, std).double(), expected, rtol=1e-6, atol=2e-6
    )
    strided = torch.stack([mean, std], 1).unbind(1)
    assert torch.equal(
        gather_patches(images, ids, case.patch, *strided), gather_patches(images, ids, case.patch, mean, std)
    )


def test_statistics_are_read_at_each_call():
    case = CASES["p16"]
    images, ids, (mean, std) = make_images(case, "channels_last", torch.uint8), make_ids(case), make_mean_std(3)
    gather_patches(images, ids, case.patch, mean, std)
    mean += 0.1
    std *= 2
    expected = take(patchify(normalised(images, mean, std, torch.float32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, case.patch, mean, std), expected, rtol=1e-5, atol=1e-6)


def test_int_patch_size_strided_ids_and_repeats():
    images = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[3, 3], [0, 2], [3, 1]]).t()
    out = gather_patches(images, ids, 16)
    assert torch.equal(out, take(patchify(images, (16, 16)), ids))


@pytest.mark.parametrize("pixels", [1, 3072, 3 * 64 * 96])
def test_tiny_and_huge_patches(pixels):
    case = {1: Case(2, 1, (3, 5), (1, 1), 0.5), 3072: Case(1, 3, (64, 64), (32, 32), 0.75)}.get(
        pixels, Case(1, 3, (128, 96), (64, 96), 0.5)
    )
    assert case.pixels == pixels
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    mean, std = make_mean_std(case.channels)
    expected = take(patchify(normalised(images, mean, std, torch.float32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, case.patch, mean, std), expected)


@pytest.mark.parametrize("layout", ["columns", "channels", "rgb-of-rgba", "expanded", "transposed"])
def test_unusual_strides(layout):
    """What looks like channels-last memory in one stride and is not in another."""
    case, ids = Case(2, 3, (32, 48), (16, 8), 0.5), make_ids(Case(2, 3, (32, 48), (16, 8), 0.5))
    x = make_images(Case(2, 6, (32, 96), (16, 8), 0.5), "channels_last", torch.uint8)
    images = {
        "columns": x[:, :3, :, ::2],
        "channels": x[:, ::2, :, :48],
        "rgb-of-rgba": make_images(Case(2, 4, (32, 48), (16, 8), 0.5), "channels_last", torch.uint8)[:, :3],
        "expanded": x[:1, :1, :, :48].expand(2, 3, -1, -1),
        "transposed": x[:, :3, :, :48].transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    expected = take(patchify(normalised(images, None, None, torch.float32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, case.patch), expected)


@plain_only
@pytest.mark.parametrize(("n", "masks"), [(13, 1), (7, 3)])
def test_more_images_than_one_chunk_of_the_plain_path(n, masks):
    case = Case(n, 3, (128, 128), (16, 16), 0.5)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case._replace(n=masks * n))
    mean, std = make_mean_std(3)
    assert 1 < len(list(patches.chunks(images, ids, case.patch))) < case.n
    repeated = images.repeat_interleave(masks, 0)
    expected = take(patchify(normalised(repeated, mean, std, torch.float32), case.patch), ids)
    torch.testing.assert_close(gather_patches(images, ids, 16, mean, std), expected, rtol=1e-5, atol=1e-6)


def test_default_dtype():
    case = CASES["p16"]
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    assert gather_patches(images, ids, 16).dtype == torch.float32
    assert gather_patches(images.half(), ids, 16).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert gather_patches(images, ids, 16).dtype == torch.bfloat16
        assert gather_patches(images.float(), ids, 16).dtype == torch.bfloat16
        assert gather_patches(images, ids, 16, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("layout", "dtype"), [("channels_last", torch.float32), ("nchw", torch.bfloat16), ("strided", torch.float32)]
)
def test_gradient_adds_repeated_patches(layout, dtype):
    case = CASES["wide-patch"]
    images = make_images(case, layout, torch.float32).requires_grad_()
    ids = make_ids(case, 0.5)
    ids = torch.cat([ids, ids[:, :2], ids[:, :1]], 1)
    out = gather_patches(images, ids, case.patch, dtype=dtype)
    weight = torch.randn(out.transpose(1, 2).shape).to(dtype).transpose(1, 2)
    (grad,) = torch.autograd.grad(out, images, weight)
    (expected,) = torch.autograd.grad(take(patchify(images, case.patch), ids), images, weight.float())
    assert grad.dtype == images.dtype
    assert grad.is_contiguous(memory_format=torch.channels_last) == (layout in ("channels_last", "cropped"))
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "layout", "masks"), [(torch.uint8, "channels_last", 1), (torch.float32, "nchw", 2)])
def test_opcheck(dtype, layout, masks):
    case = CASES["five-channels"]
    images, ids = make_images(case, layout, dtype), make_ids(case._replace(n=masks * case.n))
    mean, std = patches.check_statistics(images, *make_mean_std(5))
    if dtype == torch.float32:
        images.requires_grad_()
    torch.library.opcheck(torch.ops.fastmae.gather_patches, (images, ids, mean, std, *case.patch, torch.float32))
    grad = torch.randn(*ids.shape, case.pixels)
    arguments = (grad, ids, list(images.shape), layout == "channels_last", *case.patch, torch.float32)
    torch.library.opcheck(torch.ops.fastmae.gather_patches_backward, arguments)


def test_compiles_into_one_graph():
    case, (mean, std) = CASES["wide-patch"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.float32).requires_grad_(), make_ids(case)

    def step(images, ids, mean, std):
        with torch.autocast("cpu", torch.bfloat16):
            return gather_patches(images, ids, case.patch, mean, std).float().square().sum()

    compiled = torch.compile(step, fullgraph=True)
    expected, got = step(images, ids, mean, std), compiled(images, ids, mean, std)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, images), torch.autograd.grad(expected, images))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cuda_equals_cpu(case, layout):
    dtype = dtype_of(case, layout, torch.uint8, torch.float32, torch.bfloat16, torch.float64)
    images, ids, (mean, std) = make_images(case, layout, dtype), make_ids(case), make_mean_std(case.channels)
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
