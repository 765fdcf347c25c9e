"""The reference is the truth of the suite, so it is held against the paper's own statements."""

from __future__ import annotations

import math

import pytest
import torch

from fastmae.reference import MaskedAutoencoder, patchify, sincos_positions, unpatchify

SMALL = {
    "img_size": (24, 32), "patch_size": (8, 8), "embed_dim": 32, "depth": 1, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture
def model() -> MaskedAutoencoder:
    return MaskedAutoencoder(**SMALL)


def masked_pixels(mask: torch.Tensor) -> torch.Tensor:
    """The mask as an image (N, 1, H, W)."""
    return unpatchify(mask[..., None].expand(-1, -1, 64), (8, 8), (3, 4))


def test_patches_are_rows_then_columns_then_channels():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert patches[1, 2].reshape(2, 3, 3).equal(images[1, :, 2:4, 0:3].permute(1, 2, 0))
    assert unpatchify(patches, (2, 3), (2, 2)).equal(images)


def test_encoder_sees_visible_patches_only(model):
    images, noise = torch.randn(2, 3, 24, 32), torch.rand(2, 12)
    latent, mask, _ = model.forward_encoder(images, 0.75, noise)
    assert latent.shape == (2, 1 + 3, 32)
    assert mask.sum(1).tolist() == [9.0, 9.0]
    hidden = images + 7 * masked_pixels(mask)
    assert torch.equal(model.forward_encoder(hidden, 0.75, noise)[0], latent)


def test_loss_counts_masked_patches_only(model):
    images, pred = torch.randn(2, 3, 24, 32), torch.randn(2, 12, 192)
    mask = (torch.rand(2, 12) < 0.5).float()
    loss = model.forward_loss(images, pred, mask)
    assert torch.equal(model.forward_loss(images, pred + 5 * (1 - mask[..., None]), mask), loss)
    by_hand = [
        ((pred[n, i] - patchify(images, (8, 8))[n, i]) ** 2).mean() for n in range(2) for i in range(12) if mask[n, i]
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_normalised_target_has_zero_mean_and_unit_variance():
    model = MaskedAutoencoder(**SMALL, norm_pix_loss=True)
    images, mask = 3 * torch.randn(1, 3, 24, 32) + 2, torch.ones(1, 12)
    # Predicting the mean costs the target's biased variance, (P - 1) / P.
    loss = model.forward_loss(images, torch.zeros(1, 12, 192), mask)
    torch.testing.assert_close(loss, torch.tensor(191 / 192), rtol=1e-4, atol=0)


def test_every_masked_patch_gets_its_own_prediction(model):
    _, pred, mask = model(torch.randn(1, 3, 24, 32))
    rows = pred[0][mask[0].bool()]
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_noise_decides_the_mask(model):
    noise = torch.rand(2, 12)
    _, _, mask = model(torch.randn(2, 3, 24, 32), 0.75, noise)
    kept = noise.argsort(1)[:, :3]
    assert mask.gather(1, kept).sum() == 0


def test_positions_are_sines_of_column_then_row():
    table = sincos_positions(8, (2, 3))[0]
    assert table.shape == (7, 8)
    assert table[0].abs().max() == 0
    row, col = 1, 2
    expected = [f(p / 10000 ** (i / 2)) for p in (col, row) for f in (math.sin, math.cos) for i in range(2)]
    torch.testing.assert_close(table[1 + row * 3 + col], torch.tensor(expected))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, (2, 2))


def test_initialisation():
    model = MaskedAutoencoder(img_size=(32, 32), embed_dim=256, depth=1, num_heads=4)
    bound = math.sqrt(6 / (256 + 768))
    for weight in (model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert 0.017 < model.cls_token.std() < 0.023
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))
