"""``fastmae evaluate``, ``features`` and ``inspect``: figures, files, and mistakes that are named."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.cli import evaluate as evaluate_command
from fastmae.cli import main
from fastmae.data import Augment
from fastmae.model import create_model
from fastmae.train.weights import export_weights

COLOURS = {"blue": (40, 60, 200), "green": (60, 180, 70), "red": (210, 40, 50)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16}
    model = create_model("mae_vit_tiny_patch16", **sizes, decoder_depth=1, decoder_num_heads=2, seed=0)
    return export_weights(model, tmp_path_factory.mktemp("weights") / "model.safetensors", step=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def evaluate(capsys, *arguments: object) -> tuple[int, str]:
    code = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request) -> Iterator[list[str]]:
    """``--device``; on a GPU, that it was used is checked afterwards."""
    if request.param == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
    yield ["--device", request.param]
    assert request.param == "cpu" or torch.cuda.max_memory_allocated() > before


@pytest.mark.parametrize(
    ("protocol", "flags"),
    [
        ("knn", []),
        ("linear", ["--pool", "cls"]),
        ("linear", ["--solver", "sgd", "--epochs", "20", "--warmup-epochs", "1", "--base-lr", "2"]),
        ("attentive", ["--queries", "4", "--epochs", "20"]),
    ],
)
def test_colours_are_told_apart_and_the_result_is_one_object(
    weights, folders, tmp_path, capsys, where, protocol, flags
):
    out = tmp_path / "results" / "result.json"
    data = ["--data.path", folders / "train", "--data.val", folders / "val", *where]
    code, printed = evaluate(capsys, "evaluate", protocol, weights, *data, "--out", out, *flags)
    assert code == 0, printed
    result = json.loads(out.read_text())
    assert result["protocol"] == protocol
    assert result["top1"] > 0.8
    assert "top5" not in result  # three classes
    assert (result["train_images"], result["val_images"]) == (36, 12)
    assert result["seconds"] >= 0  # rounded to tenths
    assert result["versions"]["torch"]
    assert f"top-1 {result['top1']:.2%} of 12 images, learned from 36" in printed


def test_without_test_images_a_tenth_is_held_out(weights, folders, capsys):
    code, printed = evaluate(capsys, "evaluate", "knn", weights, "--data.path", folders / "train", "--k", "3")
    assert code == 0, printed
    assert "of 3 images, learned from 33 (k 3" in printed


def test_the_trained_probe_sees_random_crops_and_never_held_out_images(weights, folders, capsys, monkeypatch):
    seen, augmented = [], []
    create = evaluate_command.create_loader

    def create_loader(*arguments, augment, **options):
        augmented.append(augment)
        return create(*arguments, augment=augment, **options)

    monkeypatch.setattr(evaluate_command, "create_loader", create_loader)

    def fit(batches, *_, images, **options):
        seen.append((images, len(next(batches)[1])))
        raise ValueError("seen enough")

    monkeypatch.setattr("fastmae.cli.evaluate.fit_linear_probe", fit)
    flags = [
        "--data.path",
        folders / "train",
        "--solver",
        "sgd",
        "--batch-size",
        36,
    ]  # an epoch, of which 3 are held out
    assert evaluate(capsys, "evaluate", "linear", weights, *flags)[0] == 2
    assert augmented == [Augment(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, crop="random", color_jitter=0)]
    assert seen == [(33, 36)]


def test_labels_that_cannot_be_used_are_named(weights, folders, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, name in ((one, "red"), (other, "cats")):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / name / f"{number}.png")
    code, printed = evaluate(capsys, "evaluate", "knn", weights, "--data.path", one)
    assert (code, "--data.path: expected images of at least two classes" in printed) == (2, True), printed
    flags = ["--data.path", folders / "train", "--data.val", other]
    code, printed = evaluate(capsys, "evaluate", "linear", weights, *flags)
    assert code == 2
    assert "--data.val: expected classes of train (blue, green, red) in other, got cats" in printed
    shutil.copytree(folders / "val" / "red", other / "red")
    for protocol in ("linear", "knn", "attentive"):
        code, printed = evaluate(capsys, "evaluate", protocol, weights, *flags)
        assert code == 2
        assert "--data.val: expected only classes of train in other, got cats in 12 of 16 images" in printed
    code, printed = evaluate(capsys, "evaluate", "attentive", weights, "--data.path", folders / "train", "--queries", 5)
    assert code == 2
    assert "queries: expected a divisor of the width 32, got 5" in printed


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (["knn"], ["--k", 1, "--temperature", 0.1]),
        (["linear"], ["--l2", 0.01]),
        (["attentive", "--queries", 4], ["--lr", 0.001]),
    ],
)
def test_one_image_per_class_is_enough_once_the_settings_are_given(
    weights, folders, tmp_path, capsys, command, settings
):
    for name in COLOURS:
        (tmp_path / name).mkdir()
        shutil.copy(folders / "train" / name / "0.png", tmp_path / name)
    command = ["evaluate", command[0], weights, *command[1:], "--data.path", tmp_path, "--data.val", folders / "val"]
    code, printed = evaluate(capsys, *command)
    assert code == 2
    assert "expected a class of at least two images to learn from" in printed
    assert settings[0] in printed
    code, printed = evaluate(capsys, *command, *settings)
    assert code == 0, printed
    assert "of 12 images, learned from 3" in printed


@pytest.mark.parametrize("command", [("evaluate", "knn"), ("features",), ("reconstruct",)])
def test_a_device_that_is_not_there_is_named(weights, folders, tmp_path, capsys, command):
    images = {"evaluate": ["--data.path", folders / "train"], "features": [folders / "train", tmp_path / "f.npy"]}
    flags = images.get(command[0], [folders / "train"])
    code, printed = evaluate(capsys, *command, weights, *flags, "--device", "cuda:99")
    assert code == 2
    assert "--device: expected a device that is there, got cuda:99" in printed


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu1",
}  # fmt: skip


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "srun"])
def test_of_several_processes_the_first_one_evaluates(weights, folders, tmp_path, capsys, monkeypatch, environment):
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):  # those of srun are translated into these
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "result.json"
    assert evaluate(capsys, "evaluate", "knn", weights, "--data.path", folders / "train", "--out", out) == (0, "")
    assert not out.exists()


def test_tokens_that_do_not_fit_into_memory_are_refused(weights, folders, capsys, monkeypatch):
    monkeypatch.setattr("fastmae.cli.evaluate.physical_bytes", lambda: 20_000)  # 36 images of 4 tokens 32 wide: 9,216
    flags = ["--data.path", folders / "train", "--queries", 4, "--epochs", 1]
    code, printed = evaluate(capsys, "evaluate", "attentive", weights, *flags)
    assert code == 0, printed
    code, printed = evaluate(capsys, "evaluate", "attentive", weights, *flags, "--data.val", folders / "val")
    assert (code, "--data.limit: the patch tokens of all images take" in printed) == (2, True), printed


def test_features_are_written_with_their_paths(weights, folders, tmp_path, capsys, where):
    flags = ["--batch-size", 5, *where]
    code, printed = evaluate(capsys, "features", weights, folders / "val", tmp_path / "f.npy", *flags)
    assert code == 0, printed
    assert "12 features of 32 numbers" in printed
    assert "images/s" in printed
    found = np.load(tmp_path / "f.npy")
    assert found.dtype == np.float32
    assert found.shape == (12, 32)
    paths = (tmp_path / "f.paths.txt").read_text().splitlines()
    assert [path.rsplit("/", 2)[1] for path in paths] == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4
    pq = pytest.importorskip("pyarrow.parquet")
    assert main(["features", str(weights), str(folders / "val"), str(tmp_path / "f.parquet"), "--pool", "cls"]) == 0
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["path"] == paths
    assert table["label"] == [0] * 4 + [1] * 4 + [2] * 4
    assert not np.allclose(table["feature"], found)
    code, printed = evaluate(capsys, "features", weights, folders / "val", tmp_path / "f.csv")
    assert (code, "OUT: expected a .npy or .parquet file" in printed) == (2, True)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
def test_errors_of_reconstructions_on_a_gpu_are_the_cpus(weights, folders, tmp_path, capsys, where):
    errors = []
    for flags in (["--device", "cpu"], where):
        out = ["--out", tmp_path / "figure.png", *flags]
        code, printed = evaluate(capsys, "reconstruct", weights, folders / "val", *out)
        assert code == 0, printed
        errors.append([float(word) for word in printed.split() if word.replace(".", "").isdigit()])
    assert len(errors[0]) > 6
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
def test_a_classifier_fine_tuned_on_a_gpu_is_judged_as_in_its_run(weights, folders, tmp_path, capsys, where):
    flags = """--train.global-batch-size 12 --train.steps 6 --train.warmup-steps 1 --train.base-lr 0.1
        --train.precision bf16 --train.average 0.5 --data.loader torch --data.crop-ratio 1"""
    data = ["--data.path", folders / "train", "--data.val", folders / "val", "--run-folder", tmp_path / "run"]
    out = ["--out", tmp_path / "finetune.json", "--train.device", where[1]]
    code, printed = evaluate(capsys, "evaluate", "finetune", weights, *data, *out, *flags.split())
    assert code == 0, printed
    flags = ["--images", folders / "val", "--crop-ratio", 1, "--precision", "bf16", *where]
    out = ["--out", tmp_path / "robustness.json"]
    code, printed = evaluate(capsys, "evaluate", "robustness", tmp_path / "run", *flags, *out)
    assert code == 0, printed
    (found,) = json.loads((tmp_path / "robustness.json").read_text())["sets"].values()
    tested = json.loads((tmp_path / "finetune.json").read_text())
    assert found["top1"] == pytest.approx(tested["top1"], abs=0.1)  # another batch size rounds otherwise


def test_an_error_leaves_the_features_of_before_and_nothing_else(weights, folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "f.npy").write_text("before")
    monkeypatch.setattr(np, "save", lambda file, rows: file.write(b"half") and full_disk())
    code, printed = evaluate(capsys, "features", weights, folders / "val", tmp_path / "f.npy")
    assert (code, "No space left" in printed) == (2, True), printed
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f.npy": "before"}


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_inspect_tells_what_weights_are(weights, capsys):
    code, printed = evaluate(capsys, "inspect", weights, "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["encoder"] == "1 blocks of 32, 2 heads"
    assert found["predicts"] == "pixels"
    assert found["steps"] == 5
    assert "reconstruct" in found["usable_for"]
    assert evaluate(capsys, "inspect", weights)[1].startswith("path ")
    code, printed = evaluate(capsys, "inspect", weights.parent / "none.pth")
    assert (code, "no such file or folder" in printed) == (2, True)
