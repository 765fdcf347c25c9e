"""``fastmae.load`` and ``fastmae.create_classifier``: weights of every source, their architecture, clear refusals."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

import fastmae
from fastmae.model import create_model
from fastmae.model.classifier import create_vision_transformer
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.weights import export_weights


@pytest.fixture(scope="module")
def tiny():
    return create_model("mae_vit_tiny_patch16", img_size=64, norm_pix_loss=True, seed=1).eval()


def encoder(model) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("decoder_") and n != "mask_token"}


IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_facebookresearch_files_need_no_flags(tiny, tmp_path):
    args = argparse.Namespace(lr=1e-3)
    torch.save({"model": tiny.state_dict(), "epoch": 3, "args": args}, tmp_path / "full.pth")
    torch.save({"model": encoder(tiny)}, tmp_path / "encoder.pth")
    model, info = fastmae.load(tmp_path / "full.pth", return_info=True)
    noise = torch.rand(2, 16)
    assert torch.equal(model(IMAGES, noise=noise).pred, tiny(IMAGES, noise=noise).pred)
    assert (info.source, info.has_decoder, info.norm_pix_loss) == ("facebookresearch/mae or timm", True, None)
    assert info.assumed == ("num_heads", "decoder_num_heads")
    assert info.architecture["img_size"] == [64, 64]
    model, info = fastmae.load(tmp_path / "encoder.pth", return_info=True)
    assert torch.equal(model.encode(IMAGES), tiny.encode(IMAGES))
    assert not info.has_decoder
    with pytest.raises(ValueError, match="the weights are of an encoder alone, which cannot reconstruct"):
        model(IMAGES)


def test_our_own_files_tell_everything(tiny, tmp_path):
    path = export_weights(tiny, tmp_path / "model.safetensors", step=7)
    model, info = fastmae.load(path, return_info=True)
    assert (info.source, info.norm_pix_loss, info.step, info.assumed) == ("fastmae", True, 7, ())
    assert model.architecture == tiny.architecture


def test_what_shapes_do_not_tell_is_asked_for(tmp_path):
    odd = create_model("mae_vit_tiny_patch16", img_size=(32, 48), patch_size=8, embed_dim=40, num_heads=5, depth=1)
    save_file(odd.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="neither its shapes nor its metadata tell img_size; give img_size="):
        fastmae.load(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="neither its shapes nor its metadata tell num_heads; give num_heads="):
        fastmae.load(tmp_path / "odd.safetensors", img_size=(32, 48))
    model = fastmae.load(tmp_path / "odd.safetensors", img_size=(32, 48), num_heads=5, decoder_num_heads=4)
    images = IMAGES[..., :32, :48]
    assert torch.equal(model.encode(images), odd.eval().encode(images))


def test_timm_weights_load_with_their_head(tmp_path):
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64).eval()
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    model, info = fastmae.load(tmp_path / "timm.pth", return_info=True)
    assert info.num_classes == 10
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), peer(images), rtol=1e-4, atol=1e-4)


def test_a_classifier_starts_from_pretrained_weights_at_any_size(tiny, tmp_path):
    path = export_weights(tiny, tmp_path / "model.safetensors")
    model = fastmae.create_classifier("vit_tiny_patch16", 5, checkpoint=path)
    torch.testing.assert_close(model.forward_features(IMAGES), tiny.encode(IMAGES)[:, 0])
    assert model(IMAGES).shape == (2, 5)
    large = fastmae.create_classifier("vit_tiny_patch16", 5, checkpoint=path, img_size=96, pool="avg", drop_path=0.1)
    assert large(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    torch.save(model.state_dict(), tmp_path / "fine-tuned.pth")
    again = fastmae.create_classifier("vit_tiny_patch16", 5, checkpoint=tmp_path / "fine-tuned.pth")
    assert torch.equal(again(IMAGES), model(IMAGES))
    other = fastmae.create_classifier("vit_tiny_patch16", 3, checkpoint=tmp_path / "fine-tuned.pth")
    assert other(IMAGES).shape == (2, 3)
    assert create_vision_transformer("vit_tiny_patch16", 5, img_size=64, seed=1)(IMAGES).shape == (2, 5)
    with pytest.raises(CheckpointError, match="these are 12 blocks of 192; vit_small_patch16 has 12 of 384"):
        fastmae.create_classifier("vit_small_patch16", 5, checkpoint=path)


def test_other_weights_are_refused_by_name(tiny, tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: expected a Vision Transformer's weights; .*patch_embed"):
        fastmae.load(tmp_path / "other.pth")
    weights = tiny.state_dict()
    torch.save({n: t for n, t in weights.items() if n != "blocks.3.norm1.bias"}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"less.pth: blocks\.3\.norm1\.bias: missing among the weights"):
        fastmae.load(tmp_path / "less.pth")
    torch.save(weights | {"extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"more.pth: extra: among the weights, but not a tensor"):
        fastmae.load(tmp_path / "more.pth")
    torch.save(weights | {"norm.bias": torch.zeros(5)}, tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match=r"shape.pth: .*norm\.bias"):
        fastmae.load(tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match="none: no such file or folder"):
        fastmae.load(tmp_path / "none")
