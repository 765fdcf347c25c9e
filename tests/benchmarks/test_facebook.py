"""The step benchmark compares like with like: a change to facebookresearch's model leaves loss and gradients alone."""

from __future__ import annotations

import pytest
import torch
from facebook import Changes, FacebookMAE, share_parameters

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking

SMALL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, "norm_pix_loss": True,
}  # fmt: skip
ALL = [Changes("plain"), Changes(blocks=True, cast_once=True), Changes("fastmae", ops=True, blocks=True)]


@pytest.fixture
def setting():
    fast = MaskedAutoencoderViT(**SMALL, seed=0)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = (s.view(1, 3, 1, 1) for s in (fast.mean, fast.std))
    return fast, images, (images / 255 - mean) / std, random_masking(3, fast.num_patches, 0.75, seed=0)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("changes", ALL, ids=repr)
def test_a_change_leaves_loss_and_gradients_alone(setting, changes):
    fast, images, pixels, masking = setting
    model = FacebookMAE(fast, changes)
    expected = fast(images, masking=masking).loss
    loss = model(images, pixels, masking)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    theirs = gradients(fast, expected)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_bfloat16_residual_stream_is_near_but_not_the_same(setting):
    fast, images, pixels, masking = setting
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = share_parameters(fast, residual_dtype="bfloat16")(images, masking=masking).loss
        theirs = FacebookMAE(fast, Changes(bf16_residual=True))(images, pixels, masking)
        exact = FacebookMAE(fast, Changes())(images, pixels, masking)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    torch.testing.assert_close(theirs, exact, rtol=1e-2, atol=0)
    assert theirs != exact
