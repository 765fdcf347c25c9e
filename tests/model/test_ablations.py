"""Ablated models against the reference's blocks in plain PyTorch, and what each option must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmae import reference
from fastmae.model import AblatedMAE, MaskedAutoencoderViT, build_model, create_model
from fastmae.model.ablations import OPTIONS
from fastmae.model.classifier import VisionTransformer
from fastmae.ops import masking_from_noise
from fastmae.train.flops import count_flops

SMALL = {
    "img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16,
    "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
VARIANTS = {
    "no class token": {"class_token": False},
    "mask tokens": {"encoder_mask_tokens": True},
    "mask tokens, no class token": {"encoder_mask_tokens": True, "class_token": False},
    "no decoder": {"encoder_mask_tokens": True, "decoder_depth": 0},
    "all patches": {"loss_on_all_patches": True},
    "values": {"num_outputs": 7},
    "classes": {"num_outputs": 9, "loss_on_all_patches": True},
}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def masking():
    return masking_from_noise(torch.rand(2, 24, generator=torch.Generator().manual_seed(1)), 0.75)


def variant(**options) -> AblatedMAE:
    model = create_model("mae_vit_tiny_patch16", **SMALL | {"seed": 1} | options)
    with torch.no_grad():  # no zero bias and no unit scale hides a missing term
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


def plain_predictions(model: AblatedMAE, images, masking):
    """All predictions, on the reference's blocks: masked patches become mask tokens before or behind the encoder."""

    def through(blocks, x, num_heads):
        for block in blocks:
            own = reference.Block(x.shape[-1], num_heads, 4.0)
            x = torch.func.functional_call(own, dict(block.named_parameters()), x)
        return x

    weight, masked = model.patch_embed.proj.weight, masking.mask[..., None] == 1
    x = F.conv2d(images, weight, model.patch_embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    prefix = model.num_prefix_tokens
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1) if prefix else x[:, :0]
    if model.encoder_mask_token is not None:
        x = torch.where(masked, model.encoder_mask_token, x) + model.pos_embed[:, 1:]
        latent = model.norm(through(model.blocks, torch.cat([cls, x], 1), 2))
        if not model.decoder_blocks:
            return model.decoder_pred(latent)[:, prefix:]
        x = model.decoder_embed(latent)
    else:
        x = x + model.pos_embed[:, 1:]
        rows = zip(torch.cat([cls, x], 1), masking.mask == 0, strict=True)
        rows = torch.stack([torch.cat([row[:prefix], row[prefix:][seen]]) for row, seen in rows])
        latent = model.decoder_embed(model.norm(through(model.blocks, rows, 2)))
        x = model.mask_token.expand(2, 24, -1).clone()
        x[masking.mask == 0] = latent[:, prefix:].flatten(0, 1)
        x = torch.cat([latent[:, :prefix], x], 1)
    x = through(model.decoder_blocks, x + model.decoder_pos_embed[:, 1 - prefix :], 2)
    return model.decoder_pred(model.decoder_norm(x))[:, prefix:]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_reference_blocks(images, masking, options):
    model, everywhere = variant(**options), options.get("loss_on_all_patches", False)
    expected = plain_predictions(model, images, masking)
    counted = torch.ones(2, 24, dtype=torch.bool) if everywhere else masking.mask == 1
    generator, (rows, count) = torch.Generator().manual_seed(2), (2, 24 if everywhere else 18)
    ids = masking.ids_mask.sort(1).indices if not everywhere else torch.arange(24).expand(2, -1)
    targets = None
    if options.get("num_outputs") == 7:
        targets = torch.randn(rows, count, 7, generator=generator)
        own = targets.gather(1, ids[..., None].expand(-1, -1, 7))  # in the order of positions
        loss = F.mse_loss(expected[counted], own.flatten(0, 1))
    elif options.get("num_outputs") == 9:
        targets = torch.randint(0, 9, (rows, count), generator=generator)
        loss = F.cross_entropy(expected[counted], targets.flatten())
    else:
        loss = F.mse_loss(expected[counted], reference.patchify(images, (4, 4))[counted])
    named = {} if targets is None else {"targets": targets}
    whole = model(images, masking=masking, **named)
    torch.testing.assert_close(whole.pred, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.loss, loss)
    short = model(images, masking=masking, full_pred=False, **named)
    torch.testing.assert_close(short.loss, loss)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for name, one, other in zip(names, *(torch.autograd.grad(x, parameters) for x in (loss, short.loss)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_hidden_pixels_do_not_reach_predictions(images, masking):
    hidden = masking.mask.view(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for options in ({"encoder_mask_tokens": True}, {"encoder_mask_tokens": True, "decoder_depth": 0}):
        model = variant(**options)
        changed = torch.where(hidden == 1, images + 3, images)
        assert torch.equal(model(images, masking=masking).pred, model(changed, masking=masking).pred)


def test_default_options_give_the_plain_model():
    for name, usual in OPTIONS.items():
        model = create_model("mae_vit_tiny_patch16", **SMALL | {name: usual})
        assert type(model) is MaskedAutoencoderViT
        assert name not in model.architecture


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_architecture_rebuilds_the_model(images, options):
    model = variant(**options)
    again = build_model(model.architecture)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(images), model.encode(images))


def test_a_classifier_takes_an_encoder_without_a_class_token(images):
    model = variant(class_token=False)
    shape = {k: v for k, v in SMALL.items() if not k.startswith("decoder_")}
    classifier = VisionTransformer(0, **shape, pool="avg", class_token=False, seed=2)
    classifier.load_encoder(model.state_dict())
    classifier.fc_norm.load_state_dict(torch.nn.LayerNorm(32).state_dict())
    tokens = model._encode(images, model._all_ids(2, images.device)).sum()
    torch.testing.assert_close(classifier(images), F.layer_norm(tokens.mean(1), (32,), eps=1e-6))
    with pytest.raises(ValueError, match="pool: expected avg without a class token"):
        VisionTransformer(0, **shape, class_token=False)


def test_what_mask_tokens_in_the_encoder_cost():
    """Table 1c gives 3.3 times the FLOPs for ViT-L, with a decoder of eight blocks."""
    with torch.device("meta"):
        models = [create_model("mae_vit_large_patch16", encoder_mask_tokens=tokens) for tokens in (False, True)]
    ours, bert = (count_flops(model.architecture, 64, 0.75) for model in models)
    assert bert / ours == pytest.approx(3.27, abs=0.01)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("decoder_depth: expected at least 1 block, or 0 if encoder_mask_tokens", {"decoder_depth": 0}),
        ("num_outputs: expected at least 1", {"num_outputs": 0}),
        ("norm_pix_loss: expected False", {"num_outputs": 5, "norm_pix_loss": True}),
    ],
)
def test_errors(message, options):
    with pytest.raises(ValueError, match=message):
        variant(**options)


def test_targets_of_another_shape(images, masking):
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 18, 7\)"):
        variant(num_outputs=7)(images, masking=masking, targets=torch.zeros(2, 24, 7))
