"""The recipes in examples/ run, and learn something within a few steps."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import fastmae
from fastmae import ops
from fastmae.cli import main
from fastmae.model import create_model
from fastmae.train.weights import export_weights

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


@pytest.fixture(scope="module")
def dense():
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    return load("dense")


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory) -> str:
    """Weights of an encoder with a block for each of four scales."""
    sizes = {"embed_dim": 16, "depth": 4, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
    model = create_model("mae_vit_tiny_patch16", img_size=32, patch_size=8, decoder_num_heads=2, seed=0, **sizes)
    return str(export_weights(model, tmp_path_factory.mktemp("weights") / "w.safetensors"))


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def coco(folder: Path, parts: dict[str, int]) -> Path:
    """A person, bright, and a dog, dim, on grass; one object more is a crowd."""
    names = {1: ("person", 1), 18: ("animal", 1), 193: ("ground", 0)}
    categories = [{"id": i, "supercategory": group, "isthing": thing} for i, (group, thing) in names.items()]
    for part, count in parts.items():
        annotations = []
        for i in range(count):
            numbers = np.full((32, 48), 7)  # grass
            numbers[4 : 20 + i, 4:24], numbers[8:24, 30:44], numbers[28:, 40:] = 70_001, 900, 3
            segments = [(7, 193, 0), (70_001, 1, 0), (900, 18, 0), (3, 1, 1)]
            kinds = sum((numbers == number) * category for number, category, _ in segments)
            save(
                np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], -1),
                folder / "panoptic_segmentation/annotations" / f"panoptic_{part}" / f"{i}.png",
            )
            save(kinds, folder / "semantic_segmentation/masks" / part / f"{i}.png")
            save(np.stack([220 * (kinds == 1) + 110 * (kinds == 18)] * 3, -1), folder / "images" / part / f"{i}.jpg")
            keys = ("id", "category_id", "iscrowd")
            segments = [dict(zip(keys, segment, strict=True)) for segment in segments]
            annotations.append({"file_name": f"{i}.png", "segments_info": segments})
        text = json.dumps({"categories": categories, "annotations": annotations})
        (folder / "panoptic_segmentation/annotations" / f"panoptic_{part}.json").write_text(text)
    return folder


@pytest.mark.parametrize(("options", "steps"), [({"head": "linear", "frozen": True}, 60), ({"head": "upernet"}, 30)])
def test_segmentation_learns_where_it_is_bright(dense, four_blocks, tmp_path, options, steps):
    for part, count in (("train", 6), ("test", 2)):
        for i in range(count):
            bright = np.zeros((32, 64))
            bright[4 * i : 4 * i + 16, 8:40] = 1
            save(200 * np.stack([bright] * 3, -1), tmp_path / part / f"{i}.png")
            save(3 * bright, tmp_path / f"{part}annot" / f"{i}.png")
    losses, scores = dense.segmentation(tmp_path, four_blocks, size=(32, 64), steps=steps, lr=1e-2, **options)
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
    assert scores["mean_iou"] > 0.6  # 0.34 for all dark


def test_detection_finds_a_rectangle(dense, four_blocks, tmp_path):
    for i in range(5):
        mask = np.zeros((64, 48))
        mask[8:40, 4 + 2 * i : 30 + 2 * i] = 1
        save(220 * np.stack([mask] * 3, -1), tmp_path / "PNGImages" / f"{i}.png")
        save(mask, tmp_path / "PedMasks" / f"{i}_mask.png")
    losses, scores = dense.detection(tmp_path, four_blocks, side=64, steps=10, batch_size=2, lr=2e-3)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert set(scores) == {"ap50_boxes", "ap50_masks"}


def test_dense_tasks_read_coco(dense, tmp_path):
    folder = coco(tmp_path, {"train2017": 2, "val2017": 1})
    images, labels, classes = dense.read_pixels(folder, "train", (32, 48))
    assert images.shape == (2, 3, 32, 48)
    assert classes == 3
    assert labels[:, [10, 10, 2], [10, 35, 2]].tolist() == [[2, 0, 1]] * 2  # groups in the order of their names
    ((image, target),) = dense.read_objects(folder, "test", 48)
    assert image.shape == (3, 32, 48)
    assert target["boxes"].tolist() == [[4, 4, 23, 19], [30, 8, 43, 23]]  # not the grass, nor the crowd
    assert target["masks"].sum((1, 2)).tolist() == [20 * 16, 14 * 16]


def test_a_frozen_encoder_and_a_random_one(dense, four_blocks):
    frozen, fresh = (dense.load_encoder(four_blocks, (32, 64), *flags, 1) for flags in ((True, False), (False, True)))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in fresh.parameters())
    pretrained = fastmae.load(four_blocks).blocks[3].mlp.fc1.weight
    assert torch.equal(frozen.blocks[3].mlp.fc1.weight, pretrained)
    assert not torch.equal(fresh.blocks[3].mlp.fc1.weight, pretrained)


TINY = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder per class: photographs of one colour in each, brighter at the top."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shade = np.linspace(1, 0.3, 40)[:, None, None] * np.ones((40, 48, 1))
    for number, color in enumerate(((250, 60, 60), (60, 60, 250))):
        (folder / str(number)).mkdir()
        for i in range(8):
            pixels = (shade * color * (1 - 0.05 * i)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(number) / f"{i}.jpg")
    return folder


def train_as_facebookresearch_does(photos: Path, folder: Path, monkeypatch) -> tuple[list[float], Path]:
    example = load("main_pretrain")
    flags = f"--data_path {photos} --output_dir {folder} --model tiny --input_size 32 --batch_size 8 --epochs 6"
    flags += " --warmup_epochs 0 --blr 0.1 --num_workers 0 --device cpu"
    sizes = {name: size for name, size in TINY.items() if name != "img_size"}
    monkeypatch.setitem(vars(example.models_mae), "tiny", partial(create_model, "mae_vit_tiny_patch16", **sizes))
    return example.main(example.get_args_parser().parse_args(flags.split())), folder / "checkpoint-5.pth"


def train_in_a_loop(photos: Path, folder: Path, monkeypatch) -> tuple[list[float], Path]:
    return load("plain_loop").main(str(photos), steps=8, batch_size=8, lr=1e-2, **TINY), folder / "mae.pth"


def train_with_lightning(photos: Path, folder: Path, monkeypatch) -> tuple[list[float], Path]:
    pytest.importorskip("pytorch_lightning")
    losses = load("lightning_module").main(str(photos), steps=8, batch_size=8, lr=1e-2, **TINY)
    return losses, folder / "mae.pth"


def train_with_hugging_face(photos: Path, folder: Path, monkeypatch) -> tuple[list[float], Path]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    arguments = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    losses = load("hugging_face_trainer").main(str(photos), str(folder / "out"), config, **arguments)
    return losses, folder / "out" / "final"


@pytest.mark.parametrize(
    "train", [train_as_facebookresearch_does, train_in_a_loop, train_with_lightning, train_with_hugging_face]
)
def test_a_training_of_ones_own_learns_and_its_weights_load(train, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    losses, weights = train(photos, tmp_path, monkeypatch)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    sizes = {"num_heads": 2, "decoder_num_heads": 2} if weights.suffix == ".pth" else {}
    model = fastmae.load(weights, **sizes)
    assert model(torch.zeros(1, 3, 32, 32)).pred.shape == (1, 16, 192)


def test_an_exported_encoder_is_fine_tuned_in_timm(photos, tmp_path):
    pytest.importorskip("timm")
    weights = export_weights(create_model("mae_vit_tiny_patch16", **TINY, seed=0), tmp_path / "w.safetensors")
    assert main(["convert", str(weights), str(tmp_path / "encoder"), "--to", "timm"]) == 0
    torch.manual_seed(0)
    options = {"steps": 20, "batch_size": 8, "lr": 1e-2, "augment": None}
    losses = load("finetune_in_timm").main(str(tmp_path / "encoder"), str(photos), **options)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


PAGES = {"dense": "evaluation"}
PAGES |= dict.fromkeys(
    ("main_pretrain", "plain_loop", "lightning_module", "hugging_face_trainer", "finetune_in_timm"), "interop"
)


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
