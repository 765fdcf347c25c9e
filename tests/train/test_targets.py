"""Other targets than pixels: their definitions, what a run learns from them, and files that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from devices import fake_cuda
from safetensors.torch import save_file
from training import MODEL, fitted, write_images

from fastmae.loading import load
from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.config import ModelConfig, PretrainConfig
from fastmae.train.targets import Codebook, create_target, fit_codebook, fit_pca, patches_of, save_target
from fastmae.train.task import MaskedAutoencoding


@pytest.fixture(scope="module")
def model():
    return create_model("mae_vit_tiny_patch16", img_size=(8, 16), patch_size=4, depth=1, seed=0)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


IDS = torch.tensor([[0, 7], [3, 3]])


def normalized(model, images):
    return (images / 255 - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1)


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_low_resolution_is_the_mean_of_cells(model, images, cells):
    target = create_target("mean-color" if cells == 1 else f"low-resolution-{cells}", (4, 4), 3)
    got = target(model, images, IDS)
    small = torch.nn.functional.avg_pool2d(normalized(model, images), 4 // cells)
    expected = small.unfold(2, cells, cells).unfold(3, cells, cells).permute(0, 2, 3, 4, 5, 1).reshape(2, 8, -1)
    torch.testing.assert_close(got, torch.stack([expected[i, row] for i, row in enumerate(IDS)]))
    assert target.size == 3 * cells**2


def test_pca_keeps_the_largest_variances():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 0.1, 3.0, 0.2])
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    patches = torch.randn(4000, 4, generator=generator) * scales @ rotation + 7
    target, share = fit_pca(patches.split(1000), 2)
    coefficients = (patches - target.center) @ target.matrix
    torch.testing.assert_close(target.matrix.T @ target.matrix, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(coefficients.var(0), torch.tensor([25.0, 9.0]), rtol=0.1, atol=0)
    assert share == pytest.approx(34 / 34.05, abs=1e-3)
    from sklearn.decomposition import PCA

    peer = PCA(2).fit(patches.numpy())
    np.testing.assert_allclose(np.abs((target.matrix.T @ peer.components_.T).numpy()), np.eye(2), atol=1e-3)


def test_a_codebook_names_the_nearest_patch(model, images):
    ids = torch.arange(8).expand(2, -1)
    patches = patches_of(model, images, ids)
    target = fit_codebook([patches.flatten(0, 1)], 5)
    expected = torch.cdist(patches, target.centers).argmin(-1)
    assert torch.equal(target(model, images, ids), expected)
    assert target.size == 5
    assert len(expected.unique()) > 1


def tokenizer():
    """What ``--model.target module:tokenizer`` names: here the brightness of a patch, in four steps."""

    def tokens(images):
        grey = torch.nn.functional.avg_pool2d(images.float().mean(1), 4 if images.shape[-1] == 16 else 8)
        return (grey / 64).long().clamp(0, 3).flatten(1)

    tokens.vocab_size = 4
    return tokens


def test_a_tokenizer_is_called_once_per_image_however_many_masks(model, images):
    target = create_target(f"{__name__}:tokenizer", (4, 4), 3)
    tokens = tokenizer()(images)
    got = target(model, images, torch.tensor([[0, 7], [1, 2], [3, 3], [4, 5]]))  # two masks of each image
    assert got.tolist() == [
        tokens[0, [0, 7]].tolist(),
        tokens[0, [1, 2]].tolist(),
        *tokens[1, [[3, 3], [4, 5]]].tolist(),
    ]


@pytest.mark.parametrize("target", [create_target("low-resolution-2", (8, 8), 3), Codebook(torch.zeros(5, 192))])
def test_a_target_is_copied_to_the_gpu_once(target):
    config = PretrainConfig(model=replace(MODEL, target="mean-color", loss_on_all_patches=True))
    model = create_model(**config.model_arguments())
    task = MaskedAutoencoding(config, model, None, None)
    task.target = target
    with fake_cuda() as waiting:
        model.to("cuda")
        images = torch.zeros(4, 3, 32, 48, dtype=torch.uint8, device="cuda")
        masking = random_masking(4, model.num_patches, 0.75, seed=0, device="cuda")
        for _ in range(2):
            waiting.clear()
            *_, targets = task._inputs(images, masking)
        assert targets.is_cuda


@pytest.mark.parametrize(
    "options",
    [
        {"target": "low-resolution-2", "loss_on_all_patches": True, "class_token": False},
        {"target": "file", "encoder_mask_tokens": True, "decoder_depth": 0},
        {"target": f"{__name__}:tokenizer"},
    ],
    ids=["low resolution", "pca", "tokens"],
)
def test_a_run_learns_it_and_its_encoder_loads(tmp_path, options):
    images = write_images(tmp_path / "images")
    if options["target"] == "file":
        patches = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
        save_target(fit_pca([patches], 8)[0], tmp_path / "pca.safetensors")
        options |= {"target": str(tmp_path / "pca.safetensors")}
    trainer = fitted(tmp_path / "run", images, model=replace(MODEL, **options), steps=8, base_lr=0.05)
    losses = [row["loss"] for row in trainer.run.read_metrics()]
    assert losses[-1] < losses[0]
    model = load(tmp_path / "run")
    assert model.num_outputs == trainer.task.target.size
    assert model.encode(torch.zeros(1, 3, *model.img_size)).shape[1] == model.num_patches + model.num_prefix_tokens


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("expected pixels, mean-color", "pixel"),
        ("expected cells that divide a patch of 4 x 4 pixels, got low-resolution-3", "low-resolution-3"),
        ("expected a file of fastmae fit-target, got missing.safetensors", "missing.safetensors"),
        ("expected a tokenizer's factory with vocab_size, got no.such:thing", "no.such:thing"),
        ("expected a tokenizer's factory with vocab_size", "math:pi"),
    ],
)
def test_names_that_are_no_target(message, name):
    with pytest.raises(ValueError, match=f"target: {message}"):
        create_target(name, (4, 4), 3)


def test_files_that_are_no_target(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    save_target(fit_pca([torch.randn(9, 12)], 2)[0], tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x09")
    for name, message in (
        ("weights", "with weight"),
        ("other", "expected a target of 4 x 4 x 3 values per patch, .* has 12"),
        ("cut", "expected a file of fastmae fit-target"),
    ):
        with pytest.raises(ValueError, match=message):
            create_target(str(tmp_path / f"{name}.safetensors"), (4, 4), 3)


def test_the_configuration_asks_the_model_for_the_values():
    from fastmae.train.config import PretrainConfig

    config = PretrainConfig(model=ModelConfig(name="mae_vit_tiny_patch16", target="low-resolution-2"))
    assert config.model_arguments()["num_outputs"] == 12
    assert PretrainConfig().model_arguments()["num_outputs"] is None
