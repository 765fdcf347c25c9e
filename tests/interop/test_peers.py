"""Three implementations, one model: reference, fast model, and Hugging Face's ViTMAE, which no one here wrote."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmae.model import MaskedAutoencoderViT
from fastmae.reference import MaskedAutoencoder

SMALL = {
    "embed_dim": 64, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip
# Image and patch size, channels, normalised targets. Hugging Face's has square images and patches alone.
SQUARE = [((32, 32), (8, 8), 3, True), ((32, 32), (8, 8), 1, False), ((40, 40), (8, 8), 5, True)]
SHAPES = [*SQUARE, ((24, 48), (8, 8), 3, False), ((32, 48), (8, 16), 5, True), ((28, 42), (14, 14), 1, False)]
IN_INTERPRETER = (SHAPES[1], SHAPES[4])
FIELDS = ("img_size", "patch_size", "channels", "norm_pix_loss")


def cases(shapes):
    return [pytest.param(*shape, marks=[pytest.mark.ops] if shape in IN_INTERPRETER else []) for shape in shapes]


def trained_looking(model: nn.Module) -> None:
    """Perturbs every trained parameter, so that no zero bias and no unit scale hides a missing term."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch's names to ViTMAE's."""
    renamed = {}
    for name, value in state.items():
        for old, new in (
            ("decoder_blocks.", "decoder.decoder_layers."), ("blocks.", "vit.layers."),
            (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".attn.proj.", ".attention.o_proj."),
            ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
        ):  # fmt: skip
            if old in name and not (old == "blocks." and "decoder" in name):
                name = name.replace(old, new)
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = chunk
            continue
        direct = {
            "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
            "norm.weight": "vit.layernorm.weight", "norm.bias": "vit.layernorm.bias",
        }  # fmt: skip
        if name in direct:
            name = direct[name]
        elif name.startswith(("decoder_embed", "decoder_norm", "decoder_pred", "decoder_pos", "mask_token")):
            name = f"decoder.{name}"
        renamed[name] = value
    return renamed


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(FIELDS, cases(SHAPES))
def test_fast_model_equals_reference(img_size, patch_size, channels, norm_pix_loss):
    fast = MaskedAutoencoderViT(img_size, patch_size, channels, norm_pix_loss=norm_pix_loss, **SMALL)
    trained_looking(fast)
    slow = MaskedAutoencoder(img_size, patch_size, channels, norm_pix_loss=norm_pix_loss, **SMALL)
    slow.load_state_dict(fast.state_dict(), strict=True)
    images = torch.randn(3, channels, *img_size)
    noise = torch.rand(3, fast.num_patches)

    got = fast(images, 0.75, noise=noise)
    loss, pred, mask = slow(images, 0.75, noise)
    torch.testing.assert_close(got.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.pred, pred, rtol=0, atol=1e-4)
    assert torch.equal(got.mask, mask)

    got.loss.backward()
    loss.backward()
    expected = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, expected[name].grad) < 1e-5, name


@pytest.mark.parametrize(FIELDS, cases(SQUARE))
def test_hugging_face_agrees(img_size, patch_size, channels, norm_pix_loss):
    transformers = pytest.importorskip("transformers")
    fast = MaskedAutoencoderViT(img_size, patch_size, channels, norm_pix_loss=norm_pix_loss, **SMALL)
    trained_looking(fast)
    peer = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=img_size[0],
            patch_size=patch_size[0], num_channels=channels, decoder_hidden_size=32, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2, decoder_intermediate_size=128, layer_norm_eps=1e-6, mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss,
        )
    )  # fmt: skip
    peer.load_state_dict(to_hugging_face(fast.state_dict()), strict=True)
    images = torch.randn(2, channels, *img_size)
    noise = torch.rand(2, fast.num_patches)

    got, theirs = fast(images, 0.75, noise=noise), peer(images, noise=noise)
    torch.testing.assert_close(got.loss, theirs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.pred, theirs.logits, rtol=0, atol=1e-4)
    assert torch.equal(got.mask, theirs.mask)
    # Without position tables the peer would predict the same for every masked patch, and agree with nothing learnt.
    first, second = theirs.logits[0][theirs.mask[0].bool()][:2]
    assert not torch.allclose(first, second, atol=1e-3)

    got.loss.backward()
    theirs.loss.backward()
    gradients = {name: p.grad for name, p in fast.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in peer.named_parameters()}
    for name, gradient in to_hugging_face(gradients).items():
        if name.endswith(".k_proj.bias"):
            # A constant added to every key cancels in the softmax: this gradient is rounding noise around zero.
            assert gradient.norm() < 1e-5
            continue
        assert relative(gradient, expected[name]) < 1e-5, name
