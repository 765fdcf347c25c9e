"""masked_patch_mse against facebookresearch's forward_loss written out in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from patch_cases import (
    CASES,
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
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops


# Each case has two layouts and both dtypes; each layout meets both dtypes, with normalised targets and without.
FIELDS = ("name", "layout", "dtype", "norm_pix")
COMBINED = [
    ("p16", "channels_last", torch.uint8, True),
    ("p16", "nchw", torch.float32, False),
    ("p14", "nchw", torch.uint8, True),
    ("p14", "channels_last", torch.float32, True),
    ("one-channel", "cropped", torch.uint8, False),
    ("one-channel", "strided", torch.float32, True),
    ("five-channels", "strided", torch.uint8, True),
    ("five-channels", "cropped", torch.float32, True),
    ("wide-patch", "channels_last", torch.uint8, False),
    ("wide-patch", "strided", torch.float32, False),
    ("tall-patch-two-channels", "cropped", torch.uint8, True),
    ("tall-patch-two-channels", "channels_last", torch.float32, False),
]


def plain_losses(pred, images, ids, patch, norm_pix, mean, std, dtype=torch.float64, eps=1e-6):
    """Loss of each masked patch, (N, M), everything in the given dtype; pred in the order of ids."""
    target = take(patchify(normalised(images, mean, std, dtype), patch), ids)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps) ** 0.5
    return (pred.to(dtype) - target).square().mean(-1)


def value_and_grad(losses, pred, weight):
    return losses.detach(), torch.autograd.grad(losses, pred, weight.to(losses.dtype))[0]


@pytest.mark.parametrize(FIELDS, COMBINED)
def test_losses_and_gradients(name, layout, dtype, norm_pix):
    case = CASES[name]
    images, ids, (mean, std) = make_images(case, layout, dtype), make_ids(case), make_mean_std(case.channels)
    full = torch.randn(case.n, case.num_patches, case.pixels, requires_grad=True)
    weight = torch.rand(ids.shape) + 0.5
    exact, plain = (
        value_and_grad(plain_losses(take(full, ids), images, ids, case.patch, norm_pix, mean, std, d), full, weight)
        for d in (torch.float64, torch.float32)
    )
    for pred in (full, take(full, ids)):
        losses = masked_patch_mse(pred, images, ids, case.patch, norm_pix, mean, std, reduction="none")
        assert losses.dtype == torch.float32
        losses, grad = value_and_grad(losses, full, weight)
        assert_as_accurate(losses, plain[0], exact[0], tiny=1e-6)
        assert_as_accurate(grad, plain[1], exact[1].double(), tiny=1e-7)
        chosen = torch.zeros(case.n, case.num_patches, dtype=torch.bool).scatter_(1, ids, True)
        assert grad[~chosen].eq(0).all()


def test_reductions():
    case, (mean, std) = CASES["wide-patch"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    pred = torch.randn(*ids.shape, case.pixels, requires_grad=True)
    losses = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std, reduction="none")
    assert losses.shape == ids.shape
    for reduction in ("mean", "sum"):
        loss = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std, reduction=reduction)
        assert loss.shape == ()
        torch.testing.assert_close(loss, getattr(losses, reduction)())
        (grad,) = torch.autograd.grad(loss, pred)
        (expected,) = torch.autograd.grad(getattr(losses, reduction)(), pred, retain_graph=True)
        torch.testing.assert_close(grad, expected)
    assert torch.equal(masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std), losses.mean())


@pytest.mark.parametrize(("dtype", "full"), [(torch.bfloat16, True), (torch.float16, False)])
def test_half_predictions_under_autocast(dtype, full):
    case, (mean, std) = CASES["wide-patch"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    pred = torch.randn(case.n, case.num_patches, case.pixels).to(dtype)
    pred = (pred if full else take(pred, ids)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std)
    assert loss.dtype == torch.float32
    reference = pred.detach().double().requires_grad_()
    expected = plain_losses(
        take(reference, ids) if full else reference, images, ids, case.patch, True, mean, std
    ).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(loss, pred), torch.autograd.grad(expected, reference)
    assert grad.dtype == dtype
    # One unit in the last place, not half of one: Triton's interpreter truncates where hardware rounds.
    torch.testing.assert_close(grad.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_and_saturated_patches(value):
    """A grey patch is not constant once its channels are normalised; a patch of one channel is, and its target is 0."""
    for case in (CASES["wide-patch"], CASES["one-channel"]):
        mean, std = make_mean_std(case.channels)
        images, ids = make_images(case, "channels_last", torch.uint8).fill_(value), make_ids(case)
        pred = torch.randn(*ids.shape, case.pixels, requires_grad=True)
        exact = plain_losses(pred, images, ids, case.patch, True, mean, std)
        plain = plain_losses(pred, images, ids, case.patch, True, mean, std, torch.float32)
        losses = masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std, reduction="none")
        assert_as_accurate(losses.detach(), plain.detach(), exact.detach(), tiny=1e-6)
        (grad,) = torch.autograd.grad(losses.sum(), pred)
        assert grad.isfinite().all()


def test_zero_eps_does_not_leak_into_visible_patches():
    images, ids = torch.zeros(1, 1, 16, 16), torch.tensor([[0]])
    images[:, :, :8, :8] = torch.randn(8, 8)
    pred = torch.randn(1, 4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_patch_mse(pred, images, ids, 8, eps=0.0), pred)
    assert grad[0, 0].isfinite().all()
    assert grad[0, 1:].eq(0).all()


def test_repeated_ids_add_up():
    case = CASES["one-channel"]
    images, ids = make_images(case, "nchw", torch.float32), make_ids(case)[:, [0, 1, 0, 2, 0]]
    pred = torch.randn(case.n, case.num_patches, case.pixels, requires_grad=True)
    loss = masked_patch_mse(pred, images, ids, 8, reduction="sum")
    expected = plain_losses(take(pred, ids), images, ids, case.patch, True, None, None).sum()
    (grad,), (wanted,) = torch.autograd.grad(loss, pred), torch.autograd.grad(expected, pred)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_all_patches_masked_means_the_order_of_ids():
    images, ids = torch.randn(1, 1, 16, 16), torch.tensor([[2, 0, 3, 1]])
    pred = torch.randn(1, 4, 64)
    expected = plain_losses(pred, images, ids, (8, 8), True, None, None)
    losses = masked_patch_mse(pred, images, ids, 8, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("patch", "norm_pix"), [((1, 1), False), ((32, 32), True), ((64, 96), True)])
def test_tiny_and_huge_patches(patch, norm_pix):
    channels = 1 if patch == (1, 1) else 3
    case = Case(1, channels, (2 * patch[0], 2 * patch[1]), patch, 0.75)
    images, ids, (mean, std) = make_images(case, "channels_last", torch.uint8), make_ids(case), make_mean_std(channels)
    pred = torch.randn(1, 4, case.pixels, requires_grad=True)
    weight = torch.ones(ids.shape)
    got = value_and_grad(
        masked_patch_mse(pred, images, ids, patch, norm_pix, mean, std, reduction="none"), pred, weight
    )
    wanted = value_and_grad(plain_losses(take(pred, ids), images, ids, patch, norm_pix, mean, std), pred, weight)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-7)


@plain_only
@pytest.mark.parametrize("full", [True, False])
def test_more_images_than_one_chunk_of_the_plain_path(full):
    case = Case(13, 3, (128, 128), (16, 16), 0.5)
    images, ids, (mean, std) = make_images(case, "channels_last", torch.uint8), make_ids(case), make_mean_std(3)
    assert 1 < len(list(patches.chunks(images, ids, case.patch))) < case.n
    pred = torch.randn(case.n, case.num_patches if full else ids.shape[1], case.pixels, requires_grad=True)
    weight = torch.rand(ids.shape)
    got = value_and_grad(masked_patch_mse(pred, images, ids, 16, True, mean, std, reduction="none"), pred, weight)
    chosen = take(pred, ids) if full else pred
    wanted = value_and_grad(plain_losses(chosen, images, ids, case.patch, True, mean, std), pred, weight)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("full", "dtype", "masks"), [(True, torch.uint8, 1), (False, torch.float32, 2)])
def test_opcheck(full, dtype, masks):
    case = CASES["five-channels"]
    images, ids = make_images(case, "channels_last", dtype), make_ids(case._replace(n=masks * case.n))
    mean, std = patches.check_statistics(images, *make_mean_std(5))
    pred = torch.randn(len(ids), case.num_patches if full else ids.shape[1], case.pixels)
    rest = (images, ids, mean, std, *case.patch, True, 1e-6)
    torch.library.opcheck(torch.ops.fastmae.masked_patch_mse, (pred.clone().requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.fastmae.masked_patch_mse_backward, (torch.rand(ids.shape), pred, *rest))


@plain_only
def test_compiles_into_one_graph():
    case, (mean, std) = CASES["wide-patch"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(case)
    hidden, weight = torch.randn(case.n, case.num_patches, 8), torch.randn(case.pixels, 8, requires_grad=True)

    def step(hidden, weight, images, ids, mean, std):
        pred = torch.nn.functional.linear(hidden, weight)
        return masked_patch_mse(pred, images, ids, case.patch, mean=mean, std=std)

    arguments = (hidden, weight, images, ids, mean, std)
    got, expected = torch.compile(step, fullgraph=True)(*arguments), step(*arguments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, weight), torch.autograd.grad(expected, weight))


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


def test_second_derivative_is_refused():
    images, ids = torch.randn(1, 1, 16, 16), torch.tensor([[2, 0]])
    pred = torch.randn(1, 2, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_patch_mse(pred, images, ids, 8), pred, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), pred)


@pytest.mark.gpu
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(FIELDS, COMBINED)
def test_cuda_equals_cpu(name, layout, dtype, norm_pix, full):
    case = CASES[name]
    images, ids, (mean, std) = make_images(case, layout, dtype), make_ids(case), make_mean_std(case.channels)
    pred = torch.randn(case.n, case.num_patches if full else ids.shape[1], case.pixels)
    results = []
    for device in ("cpu", "cuda"):
        p, x, i, m, s = (t.detach().to(device) for t in (pred, images, ids, mean, std))
        loss = masked_patch_mse(p.requires_grad_(), x, i, case.patch, norm_pix, m, s)
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, p)[0].cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
