"""masked_patch_mse against facebookresearch's forward_loss written out in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from patch_cases import CASES, Case, make_ids, make_images, make_mean_std, normalised, patchify, take
from property_cases import assert_as_accurate, plain_only

from fastmae.ops import patches
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops


# Each case in one layout; bytes and floats, targets normalised and not.
FIELDS = ("name", "layout", "dtype", "norm_pix")
COMBINED = [
    ("p16", "channels_last", torch.uint8, True),
    ("p14", "nchw", torch.uint8, True),
    ("one-channel", "strided", torch.float32, True),
    ("five-channels", "cropped", torch.float32, True),
    ("wide-patch", "channels_last", torch.uint8, False),
    ("tall-patch-two-channels", "nchw", torch.float32, False),
]


def plain_losses(pred, images, ids, patch, norm_pix=True, mean=None, std=None, eps=1e-6):
    """Loss of each masked patch, (N, M), in float32 or pred's precision; pred has all patches, or those of ids."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    target = take(patchify(normalised(images, mean, std, dtype), patch), ids)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps) ** 0.5
    pred = pred if pred.shape[1] == ids.shape[1] else take(pred, ids)
    return (pred.to(dtype) - target).square().mean(-1)


def assert_agrees(pred, *arguments):
    """Losses and gradients."""
    op = lambda pred: masked_patch_mse(pred, *arguments, reduction="none")  # noqa: E731
    assert_as_accurate(op, lambda pred: plain_losses(pred, *arguments), (pred.detach().requires_grad_(),))


@pytest.mark.parametrize(FIELDS, COMBINED)
def test_losses_and_gradients(name, layout, dtype, norm_pix):
    case = CASES[name]
    images, ids, (mean, std) = make_images(case, layout, dtype), make_ids(case), make_mean_std(case.channels)
    full = torch.randn(case.n, case.num_patches, case.pixels)
    for pred in (full, take(full, ids)):
        assert_agrees(pred, images, ids, case.patch, norm_pix, mean, std)


def test_the_mean_is_the_default_and_half_predictions_have_a_loss_in_float32():
    case, (mean, std) = CASES["wide-patch"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    pred = torch.randn(*ids.shape, case.pixels).bfloat16().requires_grad_()
    losses = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, losses.mean())
    assert torch.autograd.grad(loss, pred)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("name", ["wide-patch", "one-channel"])
def test_constant_and_saturated_patches(name, value):
    """A grey patch is not constant once its channels are normalised; a patch of one channel is, and its target is 0."""
    case = CASES[name]
    images, ids = make_images(case, "channels_last", torch.uint8).fill_(value), make_ids(case)
    assert_agrees(torch.randn(*ids.shape, case.pixels), images, ids, case.patch, True, *make_mean_std(case.channels))


def test_zero_eps_does_not_leak_into_visible_patches():
    images, ids = torch.zeros(1, 1, 16, 16), torch.tensor([[0]])
    images[:, :, :8, :8] = torch.randn(8, 8)
    pred = torch.randn(1, 4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_patch_mse(pred, images, ids, 8, eps=0.0), pred)
    assert grad[0, 0].isfinite().all()
    assert grad[0, 1:].eq(0).all()


def test_all_patches_masked_means_the_order_of_ids():
    assert_agrees(torch.randn(1, 4, 64), torch.randn(1, 1, 16, 16), torch.tensor([[2, 0, 3, 1]]), (8, 8))


@pytest.mark.parametrize(("patch", "norm_pix"), [((1, 1), False), ((32, 32), True), ((64, 96), True)])
def test_tiny_and_huge_patches(patch, norm_pix):
    channels = 1 if patch == (1, 1) else 3
    case = Case(1, channels, (2 * patch[0], 2 * patch[1]), patch, 0.75)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    assert_agrees(torch.randn(1, 4, case.pixels), images, ids, patch, norm_pix, *make_mean_std(channels))


@plain_only
@pytest.mark.parametrize("full", [True, False])
def test_more_images_than_one_chunk_of_the_plain_path(full):
    case = Case(13, 3, (128, 128), (16, 16), 0.5)
    images, ids, (mean, std) = make_images(case, "channels_last", torch.uint8), make_ids(case), make_mean_std(3)
    assert 1 < len(list(patches.chunks(images, ids, case.patch))) < case.n
    pred = torch.randn(case.n, case.num_patches if full else ids.shape[1], case.pixels)
    assert_agrees(pred, images, ids, (16, 16), True, mean, std)


@plain_only
def test_other_batch_sizes_and_mask_ratios_share_a_graph():
    """One graph for the first sizes, one for all others; one more once images have several masks."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mean, std = make_mean_std(3)

    def step(pred, images, ids):
        pred = pred + gather_patches(images, ids, 8, mean, std)
        return masked_patch_mse(pred, images, ids, 8, mean=mean, std=std)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n, ratio, masks, graphs in ((2, 0.2, 1, 1), (3, 0.4, 1, 2), (5, 0.8, 1, 2), (2, 0.5, 3, 3), (5, 0.6, 3, 3)):
        case = Case(n, 3, (32, 40), (8, 8), ratio)
        images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case._replace(n=masks * n))
        pred = torch.randn(*ids.shape, case.pixels, requires_grad=True)
        got, expected = (function(pred, images, ids) for function in (compiled, step))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, pred), torch.autograd.grad(expected, pred))
        assert counter.frame_count == graphs


@pytest.mark.gpu
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(FIELDS, COMBINED)
def test_cuda_equals_cpu(name, layout, dtype, norm_pix, full):
    case = CASES[name]
    images, (mean, std) = make_images(case, layout, dtype), make_mean_std(case.channels)
    ids = make_ids(case._replace(n=2 * case.n))
    pred = torch.randn(len(ids), case.num_patches if full else ids.shape[1], case.pixels)
    results = []
    for device in ("cpu", "cuda"):
        p, x, i, m, s = (t.detach().to(device) for t in (pred, images, ids, mean, std))
        loss = masked_patch_mse(p.requires_grad_(), x, i, case.patch, norm_pix, m, s)
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, p)[0].cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
