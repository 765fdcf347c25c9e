"""Training classifiers: the recipes against the paper's tables, what learns, and runs that resume exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import latest_checkpoint
from commands import mistake
from distributed import run_ranks
from PIL import Image
from safetensors.torch import load_file
from training import assert_same_tensors

import fastmae
from fastmae.cli import main
from fastmae.data import LateBad, create_loader, open_dataset
from fastmae.data.subset import subset
from fastmae.evaluate.finetune import Accuracy, Classification, WeightAverage, freeze, layer_groups
from fastmae.evaluate.labelled import choose_labelled
from fastmae.loading import load
from fastmae.model import create_model
from fastmae.model.classifier import VisionTransformer, create_vision_transformer
from fastmae.train.checkpoint import open_checkpoint
from fastmae.train.classification import (
    ClassifierModelConfig,
    FinetuneConfig,
    LabelledDataConfig,
    PartialConfig,
    ScratchConfig,
    classifier_recipe,
    recipe_name,
)
from fastmae.train.liveness import EXIT_PREEMPTED
from fastmae.train.optim import create_optimizer, create_schedule, set_learning_rate
from fastmae.train.ranks import Ranks
from fastmae.train.run_folder import read_rows
from fastmae.train.weights import export_weights

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = """--train.global-batch-size 8 --train.steps 6 --train.warmup-steps 1 --train.base-lr 0.1 --train.precision fp32
    --train.log-every-steps 2 --train.checkpoint-every-steps 3 --train.device cpu --train.num-threads 1
    --data.loader torch --data.num-threads 1 --data.crop-ratio 1 --report.test-every-epochs 0.5"""
COLOURS = {"blue": (40, 60, 200), "green": (60, 180, 70), "red": (210, 40, 50)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Three classes by colour, 6 images each to learn from and 3 to test on."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = create_model("mae_vit_tiny_patch16", **SIZES, **decoder, seed=0)
    return export_weights(model, tmp_path_factory.mktemp("weights") / "model.safetensors", step=5)


def command(protocol: str, folders: Path, run: Path, *more: object) -> list[str]:
    paths = ["--data.path", folders / "train", "--data.val", folders / "val", "--run-folder", run]
    return [str(word) for word in ("evaluate", protocol, *more, *paths, *FLAGS.split())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folders, weights) -> tuple[Path, dict]:
    """A run with every augmentation and an average, and its result."""
    run = tmp_path_factory.mktemp("finished") / "run"
    out = run.with_name("result.json")
    assert main(command("finetune", folders, run, weights, "--train.average", "0.9", "--out", out)) == 0
    return run, json.loads(out.read_text())


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base_lr", "layer_decay", "drop_path", "epochs"),
    [("vit-b", 5e-4, 0.65, 0.1, 100), ("vit-l", 1e-3, 0.75, 0.1, 50), ("vit-h", 1e-3, 0.75, 0.2, 50)],
)
@pytest.mark.parametrize("kind", [FinetuneConfig, PartialConfig])
def test_fine_tuning_is_table_9(kind, name, base_lr, layer_decay, drop_path, epochs):
    config = classifier_recipe(kind, name)
    train, images = config.train, config.data
    assert (train.base_lr, train.layer_decay, config.model.drop_path) == (base_lr, layer_decay, drop_path)
    assert (train.epochs, train.warmup_epochs, train.global_batch_size) == (epochs, 5, 1024)
    assert (train.optimizer, train.betas, train.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (images.randaugment, images.randaugment_std, images.label_smoothing) == (9, 0.5, 0.1)
    assert (images.mixup, images.cutmix, images.erasing, images.crop_ratio) == (0.8, 1.0, 0.25, 224 / 256)
    assert (config.model.pool, train.average) == ("avg", 0)


@pytest.mark.parametrize(
    ("name", "drop_path", "epochs"), [("vit-b", 0.1, 300), ("vit-l", 0.2, 200), ("vit-h", 0.2, 200)]
)
def test_training_from_scratch_is_table_11(name, drop_path, epochs):
    config = classifier_recipe(ScratchConfig, name)
    train, images = config.train, config.data
    assert (train.base_lr, train.weight_decay, train.betas) == (1e-4, 0.3, (0.9, 0.95))
    assert (train.epochs, train.warmup_epochs, train.global_batch_size) == (epochs, 20, 4096)
    assert (train.average, train.layer_decay, config.model.drop_path) == (0.9999, 1, drop_path)
    assert (images.randaugment, images.randaugment_std, images.label_smoothing) == (9, 0.5, 0.1)
    assert (images.mixup, images.cutmix, images.erasing) == (0.8, 1.0, 0)
    size = {"vit-b": "base_patch16", "vit-l": "large_patch16", "vit-h": "huge_patch14"}[name]
    assert config.model.name == f"vit_{size}"


def test_the_recipe_follows_the_width():
    widths = {192: "vit-b", 768: "vit-b", 1024: "vit-l", 1280: "vit-h"}
    assert {width: recipe_name(width) for width in widths} == widths


def test_each_layer_of_vit_b_has_its_rate_at_each_step():
    with torch.device("meta"):
        model = create_vision_transformer("vit_base_patch16", 1000, pool="avg")
    train = replace(classifier_recipe(FinetuneConfig).train, precision="fp32")
    schedule = create_schedule(train, 1_281_167)  # ImageNet: 1,251.1 steps per epoch
    optimizer = create_optimizer(layer_groups(model, train.weight_decay, train.layer_decay), train)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    layers = {"pos_embed": 0, "patch_embed.proj.weight": 0, "cls_token": 0, "blocks.0.mlp.fc1.bias": 1}
    layers |= {"blocks.11.attn.qkv.weight": 12, "fc_norm.weight": 13, "head.weight": 13}
    parameters = dict(model.named_parameters())
    peak = 5e-4 * 1024 / 256
    for step, rate in ((0, 0.0), (3128, peak * 3128 / (5 * 1251.1396484375)), (6255.6982, peak), (125_113, 1e-6)):
        set_learning_rate(optimizer, schedule(step))
        for name, layer in layers.items():
            assert groups[parameters[name]]["lr"] == pytest.approx(rate * 0.65 ** (13 - layer), rel=1e-4), name
    for name, parameter in parameters.items():
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert groups[parameter]["weight_decay"] == (0 if spared else 0.05), name


# ---- what learns -----------------------------------------------------------------------------------------------------


def small(num_classes: int = 3, **options) -> VisionTransformer:
    return VisionTransformer(num_classes, **SIZES | {"depth": 3} | options, seed=0)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_partial_fine_tuning_trains_the_last_blocks(pool):
    head, norm = {"head"}, "norm" if pool == "cls" else "fc_norm"
    expected = {0: head, 1: head | {norm, "blocks.2"}, 2: head | {norm, "blocks.1", "blocks.2"}}
    expected |= {
        half + 0.5: expected[half] | {norm, f"blocks.{2 - half}.mlp", f"blocks.{2 - half}.norm2"} for half in range(3)
    }
    for blocks, parts in expected.items():
        model = small(pool=pool)
        freeze(model, blocks)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == any(name.startswith(f"{part}.") for part in parts), (blocks, name)
    model = small(pool=pool)
    freeze(model, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="blocks: expected 0 to 3, got 4"):
        freeze(model, 4)


def make_task(folders: Path, model: VisionTransformer, *, kind=FinetuneConfig, batch: int = 6, **options):
    """A task without augmentation but for ``options``, and the images that it learns from."""
    none = {"randaugment": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
    blocks = {"blocks": options.pop("blocks")} if "blocks" in options else {}
    config = classifier_recipe(kind)
    config = replace(
        config,
        model=ClassifierModelConfig(img_size=32),
        data=LabelledDataConfig(path=folders / "train", loader="torch", num_threads=1, **none | options),
        train=replace(config.train, global_batch_size=batch, steps=4, epochs=None, precision="fp32"),
        **blocks,
    )
    known = choose_labelled(open_dataset(folders / "train"), 1000)
    part = subset(known.dataset, known.sample_ids)
    return Classification(config, model, part, known.labels, create_loader), known


def test_without_augmentation_the_loss_is_cross_entropy(folders):
    model = small()
    task, known = make_task(folders, model)
    options = {"ranks": Ranks(), "device": torch.device("cpu"), "known_bad": []}
    with task.open_loader(6, 6, **options) as loader:
        batch = next(loader)
        images, targets, scales = task.prepare(batch)
    assert scales is None
    assert torch.equal(images, batch.images)
    labels = torch.from_numpy(known.labels)[batch.sample_ids]
    assert len(labels.unique()) > 1
    with torch.no_grad():
        model.head.weight.mul_(1000)
        expected = F.cross_entropy(model(batch.images), labels)
        torch.testing.assert_close(task.loss(model, images, targets, scales), expected)


def test_the_host_knows_what_the_loader_brings_on_every_rank_and_from_any_position(folders):
    for rank in range(2):
        task, _ = make_task(folders, small(), batch=8, mixup=0.8)
        task.augment = lambda images, labels, *keys: (images, keys[0], keys[1])
        options = {"ranks": SimpleNamespace(rank=rank, size=2), "device": torch.device("cpu"), "known_bad": []}
        with task.open_loader(16, 2, **options) as loader:
            for _ in range(5):
                batch = next(loader)
                _, sample_ids, epochs, _ = task.prepare(batch)
                assert sample_ids.tolist() == batch.sample_ids.tolist()
                assert epochs.tolist() == batch.epochs.tolist()


def test_odd_batches_cannot_be_mixed(folders):
    task, _ = make_task(folders, small(), mixup=0.8)
    options = {"ranks": Ranks(), "device": torch.device("cpu"), "known_bad": []}
    with pytest.raises(ValueError, match=r"--train.global-batch-size: expected one that gives every batch an even"):
        task.open_loader(0, 3, **options)


def test_an_image_that_cannot_be_read_is_not_learned_as_another_class(folders):
    bad = LateBad(4, "damaged", 0)
    task, _ = make_task(folders, small(), batch=18)
    options = {"ranks": Ranks(), "device": torch.device("cpu"), "known_bad": [bad]}
    with task.open_loader(0, 18, **options) as loader:
        batch = next(loader)
        targets = task.prepare(batch)[1]
    assert targets[batch.sample_ids == 4].sum() == 0
    assert (targets[batch.sample_ids != 4].sum(1) == 1).all()


def test_stochastic_depth_spares_frozen_blocks_and_is_drawn_by_image(folders):
    task, _ = make_task(folders, small(drop_path=0.9), kind=PartialConfig, blocks=1.5)
    ids, epochs = np.arange(40), np.zeros(40, np.int64)
    scales = task._path_scales(ids, epochs, torch.device("cpu"))
    assert scales.shape == (3, 2, 40)
    assert (scales[0] == 1).all()
    assert len(scales[2].unique()) == 2
    assert torch.equal(scales[..., 7:9], task._path_scales(ids[7:9], epochs[7:9], torch.device("cpu")))


def test_a_part_of_a_data_set_is_one_of_its_own(folders):
    whole = open_dataset(folders / "train")
    part = subset(whole, np.array([1, 4, 9]))
    assert len(part) == 3
    assert [part.path(i) for i in range(3)] == [whole.path(i) for i in (1, 4, 9)]
    assert part.labels(np.arange(3)).tolist() == whole.labels(np.array([1, 4, 9])).tolist()
    assert np.array_equal(part.decode(2), whole.decode(9))
    assert len({whole.hash, part.hash, subset(whole, np.array([1, 4, 10])).hash}) == 3
    assert part.decoded_bytes(10**9) == 3 * 36 * 40 * 3


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_ends_with_a_result(finished):
    run, result = finished
    assert result["protocol"] == "finetune"
    assert (result["train_images"], result["val_images"]) == (18, 9)
    assert result["command"].startswith("fastmae ")
    assert result["versions"]["torch"]
    assert "top5" not in result  # three classes
    tests = read_rows(run / "evaluations.jsonl")
    assert [row["step"] for row in tests] == [2, 3, 4, 5, 6]  # every 9 images, in steps of 8
    assert result["top1"] == tests[-1]["top1"]
    assert all(0 < row["loss"] < 2 for row in read_rows(run / "metrics.jsonl"))
    assert json.loads((run / "summary.json").read_text())["classes"] == ["blue", "green", "red"]


def test_a_finished_run_is_a_classifier_with_averaged_weights(finished, capsys):
    run, _ = finished
    model, info = load(run, return_info=True)
    assert (info.num_classes, info.architecture["pool"], info.step, model.training) == (3, "avg", 6, False)
    exported = load_file(run / "model.safetensors")
    saved = model.state_dict()
    assert all(torch.equal(exported[name], saved[name]) for name in exported)
    checkpoint = open_checkpoint(latest_checkpoint(run))
    raw, average = (checkpoint.read_all(prefix) for prefix in ("model.", "average."))
    assert torch.equal(average["head.weight"], saved["head.weight"])
    assert not torch.equal(average["head.weight"], raw["head.weight"])
    again = fastmae.create_classifier(
        "vit_tiny_patch16", 5, pool="avg", checkpoint=run, **{k: SIZES[k] for k in ("embed_dim", "depth", "num_heads")}
    )
    assert torch.equal(again.blocks[1].mlp.fc2.weight, saved["blocks.1.mlp.fc2.weight"])
    assert main(["inspect", str(run)]) == 0
    assert "3 classes, pool avg" in capsys.readouterr().out


def test_a_run_that_was_stopped_continues_bit_for_bit(tmp_path, folders, weights, finished, monkeypatch):
    """With every augmentation, stochastic depth and an average. The flags come from the run folder, and the weights
    that it started from may be gone."""
    run, evaluate = tmp_path / "run", Accuracy.evaluate
    weights = shutil.copyfile(weights, tmp_path / "weights.safetensors")

    def evaluate_and_stop(self, trainer):
        evaluate(self, trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Accuracy, "evaluate", evaluate_and_stop)
        assert main(command("finetune", folders, run, weights, "--train.average", "0.9")) == EXIT_PREEMPTED
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-0", "step-3"]
    torch.manual_seed(99)
    weights.unlink()
    assert main(["evaluate", "finetune", "--run-folder", str(run), "--resume"]) == 0
    assert_same_tensors(run / "checkpoints/step-6", finished[0] / "checkpoints/step-6")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        ours, theirs = (
            [
                {key: row[key] for key in ("step", "loss", "grad_norm", "top1") if key in row}
                for row in read_rows(folder / name)
            ]
            for folder in (run, finished[0])
        )
        assert ours == theirs


def test_torchrun_restarts_a_run_where_it_was(tmp_path, folders, weights, finished, monkeypatch, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    words = command(
        "finetune", folders, run, weights, "--train.average", "0.9", "--out", finished[0].with_name("result.json")
    )
    assert main(words) == 0
    assert f"Continuing from {run}/checkpoints/step-6" in capsys.readouterr().out


def run_command(rank: int, words: list[str]) -> int:
    return main(words)


def test_two_ranks_with_shards_train_as_one_process_does(tmp_path, folders, weights, finished):
    run = tmp_path / "run"
    words = command("finetune", folders, run, weights, "--train.average", "0.9", "--train.parallel", "fsdp")
    assert run_ranks(run_command, 2, words) == [0, 0]
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (run, finished[0]))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-4), name
    assert read_rows(run / "evaluations.jsonl")[-1]["top1"] == finished[1]["top1"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, finished[0]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_half_a_block_trains_and_the_rest_stays(tmp_path, folders, weights):
    run = tmp_path / "run"
    assert main(command("partial", folders, run, weights, "--blocks", "0.5")) == 0
    before, after = load_file(weights), load_file(run / "model.safetensors")
    moved = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    mlp = {f"blocks.1.{part}" for part in ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias")}
    mlp |= {"blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"}
    assert moved == mlp | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert json.loads((run / "summary.json").read_text())["blocks"] == 0.5


def test_a_run_from_scratch_needs_no_weights(tmp_path, folders):
    sizes = [word for name, value in SIZES.items() for word in (f"--model.{name.replace('_', '-')}", value)]
    assert main(command("scratch", folders, tmp_path / "run", *sizes, "--train.steps", 2, "--train.average", "0")) == 0
    assert load(tmp_path / "run").architecture["depth"] == 2


def test_the_average_follows_the_weights():
    model = small()
    trainer = type("Trainer", (), {"model": model, "step": 0})
    average = WeightAverage(0.9, "average")
    average.attach(trainer)
    expected = model.head.bias.detach().clone()
    for trainer.step in range(1, 200):
        with torch.no_grad():
            model.head.bias += 1
        average.after_step(trainer)
        decay = min(0.9, (1 + trainer.step) / (10 + trainer.step))
        expected = decay * expected + (1 - decay) * model.head.bias.detach()
    before = model.head.bias.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.head.bias.detach(), expected)
    assert torch.equal(model.head.bias, before)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def labelled_folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (50 * number, 9 * index, 80)).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ({"only": 12}, None, "--data.path: expected images of at least two classes in train, got one"),
        ({f"class {i:02}": 1 for i in range(12)}, None, "--data.path: expected several images of each class"),
        ({"cat": 1, "dog": 1}, None, "--data.path: expected at least 10 labelled images to hold some out, got 2"),
        ({"cat": 3, "dog": 3}, {"cow": 2}, "--data.val: expected classes of train"),
        ({"cat": 3, "dog": 3}, {"cat": 2, "cow": 2}, "--data.val: "),
    ],
)
def test_labels_that_cannot_be_learned_are_named(tmp_path, weights, capsys, train, val, message):
    paths = ["--data.path", labelled_folder(tmp_path / "train", train)]
    paths += ["--data.val", labelled_folder(tmp_path / "val", val)] if val else []
    error = mistake(capsys, "evaluate", "finetune", weights, "--run-folder", tmp_path / "run", *paths, *FLAGS.split())
    assert message in error
    assert not (tmp_path / "run").exists()


def test_mistakes_on_the_command_line_are_named(tmp_path, folders, weights, finished, capsys):
    path = ["--data.path", folders / "train", "--train.device", "cpu"]
    assert "WEIGHTS: expected weights" in mistake(capsys, "evaluate", "finetune", *path)
    assert "--data.path: expected labelled images" in mistake(capsys, "evaluate", "finetune", weights)
    blocks = ("evaluate", "partial", weights, *path, "--run-folder", tmp_path / "run", "--blocks")
    assert "--blocks: expected a number of blocks" in mistake(capsys, *blocks, "0.3")
    assert "blocks: expected 0 to 2, got 7" in mistake(capsys, *blocks, "7")
    assert "--resume: expected --run-folder" in mistake(capsys, "evaluate", "finetune", "--resume")
    resume = "--run-folder", finished[0], "--resume"
    error = mistake(capsys, "evaluate", "partial", *resume)
    assert f"the run in {finished[0]} was started by fastmae evaluate finetune, got fastmae evaluate partial" in error
    error = mistake(capsys, "evaluate", "finetune", weights, *path, "--run-folder", finished[0])
    assert "--run-folder: expected a new or empty folder" in error
    error = mistake(capsys, "evaluate", "finetune", *resume, "--train.seed", "3")
    assert "--train.seed: a resumed run needs the value it started with" in error
