"""Images of another size than the model was made for: the reference built at that size, with stretched positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastmae.model import MaskedAutoencoderViT
from fastmae.model.initialization import sincos_positions
from fastmae.ops import random_masking
from fastmae.reference import MaskedAutoencoder

SMALL = {
    "img_size": (32, 48), "patch_size": (8, 8), "embed_dim": 64, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


def plain_positions(dim: int, grid: tuple[int, int], base: tuple[int, int]) -> torch.Tensor:
    """Appendix A.1 value by value, at the centres of a grid's patches in the coordinates of another grid."""
    table = torch.zeros(1 + grid[0] * grid[1], dim, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) / grid[0] * base[0] - 0.5, (j + 0.5) / grid[1] * base[1] - 0.5
            waves = [
                wave(at / 10000 ** (k / (dim // 4)))
                for at in (x, y)
                for wave in (math.sin, math.cos)
                for k in range(dim // 4)
            ]
            table[1 + i * grid[1] + j] = torch.tensor(waves)
    return table[None].float()


def images_of(n: int, size: tuple[int, int], device) -> torch.Tensor:
    return torch.randint(0, 256, (n, *size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [pytest.param((16, 24), marks=pytest.mark.ops), (48, 40)])
def test_another_size_equals_the_reference_at_that_size(device, size):
    model = MaskedAutoencoderViT(**SMALL, seed=1).to(device)
    model.set_input_size(size)
    grid, base = (size[0] // 8, size[1] // 8), (4, 6)
    assert (model.grid_size, model.num_patches) == (grid, grid[0] * grid[1])
    slow = MaskedAutoencoder(**SMALL | {"img_size": size}).to(device)
    tables = {"pos_embed": plain_positions(64, grid, base), "decoder_pos_embed": plain_positions(32, grid, base)}
    slow.load_state_dict(model.state_dict() | tables)

    images, noise = images_of(2, size, device), torch.rand(2, model.num_patches, device=device)
    normalised = (images / 255 - model.mean.view(1, 3, 1, 1)) / model.std.view(1, 3, 1, 1)
    loss, pred, mask = slow(normalised, noise=noise)
    out = model(images, noise=noise)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.pred, pred, rtol=1e-3, atol=1e-4)
    assert torch.equal(out.mask, mask)
    latent, _, _ = slow.forward_encoder(normalised, 0.75, noise)
    torch.testing.assert_close(model.forward_encoder(images, 0.75, noise)[0], latent, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)

    fast = model(images, masking=random_masking(2, model.num_patches, 0.75, seed=0, device=device), full_pred=False)
    fast.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_positions_belong_to_places_of_the_picture():
    coarse, fine = sincos_positions(16, (1, 1), (3, 5)), sincos_positions(16, (3, 5))
    assert torch.equal(coarse[0, 1], fine[0, 1 + 1 * 5 + 2])  # the one patch is centred where the central patch is
    assert torch.equal(sincos_positions(16, (3, 5), (3, 5)), fine)
    assert not torch.equal(sincos_positions(16, (4, 5), (3, 5))[0, 1], fine[0, 1])
    torch.testing.assert_close(sincos_positions(16, (6, 4), (3, 5)), plain_positions(16, (6, 4), (3, 5)))


def test_the_models_own_size_is_untouched_by_a_detour():
    model = MaskedAutoencoderViT(**SMALL, seed=1)
    images, before = images_of(2, (32, 48), "cpu"), {k: v.clone() for k, v in model.state_dict().items()}
    masking = random_masking(2, 24, 0.75, seed=0)
    expected = model(images, masking=masking, full_pred=False)
    model.set_input_size((16, 24))
    assert (model.img_size, model.input_size) == ((32, 48), (16, 24))
    assert model.architecture["img_size"] == [32, 48]
    during = model.state_dict()
    assert during.keys() == before.keys()
    assert all(torch.equal(during[name], before[name]) for name in before)
    model.set_input_size()
    assert torch.equal(model(images, masking=masking, full_pred=False).loss, expected.loss)


def test_a_size_that_was_not_announced_is_refused():
    model = MaskedAutoencoderViT(**SMALL)
    with pytest.raises(ValueError, match=r"images: expected \(N, 3, 32, 48\)"):
        model(images_of(1, (16, 24), "cpu"))
    model.set_input_size((16, 24))
    with pytest.raises(ValueError, match=r"images: expected \(N, 3, 16, 24\)"):
        model(images_of(1, (32, 48), "cpu"))
    with pytest.raises(ValueError, match="size: size 20x20 does not divide into patches of 8x8"):
        model.set_input_size(20)
    assert model.input_size == (16, 24)


def test_positions_follow_the_model():
    model = MaskedAutoencoderViT(**SMALL, seed=1)
    model.set_input_size(16)
    images = images_of(2, (16, 16), "cpu")
    expected = model.to(torch.bfloat16).encode(images)
    assert expected.dtype == torch.bfloat16
    again = MaskedAutoencoderViT(**SMALL).to("meta").to_empty(device="cpu").to(torch.bfloat16)
    again.load_state_dict(model.state_dict())
    again.set_input_size(16)
    assert torch.equal(again.encode(images), expected)


def test_one_graph_a_size():
    model = MaskedAutoencoderViT(**SMALL, seed=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for size in [(16, 24), (32, 48), (16, 24), (32, 48), (16, 24)]:
        model.set_input_size(size)
        masking = random_masking(2, model.num_patches, 0.75, seed=0)
        images = images_of(2, size, "cpu")
        got = compiled(images, masking=masking, full_pred=False).loss
        torch.testing.assert_close(got, model(images, masking=masking, full_pred=False).loss)
    assert counter.frame_count == 2
