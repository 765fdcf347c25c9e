"""Weights for other sizes and channels: for images that show the same, the model computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from training import FLAGS, write_images

import fastmae
from fastmae.cli import main
from fastmae.model import MaskedAutoencoderViT
from fastmae.model.classifier import VisionTransformer
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.weights import export_weights

SMALL = {
    "img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "norm_pix_loss": True,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "mean": (0.2, 0.3, 0.4), "seed": 0,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**SMALL).eval()


@pytest.fixture
def path(model, tmp_path) -> Path:
    return export_weights(model, tmp_path / "w.safetensors")


def resize(patches: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(patches, size, mode="bilinear", antialias=True, align_corners=False)


def resize_patches(images: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W), each patch resized by itself."""
    n, channels, height, width = images.shape
    rows, cols = height // old[0], width // old[1]
    x = images.reshape(n, channels, rows, old[0], cols, old[1]).permute(0, 2, 4, 1, 3, 5)
    x = resize(x.flatten(0, 2), new).unflatten(0, (n, rows, cols))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * new[0], cols * new[1])


@pytest.mark.parametrize("size", [(9, 9), (12, 8), (16, 32)])
def test_enlarged_patches_have_the_embedding_and_the_enlarged_predictions_of_the_originals(model, path, size):
    rows, cols = 2 * size[0], 3 * size[1]
    large = fastmae.load(path, patch_size=size, img_size=(rows, cols), patches="pseudo-inverse")
    assert large.architecture == model.architecture | {"patch_size": list(size), "img_size": [rows, cols]}
    images = resize_patches(IMAGES, (8, 8), size)
    torch.testing.assert_close(large.encode(images), model.encode(IMAGES), rtol=1e-4, atol=1e-5)
    noise = torch.rand(2, 6)
    expected = resize_patches(model.unpatchify(model(IMAGES, noise=noise).pred), (8, 8), size)
    torch.testing.assert_close(large.unpatchify(large(images, noise=noise).pred), expected, rtol=1e-4, atol=1e-5)


def test_smaller_patches_of_smooth_images_have_nearly_the_same_embedding(model, path):
    """The pseudo-inverse is the least-squares solution: better than resizing the weights, which shrinks sums."""
    small = fastmae.load(path, patch_size=4, img_size=(8, 12), patches="pseudo-inverse")
    coarse = torch.randn(8, 3, 4, 6)
    images = F.interpolate(coarse, (16, 24), mode="bicubic")
    ids = torch.arange(6).expand(8, -1)
    expected = model.embed_patches(images, ids)
    found = small.embed_patches(resize_patches(images, (8, 8), (4, 4)), ids)
    naive = F.linear(
        small.patchify(resize_patches(images, (8, 8), (4, 4))),
        resize(model.patch_embed.proj.weight, (4, 4)).permute(0, 2, 3, 1).flatten(1),
        model.patch_embed.proj.bias,
    )
    assert (found - expected).norm() < 0.5 * (naive - expected).norm()


@pytest.mark.parametrize(("rule", "channels"), [("repeat", 6), ("repeat", 7), ("average", 1), ("average", 5)])
def test_repeated_and_grey_channels_have_the_embedding_of_the_originals(model, path, rule, channels):
    other = fastmae.load(path, in_chans=channels, channels=rule)
    images = IMAGES if rule == "repeat" else IMAGES[:, :1].expand(-1, 3, -1, -1)
    wanted = torch.arange(channels) % 3
    shown = images[:, wanted]
    torch.testing.assert_close(other.encode(shown), model.encode(images), rtol=1e-4, atol=1e-5)
    noise = torch.rand(2, 6)
    expected = model.unpatchify(model(images, noise=noise).pred)
    expected = expected[:, wanted] if rule == "repeat" else expected.mean(1, keepdim=True).expand_as(shown)
    found = other.unpatchify(other(shown, noise=noise).pred)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    means = model.mean[wanted] if rule == "repeat" else model.mean.mean().expand(channels)
    torch.testing.assert_close(other.mean, means)


@pytest.mark.parametrize("channels", [2, 5])
def test_first_layer_surgery_keeps_what_the_first_channels_say(model, path, channels):
    other = fastmae.load(path, in_chans=channels, channels="first-layer", std=[0.5] * channels)
    shown = torch.randn(2, channels, 16, 24)
    known = shown[:, :3] if channels > 3 else F.pad(shown, (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(other.encode(shown), model.encode(known), rtol=1e-4, atol=1e-5)
    assert other.architecture["mean"] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.5][:channels])
    assert other.architecture["std"] == [0.5] * channels


@pytest.mark.parametrize("size", [(32, 48), (24, 16)])
def test_recomputed_positions_are_those_of_progressive_resolution(model, path, size):
    other = fastmae.load(path, img_size=size)
    images, noise = torch.randn(2, 3, *size), torch.rand(2, size[0] * size[1] // 64)
    model.set_input_size(size)
    torch.testing.assert_close(other.encode(images), model.encode(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other(images, noise=noise).pred, model(images, noise=noise).pred, rtol=1e-5, atol=1e-6)


def test_learnt_positions_are_interpolated_by_name_as_in_timm(tmp_path):
    layers = pytest.importorskip("timm.layers")
    classifier = VisionTransformer(3, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with torch.no_grad():
        classifier.pos_embed.normal_()
    path = export_weights(classifier, tmp_path / "learnt.safetensors")
    with pytest.raises(CheckpointError, match=r"learnt table for 4 x 4 .* 6 x 5; pass positions=.interpolate"):
        fastmae.load(path, img_size=(48, 40))
    large = fastmae.load(path, img_size=(48, 40), positions="interpolate")
    expected = layers.resample_abs_pos_embed(classifier.pos_embed, [6, 5], num_prefix_tokens=1)
    torch.testing.assert_close(large.pos_embed, expected)


def test_without_a_rule_another_size_is_an_error_that_names_the_rules(path):
    for options, expected in (
        ({"patch_size": 4}, "patches: expected a rule for patch_size .*, pseudo-inverse, got None"),
        ({"in_chans": 4}, "channels: expected a rule for in_chans 3 -> 4, repeat or average or first-layer, got None"),
        ({"in_chans": 2, "channels": "repeat"}, "in_chans: expected at least the 3 that are repeated, got 2"),
        ({"img_size": 32, "positions": None}, "positions: expected a rule for img_size .*, recompute or interpolate"),
        ({"img_size": 30}, "img_size: size 30x30 does not divide into patches of 8x8"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            fastmae.load(path, **options)


def test_classifiers_take_all_rules(tmp_path):
    tiny = fastmae.create_model("mae_vit_tiny_patch16", img_size=32, seed=1).eval()
    path = export_weights(tiny, tmp_path / "tiny.safetensors")
    rules = {"patches": "pseudo-inverse", "channels": "repeat"}
    other = fastmae.create_classifier(
        "vit_tiny_patch16", 5, checkpoint=path, patch_size=20, img_size=40, in_chans=6, **rules
    )
    images = torch.randn(2, 3, 32, 32)
    shown = resize_patches(images, (16, 16), (20, 20)).repeat(1, 2, 1, 1)
    torch.testing.assert_close(other.forward_features(shown), tiny.encode(images)[:, 0], rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_weights_of_other_sizes(tmp_path, capsys):
    """The rate is too small to change a weight, so its end shows what it started from."""
    path = export_weights(MaskedAutoencoderViT(**SMALL | {"patch_size": (4, 6)}), tmp_path / "w.safetensors")
    command = ["pretrain", "--data.path", str(write_images(tmp_path / "images")), *FLAGS.split(), "--train.steps", "1"]
    command += ["--train.init-from", str(path), "--train.base-lr", "1e-29", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "patches: expected a rule for patch_size (4, 6) -> (8, 8), pseudo-inverse" in capsys.readouterr().err
    rules = ["--train.init-patches", "pseudo-inverse", "--train.init-positions", "recompute"]
    assert main([*command, *rules]) == 0
    assert "encoder and decoder" in capsys.readouterr().out
    found = load_file(tmp_path / "run" / "model.safetensors")
    expected = fastmae.load(path, patch_size=8, img_size=(32, 48), patches="pseudo-inverse").state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.allclose(found[name], expected[name], rtol=0, atol=1e-20)]
