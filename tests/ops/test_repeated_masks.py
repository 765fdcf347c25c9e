"""Several masks an image: the ops and the model read the same image for each, as if it had been repeated."""

from __future__ import annotations

import pytest
import torch
from patch_cases import CASES, Case, make_ids, make_images, make_mean_std
from property_cases import plain_only

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import masking_from_noise
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops

R = 3


def repeated(case: Case) -> Case:
    return case._replace(n=case.n * R)


@pytest.mark.parametrize(("layout", "dtype"), [("channels_last", torch.uint8), ("nchw", torch.float32)])
def test_ops_equal_those_on_repeated_images(layout, dtype):
    case = CASES["five-channels"]
    images, ids, affine = make_images(case, layout, dtype), make_ids(repeated(case)), make_mean_std(case.channels)
    pred = torch.randn(*ids.shape, case.pixels, requires_grad=True)
    weight = torch.rand(ids.shape)
    results = []
    for x in (images, images.repeat_interleave(R, 0)):
        losses = masked_patch_mse(pred, x, ids, case.patch, True, *affine, reduction="none")
        patches = gather_patches(x, ids, case.patch, *affine)
        results.append((patches, losses.detach(), torch.autograd.grad(losses, pred, weight)[0]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradient_of_gather_adds_over_the_masks(dtype):
    case = CASES["wide-patch"]
    images = make_images(case, "channels_last", dtype).requires_grad_()
    ids = make_ids(repeated(case), 0.6)
    ids[1] = ids[0]
    weight = torch.randn(*ids.shape, case.pixels).to(dtype)
    (grad,) = torch.autograd.grad(gather_patches(images, ids, case.patch), images, weight)
    exact = images.detach().double().requires_grad_()
    expected = gather_patches(exact.repeat_interleave(R, 0), ids, case.patch)
    (expected,) = torch.autograd.grad(expected, exact, weight.double())
    # One unit in the last place, not half of one: Triton's interpreter truncates where hardware rounds.
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("full_pred", "compiled"), [(True, False), pytest.param(False, True, marks=plain_only)])
def test_model_equals_that_of_repeated_images(device, full_pred, compiled):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=2,
        decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, seed=1,
    ).to(device)  # fmt: skip
    images = make_images(Case(2, 3, (32, 48), (8, 8), 0.75), "channels_last", torch.uint8).to(device)
    masking = masking_from_noise(torch.rand(2 * R, model.num_patches, device=device), 0.75)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    out = forward(images, masking=masking, full_pred=full_pred)
    expected = model(images.repeat_interleave(R, 0), masking=masking, full_pred=full_pred)
    assert out.mask.shape == (2 * R, 24)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if full_pred:
        torch.testing.assert_close(model.forward_loss(images, out.pred, out.mask), expected.loss, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, model.patch_embed.proj.weight)[0] for loss in (out.loss, expected.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cuda_equals_cpu(dtype, full):
    case, (mean, std) = CASES["p16"], make_mean_std(3)
    images, ids = make_images(case, "channels_last", dtype), make_ids(repeated(case))
    pred = torch.randn(len(ids), case.num_patches if full else ids.shape[1], case.pixels)
    results = []
    for device in ("cpu", "cuda"):
        p, x, i, m, s = (t.detach().to(device) for t in (pred, images, ids, mean, std))
        x = x.requires_grad_(dtype == torch.float32)
        patch = gather_patches(x, i, case.patch, m, s)
        loss = masked_patch_mse(p.requires_grad_(), x.detach(), i, case.patch, True, m, s)
        gradients = torch.autograd.grad(loss, p)
        if dtype == torch.float32:
            gradients += torch.autograd.grad((patch * patch.detach()).sum(), x)
        results.append([t.detach().cpu() for t in (patch, loss, *gradients)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
