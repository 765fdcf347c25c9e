"""The recipes in examples/ run, and learn something within a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def test_every_recipe_is_tested_and_documented():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"timm_mae", "token_dropping", "video_tubes"}
    page = (EXAMPLES.parent / "docs" / "ops.md").read_text()
    assert all(f"examples/{name}.py" in page for name in names)


def test_tubes_are_a_masking_over_time_and_space():
    space = ops.random_masking(2, 12, 0.75, seed=0)
    m = load("video_tubes").tubes(space, 3)
    order = torch.cat([m.ids_keep, m.ids_mask], dim=1)
    assert torch.equal(order.gather(1, m.ids_restore), torch.arange(36).expand(2, -1))
    assert torch.equal(m.mask.view(2, 3, 12), space.mask[:, None].expand(2, 3, 12))
    assert torch.equal(m.mask.nonzero()[:, 1].view(2, -1), m.ids_mask.sort(1).values)


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
