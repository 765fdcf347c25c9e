"""Pyramids and heads on an encoder: where maps lie, which pixels they see, and what their training moves."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from fastmae.evaluate.dense import (
    LinearSegmenter,
    Scales,
    UperNet,
    add_relative_positions,
    feature_pyramid,
    mask_rcnn,
)
from fastmae.model.blocks import Stream
from fastmae.model.classifier import VisionTransformer


def encoder(img_size=(64, 64), depth=4, **options) -> VisionTransformer:
    shape = {"patch_size": 8, "embed_dim": 16, "num_heads": 2, "seed": 0}
    return VisionTransformer(0, img_size=img_size, depth=depth, **shape, **options)


def test_four_scales_of_equally_spaced_blocks():
    scales = Scales(encoder((64, 96), depth=6))
    assert scales.indices == [0, 2, 3, 5]
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert [tuple(m.shape[2:]) for m in scales(images)] == [(32, 48), (16, 24), (8, 12), (4, 6)]  # strides 2 to 16
    assert torch.equal(scales(images)[2], scales.encoder.forward_intermediates(images, [3])[0])
    small = scales(images[..., :48, :64])
    assert [tuple(m.shape[2:]) for m in small] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    padded = torch.zeros_like(images)
    padded[..., :48, :64] = images[..., :48, :64]
    assert torch.equal(small[2], scales(padded)[2][..., :6, :8])


def test_the_backbone_of_a_detector():
    maps = feature_pyramid(encoder(), 24)(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        "0": (24, 32, 32), "1": (24, 16, 16), "2": (24, 8, 8), "3": (24, 4, 4), "pool": (24, 2, 2)
    }  # fmt: skip


def test_mask_rcnn_learns_one_object():
    """A bright rectangle in upright and wide images; every part gets a gradient, the encoder too."""
    torch.manual_seed(0)
    options = {"box_batch_size_per_image": 32, "mask_head": MaskRCNNHeads(16, (16, 256), 1)}
    model = mask_rcnn(encoder(), 2, out_channels=16, **options)
    images, targets = [torch.zeros(3, 40, 64), torch.zeros(3, 64, 48)], []
    for image in images:
        image[:, 8:30, 10:40] = 1
        masks = (image[:1] > 0).to(torch.uint8)
        targets.append({"boxes": torch.tensor([[10.0, 8, 40, 30]]), "labels": torch.ones(1, dtype=int), "masks": masks})
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(16):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    unused = {"scales.encoder.norm.weight", "scales.encoder.norm.bias"}  # maps are taken in front of it
    missing = {name for name, p in model.backbone.named_parameters() if p.grad is None}
    assert missing == unused
    found = model.eval()(images)
    assert all(one["masks"].shape[-2:] == image.shape[1:] for one, image in zip(found, images, strict=True))


@pytest.mark.parametrize("head", [LinearSegmenter, UperNet])
def test_a_segmenter_learns_where_it_is_bright(head):
    torch.manual_seed(0)
    model = head(encoder((32, 48)), 2) if head is LinearSegmenter else head(encoder((32, 48)), 2, channels=8)
    images = torch.zeros(4, 3, 32, 48)
    for i in range(4):
        images[i, :, 4 * i : 4 * i + 16, 8:32] = 2
    classes = (images[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(30):
        logits = model(images)
        assert logits.shape == (4, 2, 32, 48)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(1) == classes).float().mean()
    assert right > 0.9  # 0.75 are dark


@pytest.mark.parametrize("options", [{}, {"pool": "avg", "class_token": False}])
def test_relative_positions_change_nothing_until_they_are_trained(options):
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    plain, relative = (encoder((32, 48), **options) for _ in range(2))
    add_relative_positions(relative)
    torch.testing.assert_close(relative(images), plain(images), rtol=1e-4, atol=1e-5)
    relative(images)[:, 0].sum().backward()
    attention, prefix = relative.blocks[0].attn, relative.num_prefix_tokens
    assert attention.table.grad.abs().sum() > 0
    # Two pairs of patches with one offset share a bias; with the opposite one they do not.
    index = attention.index[prefix:, prefix:].view(4, 6, 4, 6)
    assert index[0, 1, 2, 4] == index[1, 2, 3, 5] != index[2, 4, 0, 1]
    assert len(attention.index.unique()) == 7 * 11 + 3 * prefix


def test_a_relative_position_can_be_all_that_a_patch_attends_to():
    relative = add_relative_positions(encoder((32, 48)))
    attention, norm, prefix = relative.blocks[0].attn, relative.blocks[0].norm1, relative.num_prefix_tokens
    with torch.no_grad():
        attention.table.fill_(-1e4)
        attention.table[0, attention.index[prefix + 7, prefix + 8]] = 0  # the first head looks one patch to the right
    x = torch.randn(2, prefix + 24, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    attention.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention(Stream(x), norm)
    # The first 8 of 16 features are the first head's; of 48 (queries, keys, values) its values begin at 32.
    attended = seen[0][:, prefix:, :8].unflatten(1, (4, 6))
    values = attention.qkv(norm(x))[:, prefix:, 32:40].unflatten(1, (4, 6))
    torch.testing.assert_close(attended[:, :, :-1], values[:, :, 1:])


def test_errors():
    with pytest.raises(ValueError, match="encoder: expected at least 4 blocks"):
        feature_pyramid(encoder(depth=3))
    with pytest.raises(ValueError, match="encoder: expected square images"):
        mask_rcnn(encoder((32, 64)), 2)
    with pytest.raises(
        ValueError, match=r"images: expected heights and widths that 16 and 16 divide, at most \(64, 64\)"
    ):
        Scales(encoder())(torch.zeros(1, 3, 64, 80))
