"""The fast model: training path, encoder, state dict, initialisation, compilation, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from property_cases import plain_only

from fastmae.model import PRESETS, MAEOutput, MaskedAutoencoderViT, create_model
from fastmae.ops import Masking, masking_from_noise, random_masking
from fastmae.reference import MaskedAutoencoder

SMALL = {
    "img_size": (32, 48), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture
def model(device) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**SMALL, seed=1).to(device)


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def gradients(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.ops
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_training_path_has_the_same_loss_and_gradients(model, images, order):
    noise = torch.rand(3, model.num_patches, device=images.device)
    masking = masking_from_noise(noise, 0.75)
    if order == "ascending":
        masking = random_masking(3, model.num_patches, 0.75, seed=4, device=images.device)
    full = model(images, masking=masking)
    fast = model(images, masking=masking, full_pred=False)
    assert fast.pred.shape == (3, masking.ids_mask.shape[1], 8 * 8 * 3)
    torch.testing.assert_close(fast.loss, full.loss, rtol=1e-6, atol=0)
    rows = full.pred.gather(1, masking.ids_mask[..., None].expand(-1, -1, 192))
    torch.testing.assert_close(fast.pred, rows, rtol=1e-4, atol=1e-5)
    expected = gradients(model, full.loss)
    for name, gradient in gradients(model, fast.loss).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name


@pytest.mark.ops
@pytest.mark.parametrize(("full_pred", "compiled"), [(True, False), pytest.param(False, True, marks=plain_only)])
def test_several_masks_per_image_are_those_of_repeated_images(model, images, full_pred, compiled):
    masking = masking_from_noise(torch.rand(3 * len(images), model.num_patches, device=images.device), 0.75)
    forward = torch.compile(model, backend="eager") if compiled else model
    out = forward(images, masking=masking, full_pred=full_pred)
    expected = model(images.repeat_interleave(3, 0), masking=masking, full_pred=full_pred)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if full_pred:
        torch.testing.assert_close(model.forward_loss(images, out.pred, out.mask), expected.loss, rtol=1e-5, atol=0)
    got, want = (torch.autograd.grad(loss, model.patch_embed.proj.weight)[0] for loss in (out.loss, expected.loss))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_output_unpacks_like_facebookresearch(model, images):
    loss, pred, mask = model(images, 0.5)
    assert isinstance(model(images), MAEOutput)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert pred.shape == (3, 24, 192)
    assert mask.sum(1).tolist() == [12.0] * 3


def test_no_mask_repeats_by_accident_and_a_seed_repeats_it(model, images):
    torch.manual_seed(3)
    first, second = model(images).mask, model(images).mask
    torch.manual_seed(3)
    again = model(images).mask
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_encode_sees_every_patch(model, images):
    latent = model.encode(images)
    assert latent.shape == (3, 25, 64)
    slow = MaskedAutoencoder(**{**SMALL, "patch_size": (8, 8)}).to(images.device)
    slow.load_state_dict(model.state_dict())
    x = slow.patch_embed((images / 255 - model.mean.view(1, 3, 1, 1)) / model.std.view(1, 3, 1, 1))
    x = torch.cat([slow.cls_token.expand(3, -1, -1), x], 1) + slow.pos_embed
    for block in slow.blocks:
        x = block(x)
    torch.testing.assert_close(latent, slow.norm(x), rtol=1e-4, atol=1e-4)


def test_facebookresearch_methods(model, images):
    floats = torch.randn(3, 3, 32, 48, device=images.device)
    noise = torch.rand(3, 24, device=images.device)
    latent, mask, ids_restore = model.forward_encoder(floats, 0.75, noise)
    pred = model.forward_decoder(latent, ids_restore)
    loss = model.forward_loss(floats, pred, mask)
    out = model(floats, noise=noise)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(pred, out.pred)
    assert torch.equal(model.unpatchify(model.patchify(floats)), floats)
    assert model.patchify(images).dtype == torch.uint8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_reference_state_dict(name):
    with torch.device("meta"):
        fast = create_model(name, in_chans=1)
        kwargs = {k: v for k, v in fast.architecture.items() if k not in ("mean", "std")}
        kwargs |= {k: tuple(kwargs[k]) for k in ("img_size", "patch_size")}
        slow = MaskedAutoencoder(**kwargs)
    shapes = {k: v.shape for k, v in fast.state_dict().items()}
    assert shapes == {k: v.shape for k, v in slow.state_dict().items()}


def test_initialisation_is_keyed_by_seed_and_name():
    a, b = MaskedAutoencoderViT(**SMALL, seed=5), MaskedAutoencoderViT(**SMALL | {"decoder_depth": 1}, seed=5)
    c = MaskedAutoencoderViT(**SMALL, seed=6)
    assert torch.equal(a.decoder_pred.weight, b.decoder_pred.weight)
    assert not torch.equal(a.decoder_pred.weight, c.decoder_pred.weight)
    assert not torch.equal(a.blocks[0].mlp.fc1.weight, a.blocks[1].mlp.fc1.weight)
    torch.manual_seed(9)
    first = MaskedAutoencoderViT(**SMALL)
    torch.manual_seed(9)
    assert torch.equal(first.norm.weight, torch.ones(64))
    assert torch.equal(first.cls_token, MaskedAutoencoderViT(**SMALL).cls_token)


def test_initialisation_is_the_papers():
    model = create_model("mae_vit_small_patch16", seed=0)
    weight = model.patch_embed.proj.weight
    bound = (6 / (16 * 16 * 3 + 384)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert model.patch_embed.proj.bias.abs().max() == 0  # unlike facebookresearch: see draw_parameter
    assert 0.018 < model.cls_token.std() < 0.022


def test_pixel_statistics_stay_in_full_precision(model):
    model.to(torch.bfloat16)
    assert model.mean.dtype == model.std.dtype == torch.float32
    assert model.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert not {"mean", "std"} & set(model.state_dict())
    empty = MaskedAutoencoderViT(**SMALL).to("meta").to_empty(device="cpu")
    assert empty.std.tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.ops
def test_autocast_is_close_to_full_precision(model, images):
    masking = random_masking(3, 24, 0.75, seed=0, device=images.device)
    full = model(images, masking=masking, full_pred=False)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        half = model(images, masking=masking, full_pred=False)
    assert half.pred.dtype == torch.bfloat16
    torch.testing.assert_close(half.loss, full.loss, rtol=2e-2, atol=0)


def test_compiles_to_one_graph(model, images):
    masking = random_masking(3, 24, 0.75, seed=0, device=images.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(images, masking=masking, full_pred=False), model(images, masking=masking, full_pred=False)
    torch.testing.assert_close(got.loss, want.loss)
    expected = gradients(model, want.loss)
    for name, gradient in gradients(model, got.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_implausible_float_images_warn_and_normalised_ones_are_those_of_uint8(images):
    model = MaskedAutoencoderViT(**SMALL).to(images.device)
    with pytest.warns(UserWarning, match="already normalised, but these range from .* to 25"):
        model(images.float())
    raw = images / 255
    model = MaskedAutoencoderViT(**SMALL).to(images.device)
    with pytest.warns(UserWarning, match=r"these range from 0 to 1; .*model.normalized\(images\) of pixels"):
        model.encode(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images.float())  # once per model
        model = MaskedAutoencoderViT(**SMALL).to(images.device)
        assert model.normalized(images) is images
        floats = model.normalized(raw)
        expected = (raw.double() - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)
        torch.testing.assert_close(floats, expected.float(), rtol=1e-6, atol=1e-6)
        assert floats.stride() == raw.stride()
        masking = random_masking(len(images), 24, 0.75, seed=0, device=images.device)
        losses = [model(pixels, masking=masking).loss for pixels in (images, floats)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        plain = MaskedAutoencoderViT(**SMALL, mean=(0, 0, 0), std=(1, 1, 1))
        plain.to(images.device).encode(raw)  # for which they are normalised


def test_channels_last_images_get_a_hint(model, images):
    with pytest.raises(ValueError, match=r"looks channels-last: pass images.permute\(0, 3, 1, 2\)\), got uint8"):
        model(images.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 50}, "img_size: size 50x50 does not divide into patches of 8x8"),
        ({"patch_size": (8, 7)}, "img_size: size 32x48 does not divide into patches of 8x7"),
        ({"img_size": (32,)}, "img_size: expected a positive int or a pair"),
        ({"embed_dim": 66}, "embed_dim: expected a multiple of num_heads=4, got 66"),
        ({"embed_dim": 66, "num_heads": 2}, "embed_dim: two-dimensional sine-cosine positions need a multiple of 4"),
        ({"decoder_depth": 0}, "decoder_depth: expected at least 1 block, got 0"),
        ({"attention": "flash"}, "attention: expected one of"),
        ({"in_chans": 4, "mean": (0.5,)}, "mean: expected one value for each of the 4 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "std: expected positive values"),
    ],
)
def test_bad_architectures_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoderViT(**SMALL | arguments)


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match=r"unknown model 'vit_b'; the presets are mae_vit_tiny_patch16"):
        create_model("vit_b")


MASKING = random_masking(3, 24, 0.5, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 3, 32, 32)), r"images: expected \(N, 3, 32, 48\), uint8 or floating point, got"),
        (lambda m: m(torch.zeros(1, 3, 32, 48, dtype=torch.int32)), "images: expected"),
        (lambda m: m(torch.zeros(1, 3, 32, 48), 1.5), "mask_ratio: expected a number strictly between 0 and 1"),
        (lambda m: m(torch.zeros(1, 3, 32, 48), 0.99), "mask_ratio: 0.99 of 24 patches keeps 0"),
        (lambda m: m(torch.zeros(1, 3, 32, 48), noise=torch.rand(1, 23)), r"noise: expected shape \(1, 24\)"),
        (
            lambda m: m(torch.zeros(2, 3, 32, 48), masking=MASKING),
            r"masking: expected ids_restore of shape \(2, 24\), or a multiple of its rows, got int64 \(3, 24\)",
        ),
        (lambda m: m(torch.zeros(3, 3, 32, 48), noise=torch.rand(3, 24), masking=MASKING), "noise: expected None when"),
        (lambda m: m.unpatchify(torch.zeros(1, 23, 192)), r"patches: expected shape \(N, 24, 192\)"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(MaskedAutoencoderViT(**SMALL))


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gpu_agrees_with_cpu(memory_format):
    cpu, gpu = MaskedAutoencoderViT(**SMALL, seed=1), MaskedAutoencoderViT(**SMALL, seed=1).cuda()
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8).contiguous(memory_format=memory_format)
    ids = torch.tensor([7, 1 << 40, 3])
    masking = random_masking(3, 24, 0.75, seed=2, epoch=5, sample_ids=ids)
    on_gpu = random_masking(3, 24, 0.75, seed=2, epoch=5, sample_ids=ids.cuda())
    for name, want, got in zip(Masking._fields, masking, on_gpu, strict=True):
        assert torch.equal(want, got.cpu()), name
    want, got = cpu(images, masking=masking), gpu(images.cuda(), masking=on_gpu, full_pred=False)
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-4, atol=0)
    expected = gradients(cpu, want.loss)
    for name, gradient in gradients(gpu, got.loss).items():
        assert (gradient.cpu() - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-6, name


@pytest.mark.gpu
def test_compiled_training_step_on_a_gpu():
    model = MaskedAutoencoderViT(**SMALL, seed=1).cuda()
    images = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    masking = random_masking(4, 24, 0.75, seed=0, device="cuda")
    losses = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses.append(forward(images, masking=masking, full_pred=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
