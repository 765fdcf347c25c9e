"""The recipes in examples/ run, and learn something within a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae import ops

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A model that does not learn stays within a few percent of where it begins.
@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("timm_mae", {"steps": 8, "batch_size": 8}, 0.85),
        ("token_dropping", {"steps": 40}, 0.8),
        ("video_tubes", {"steps": 6, "batch_size": 1}, 0.5),
    ],
)
def test_the_loss_falls(name, options, share, capsys):
    if name == "timm_mae":
        pytest.importorskip("timm")
    losses = load(name).main(**options)
    assert len(losses) == options["steps"]
    assert sum(losses[-2:]) < share * sum(losses[:2])
    assert f"{losses[0]:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(("head", "steps"), [("linear", 80), ("upernet", 30)])
def test_segmentation_learns_where_it_is_bright(tmp_path, head, steps):
    pytest.importorskip("torchmetrics")
    for part, count in (("train", 6), ("test", 2)):
        for folder in (part, f"{part}annot"):
            (tmp_path / folder).mkdir()
        for i in range(count):
            bright = np.zeros((32, 64), np.uint8)
            bright[4 * i : 4 * i + 16, 8:40] = 1
            Image.fromarray(200 * np.stack([bright] * 3, -1)).save(tmp_path / part / f"{i}.png")
            Image.fromarray(3 * bright).save(tmp_path / f"{part}annot" / f"{i}.png")
    options = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    _, score = load("segmentation").main(tmp_path, head=head, size=(32, 64), steps=steps, lr=1e-2, **options)
    assert score > 0.6  # 0.34 for all dark


def test_detection_finds_a_rectangle(tmp_path):
    pytest.importorskip("pycocotools")
    (tmp_path / "PNGImages").mkdir()
    (tmp_path / "PedMasks").mkdir()
    for i in range(5):
        mask = np.zeros((64, 48), np.uint8)
        mask[8:40, 4 + 2 * i : 30 + 2 * i] = 1
        Image.fromarray(220 * np.stack([mask] * 3, -1)).save(tmp_path / "PNGImages" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "PedMasks" / f"{i}_mask.png")
    options = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    losses, scores = load("detection").main(tmp_path, side=64, steps=10, batch_size=2, lr=2e-3, **options)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert set(scores) == {"boxes", "masks"}


PAGES = {"segmentation": "evaluation", "detection": "evaluation"}


def test_every_recipe_is_tested_and_documented():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"timm_mae", "token_dropping", "video_tubes", *PAGES}
    for name in names:
        page = EXAMPLES.parent / "docs" / f"{PAGES.get(name, 'ops')}.md"
        assert f"examples/{name}.py" in page.read_text()


def test_the_timm_encoder_is_an_ordinary_timm_model():
    timm = pytest.importorskip("timm")
    example = load("timm_mae")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
    model = example.TimmMAE(vit)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    # All patches in order, as if nothing were masked: what timm computes from the whole picture.
    seen = {}
    model.decoder_embed.register_forward_hook(lambda module, args, out: seen.update(latent=args[0]))
    everything = torch.arange(16).expand(2, -1)
    model(images, ops.Masking(everything, everything, everything, torch.ones(2, 16)))
    mean, std = (x[:, None, None] for x in (model.mean, model.std))
    torch.testing.assert_close(seen["latent"], vit.forward_features((images / 255 - mean) / std), rtol=0, atol=1e-4)
