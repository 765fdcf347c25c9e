"""Several masks an image: the ops and the model read the same image for each, as if it had been repeated."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from patch_cases import CASES, Case, make_ids, make_images, make_mean_std

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import masking_from_noise, patches
from fastmae.ops._dispatch import is_interpreted, load_kernels
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_patch_mse import masked_patch_mse

pytestmark = pytest.mark.ops

R = 3
LAYOUTS = ("channels_last", "nchw", "cropped")
SOME = {name: CASES[name] for name in ("p16", "five-channels", "wide-patch")}


def repeated(case: Case) -> Case:
    return case._replace(n=case.n * R)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME.values(), ids=SOME.keys())
def test_gather_equals_that_of_repeated_images(case, layout, dtype):
    images, ids, affine = make_images(case, layout, dtype), make_ids(repeated(case)), make_mean_std(case.channels)
    out = gather_patches(images, ids, case.patch, *affine)
    assert out.shape == (*ids.shape, case.pixels)
    assert torch.equal(out, gather_patches(images.repeat_interleave(R, 0), ids, case.patch, *affine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_gather_adds_over_the_masks(layout, dtype):
    case = CASES["wide-patch"]
    images = make_images(case, layout, dtype).requires_grad_()
    ids = make_ids(repeated(case), 0.6)
    ids[1] = ids[0]
    weight = torch.randn(*ids.shape, case.pixels).to(dtype)
    (grad,) = torch.autograd.grad(gather_patches(images, ids, case.patch), images, weight)
    exact = images.detach().double().requires_grad_()
    expected = gather_patches(exact.repeat_interleave(R, 0), ids, case.patch)
    (expected,) = torch.autograd.grad(expected, exact, weight.double())
    # One unit in the last place, not half of one: Triton's interpreter truncates where hardware rounds.
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(grad, torch.autograd.grad(gather_patches(images, ids, case.patch), images, weight)[0])


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("case", SOME.values(), ids=SOME.keys())
def test_loss_equals_that_of_repeated_images(case, dtype, full, norm_pix):
    images, ids, affine = (
        make_images(case, "channels_last", dtype),
        make_ids(repeated(case)),
        make_mean_std(case.channels),
    )
    pred = torch.randn(R * case.n, case.num_patches if full else ids.shape[1], case.pixels, requires_grad=True)
    weight = torch.rand(ids.shape)
    results = []
    for x in (images, images.repeat_interleave(R, 0)):
        losses = masked_patch_mse(pred, x, ids, case.patch, norm_pix, *affine, reduction="none")
        results.append((losses.detach(), torch.autograd.grad(losses, pred, weight)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_one_image_and_many_masks_on_the_plain_path_go_by_chunks():
    if is_interpreted():
        pytest.skip("the plain path alone goes by chunks")
    case = Case(7, 3, (128, 128), (16, 16), 0.5)
    images, ids = make_images(case, "channels_last", torch.uint8), make_ids(repeated(case))
    assert 1 < len(list(patches.chunks(images, ids, case.patch))) < case.n
    out = gather_patches(images, ids, 16)
    assert torch.equal(out, gather_patches(images.repeat_interleave(R, 0), ids, 16))


def test_opcheck():
    case = CASES["five-channels"]
    images, ids = make_images(case, "channels_last", torch.float32).requires_grad_(), make_ids(repeated(case))
    torch.library.opcheck(torch.ops.fastmae.gather_patches, (images, ids, None, None, *case.patch, torch.float32))
    grad = torch.randn(*ids.shape, case.pixels)
    arguments = (grad, ids, list(images.shape), True, *case.patch, torch.float32)
    torch.library.opcheck(torch.ops.fastmae.gather_patches_backward, arguments)
    for rows in (case.num_patches, ids.shape[1]):
        pred = torch.randn(len(ids), rows, case.pixels)
        rest = (images.detach(), ids, None, None, *case.patch, True, 1e-6)
        torch.library.opcheck(torch.ops.fastmae.masked_patch_mse, (pred.clone().requires_grad_(), *rest))
        torch.library.opcheck(torch.ops.fastmae.masked_patch_mse_backward, (torch.rand(ids.shape), pred, *rest))


def test_one_graph_for_all_batch_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mean, std = make_mean_std(3)

    def step(pred, images, ids):
        return masked_patch_mse(pred + gather_patches(images, ids, 8, mean, std), images, ids, 8, mean=mean, std=std)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (2, 3, 5):
        case = Case(n, 3, (32, 40), (8, 8), 0.5)
        images, ids = make_images(case, "channels_last", torch.uint8), make_ids(repeated(case))
        pred = torch.randn(len(ids), ids.shape[1], case.pixels, requires_grad=True)
        got, expected = (function(pred, images, ids) for function in (compiled, step))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, pred), torch.autograd.grad(expected, pred))
    assert counter.frame_count == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("full_pred", [True, False])
def test_model_equals_that_of_repeated_images(device, full_pred, compiled):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=2,
        decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, seed=1,
    ).to(device)  # fmt: skip
    images = make_images(Case(2, 3, (32, 48), (8, 8), 0.75), "channels_last", torch.uint8).to(device)
    masking = masking_from_noise(torch.rand(2 * R, model.num_patches, device=device), 0.75)
    if compiled and load_kernels("masking") is not None and is_interpreted():
        pytest.skip("one compilation is enough")
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
