"""The command line end to end, and that a user's mistake is one clear line and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import mistake
from PIL import Image
from safetensors.torch import load_file, save_file
from training import FLAGS, write_images

import fastmae
from fastmae.cli import main
from fastmae.evaluate import evaluate_sets
from fastmae.loading import load
from fastmae.train.weights import export_weights

SHORT = [*FLAGS.split(), "--train.steps", "6"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", "--out", str(out), "--data.path", str(images), *SHORT]) == 0
    return out


def test_pretrain_leaves_a_complete_folder(run, images):
    names = {path.name for path in run.iterdir()}
    files = {"config.json", "status.json", "metrics.jsonl", "summary.json", "model.safetensors"}
    assert files | {"checkpoints", "reconstructions"} <= names
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["path"] == str(images)
    assert (config["train"]["steps"], config["train"]["warmup_steps"]) == (6, 1)
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["sets"]) == 2
    for errors in summary["sets"].values():
        assert all(errors[key] > 0 for key in ("mse", "mse_mean_color", "mse_inverse_distance"))
        # Six steps teach nothing.
        assert errors["worse_than"] == ["the mean visible colour", "inverse-distance filling"]
    assert summary["precision"] == "fp32"
    with Image.open(summary["picture"]) as picture:
        assert min(picture.size) > 100


def test_predictions_that_are_not_finite_are_reported_in_valid_json(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*FLAGS.split(), "--train.steps", "2", "--train.base-lr", "1e38", "--report.picture-every-steps", "2"]
    flags += ["--model.mask-strategy", "block"]
    assert main(["pretrain", "--out", str(out), "--data.path", str(images), *flags]) == 0
    printed = capsys.readouterr()
    assert "WARNING: THE MODEL'S PREDICTIONS ARE NOT FINITE" in printed.err
    text = (out / "evaluations.jsonl").read_text() + (out / "summary.json").read_text()
    assert '"crops_mse": null' in text
    assert text.count('"mask_strategy": "block"') == 2
    assert "block masks: error" in printed.out
    assert "NaN" not in text


def test_a_damaged_checkpoint_is_named_when_the_run_resumes_from_another(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (shard,) = (copy / "checkpoints/step-6").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["pretrain", "--out", str(copy), "--resume"]) == 0
    line = f"Continuing from {copy}/checkpoints/step-4; skipped as damaged: step-6"
    assert f"\n{line}\n" in capsys.readouterr().out


def test_reconstruct_draws_the_same_from_a_checkpoint_and_from_weights(run, images, tmp_path, capsys):
    for number, source in enumerate((run / "checkpoints/step-6", run / "model.safetensors")):
        out = tmp_path / "figures" / f"{number}.png"
        assert main(["reconstruct", str(source), str(images / "0.jpg"), str(images / "1.jpg"), "--out", str(out)]) == 0
        assert f"Picture: {out}" in capsys.readouterr().out
    figures = [path.read_bytes() for path in sorted((tmp_path / "figures").iterdir())]
    assert figures[0] == figures[1]


def test_exported_weights_have_upstreams_keys_and_load_back(run):
    weights = load_file(run / "model.safetensors")
    assert {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "decoder_blocks.0.mlp.fc1.bias",
        "mask_token",
    } <= set(weights)
    model, manifest = load(run / "model.safetensors", return_info=True)
    assert manifest.step == 6
    modes = {path.name: path.stat().st_mode for path in run.glob("*.*")}
    assert modes["model.safetensors"] == modes["config.json"]  # whom the umask lets read the one may read the other
    for name, tensor in load(run).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_an_encoder_alone_loads_but_does_not_reconstruct(run, tmp_path, images, capsys):
    model = load(run)
    export_weights(model, tmp_path / "full.safetensors")
    weights = load_file(tmp_path / "full.safetensors")
    encoder = {name: t for name, t in weights.items() if not name.startswith("decoder_") and name != "mask_token"}
    save_file(encoder, tmp_path / "encoder.safetensors", metadata={"architecture": json.dumps(model.architecture)})
    loaded, info = load(tmp_path / "encoder.safetensors", return_info=True)
    assert not info.has_decoder
    batch = torch.zeros(1, 3, *model.img_size, dtype=torch.uint8)
    assert torch.equal(loaded.encode(batch), model.encode(batch))
    with pytest.raises(ValueError, match="the weights are of an encoder alone"):
        loaded(batch)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    out = tmp_path / "figure.png"
    assert "has no decoder" in mistake(
        capsys, "reconstruct", tmp_path / "encoder.safetensors", images / "0.jpg", "--out", out
    )
    assert not out.exists()


@pytest.mark.parametrize("help_flag", ["--help", "--help-all"])
def test_help_documents_what_most_need_or_every_field(help_flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit, match="0"):
        main(["pretrain", help_flag])
    text = capsys.readouterr().out
    flags = "--out --resume --recipe --data.path --data.loader --model.name --model.img-size --model.mask-ratio"
    flags += " --train.global-batch-size --train.epochs --train.steps --train.base-lr --train.precision --train.device"
    assert not [flag for flag in flags.split() if flag not in text]
    assert "(required)" not in text
    assert "or a .txt or .tsv file: one path per line, optionally" in " ".join(text.replace("│", "").split())
    assert len(text.split("Folder of images")[1].splitlines()[0]) > 60  # wrapped at the frame, not as in the source
    rare = ("--train.betas", "--data.prefetch", "--report.stall-seconds", "Steps in the trace")
    assert [flag in text for flag in rare] == [help_flag == "--help-all"] * 4
    assert ("more flags: fastmae pretrain --help-all" in text) == (help_flag == "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain /data/photos", "/data/photos: expected a flag before it; did you mean --data.path /data/photos?"),
        ("pretrain imagenet-vit-b", "did you mean --recipe imagenet-vit-b?"),
        ("pretrain --data.pth x", "--data.pth: no such flag; did you mean --data.path?"),
        ("pretrain --data x", "--data: no such flag; did you mean --data.path?"),
        ("pretrain --epochs=5", "--epochs: no such flag; did you mean --train.epochs?"),
        ("pretrain --nothing-like-it", "--nothing-like-it: no such flag\n"),
        ("pretrain --train.epochs abc", "--train.epochs: expected {None}|FLOAT, got abc; fastmae pretrain --help"),
        ("pretrain --train.precision fp7", "--train.precision: expected one of ("),
        ("pretrain --train.seed", "Missing value for argument '--train.seed'"),
        ("pretrian", "expected one of pretrain, data, "),
        ("pretrian", "got pretrian; did you mean pretrain?"),
        ("data stats x --maxpixels=3", "--maxpixels: no such flag; did you mean --max-pixels?"),
        ("data stat x", "Expected one of {shard, index, verify, stats}; fastmae data --help"),
        ("reconstruct", "Missing from fastmae reconstruct: CHECKPOINT"),
    ],
)
def test_mistakes_in_the_command_line_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "50")
    error = mistake(capsys, *arguments.split())
    assert message in error
    assert error.count("\n") == 1


def test_version_and_help_without_a_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmae {fastmae.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert "pretrain" in capsys.readouterr().out


def test_help_needs_neither_pytorch_nor_a_reader():
    """As with ``| head``; the pipe is closed before anything is written."""
    code = "import sys; from fastmae.cli import main\n"
    code += "try: main(['pretrain', '--help'])\nfinally: assert 'torch' not in sys.modules"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


MISTAKES = """
pretrain --out {new} --model.img-size 60           | --model.img-size: size 60x60 does not divide into patches of 8x8
pretrain --out {new} --train.reduce-dtype bf16     | --train.reduce-dtype: expected fp32 in a single process
pretrain --out {new} --data.path /no/such/folder   | /no/such/folder
pretrain --out {new} --data.path {tmp}/empty       | {tmp}/empty
pretrain --out {new} --model.attention xformers --train.device cpu      | 'xformers'
pretrain --out {new} --train.steps 5 --train.warmup-steps 9 | --train.warmup-steps: expected a warm-up shorter
pretrain --out {new} --resume                      | --resume: expected a run to continue in {new}, found none
pretrain --out {new} --resume --train.steps 2      | --resume: expected a run to continue in {new}, found none
pretrain --out {tmp}/file/run                      | --out: expected a folder that can be written, got {tmp}/file/run
pretrain --out {run}                               | add --resume to continue the run in it
pretrain --out {run} --resume --recipe imagenet-vit-l | --recipe: the run in {run} was started with photographs, got
pretrain --out {run} --resume --model.embed-dim 64 | another architecture: embed_dim 32 there, 64 here
pretrain --resume                                  | --resume: expected --out
reconstruct {run}                                  | IMAGES: expected at least one image
reconstruct {run} {images}/0.jpeg                  | 0.jpeg: no such file
reconstruct {run} {images}/0.jpg --mask-ratio 1.5  | --mask-ratio: expected a number strictly between 0 and 1, got 1.5
reconstruct {run} {images}/0.jpg --bands 1         | --bands: expected a model of more than 3 channels, got one of 3
reconstruct {run} {tmp}/four.npy                   | 4 channels: expected 3, as the model takes
reconstruct {run} {tmp}/float.npy                  | with --value-range LOW HIGH
reconstruct {run} {tmp}/empty                      | empty: expected a folder with image files
reconstruct {tmp}/missing image.jpg                | missing
reconstruct {tmp}/text.safetensors image.jpg       | text.safetensors
reconstruct {tmp}/bare.safetensors image.jpg       | bare.safetensors
reconstruct {tmp}/empty image.jpg                  | empty
"""


@pytest.mark.parametrize("mistake_and_message", MISTAKES.strip().splitlines())
def test_mistakes_are_named_and_leave_nothing_behind(run, images, tmp_path, capsys, monkeypatch, mistake_and_message):
    arguments, message = mistake_and_message.split("|")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("file", "text.safetensors"):
        (tmp_path / name).write_text("in the way")
    save_file({"a": torch.ones(1)}, tmp_path / "bare.safetensors")
    np.save(tmp_path / "four.npy", np.zeros((40, 50, 4), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((40, 50, 3), np.float32))
    places = {"run": run, "images": images, "tmp": tmp_path, "new": tmp_path / "new"}
    before = sorted([*run.rglob("*"), *tmp_path.glob("*")])
    assert message.strip().format(**places) in mistake(capsys, *arguments.format(**places).split())
    assert sorted([*run.rglob("*"), *tmp_path.glob("*")]) == before


def test_own_images_without_a_recipe_get_the_one_for_them(tmp_path, capsys):
    """Of a job that may be the first of its run, and with an image that is cut short."""
    images = write_images(tmp_path / "images", 5)
    whole = (images / "3.jpg").read_bytes()
    (images / "3.jpg").write_bytes(whole[: len(whole) // 2])
    arguments = [flag for flag in SHORT if flag not in ("--recipe", "photographs")] + ["--data.path", str(images)]
    assert "3.jpg" in mistake(capsys, "pretrain", "--out", tmp_path / "stop", *arguments)
    out, arguments = tmp_path / "run", [*arguments, "--data.max-bad-fraction", "0.2"]
    assert main(["pretrain", "--out", str(out), "--resume", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("--data.path without --recipe: taking small-data, ")
    assert "a photograph never trained on: WORSE THAN the mean visible colour and inverse-distance filling" in printed
    config = json.loads((out / "config.json").read_text())
    assert (config["recipe"], config["model"]["norm_pix_loss"], config["data"]["vflip"]) == ("small-data", True, 0)
    assert json.loads((out / "summary.json").read_text())["bad_files"] == 1
    (bad,) = (out / "bad_files.jsonl").read_text().splitlines()
    assert "3.jpg" in bad


def test_dali_that_is_not_installed(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setattr("fastmae.data.open.has_dali", lambda: False)
    error = mistake(capsys, "pretrain", "--out", tmp_path / "run", "--data.path", images, "--data.loader", "dali")
    assert "DALI is not installed" in error
    assert not (tmp_path / "run").exists()


def test_float_bands_from_stats_to_figure(tmp_path, capsys):
    """What stats prints is pasted; the figure is of the file's own values, in the run's ranges and masks."""
    folder, out, generator = tmp_path / "bands", tmp_path / "run", np.random.default_rng(0)
    folder.mkdir()
    scale, offset = np.array([4000, 2, 1e-3, 60]).reshape(4, 1, 1), np.array([100, -1, 0, 270]).reshape(4, 1, 1)
    bands = [(generator.random((4, 32, 48)) * scale + offset).astype(np.float32) for _ in range(5)]
    for i, values in enumerate(bands):
        np.save(folder / f"{i}.npy", values)
    (folder / "cut.npy").write_bytes((folder / "0.npy").read_bytes()[:-9])
    reading = ["--channels", "4", "--channels-first"]
    assert main(["data", "stats", str(folder), *reading]) == 0
    (flags,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("--model.mean"))
    options = [*SHORT, "--train.steps", "2", "--data.max-bad-fraction", "0.5", "--model.mask-strategy", "block"]
    assert main(["pretrain", "--out", str(out), "--data.path", str(folder), *flags.split(), *options]) == 0
    said = capsys.readouterr().err
    assert "WARNING: --data.path: 5 images, fewer than the 8 of a step" in said
    assert "already normalised" not in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["first_loss"] > 0.6  # 0.43 of pixels that are not normalised
    assert list(summary["sets"]) == ["new crops of the training images"]  # the photographs have other channels

    drawing = ["--show", "2", "--bands", "3", "0", "1", "--visible", "predicted", "--out", str(tmp_path / "a.png")]
    assert main(["reconstruct", str(out), str(folder), *drawing]) == 0
    printed = capsys.readouterr()
    assert "WARNING: skipped " in printed.err
    assert "2 of 6 images shown, errors over 5; 75% of patches masked, block masks" in printed.out
    config = json.loads((out / "config.json").read_text())
    low, high = np.reshape(config["data"]["value_range"], (4, 2, 1, 1)).transpose(1, 0, 2, 3)
    order = [0, 3, 1, 2, 4]  # first those that are shown
    units = [((bands[i] - low) / (high - low)).clip(0, 1).astype(np.float32) for i in order]
    model = load(out)
    images = {"images": torch.from_numpy(np.stack(units))}
    numbers = evaluate_sets(model, images, mask_ratio=0.75, mask_strategy="block", seed=0, path=tmp_path / "b.png")
    assert f"mse {numbers['images']['mse']:.4f}" in printed.out
    assert numbers["images"]["mse_mean_color"] == pytest.approx(1, rel=0.1)  # in units of the standard deviation


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise TypeError("a bug")

    monkeypatch.setattr("fastmae.train.trainer.Trainer.train_step", broken)
    with pytest.raises(TypeError, match="a bug"):
        main(["pretrain", "--out", str(tmp_path / "run"), *SHORT])
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"


def test_a_failed_process_ends_without_its_process_group():
    """The group of GPUs may wait for a rank that has gone, and the interpreter's end for the group."""
    script = """
import atexit, runpy
import torch.distributed as dist
import fastmae.cli
def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "waited")
    print("said")
    raise RuntimeError("a bug")
fastmae.cli.main = main
runpy.run_module("fastmae", run_name="__main__")
"""
    several = os.environ | {"RANK": "0"}  # one of several processes
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=several)
    assert (done.returncode, done.stdout) == (1, "said\n")
    assert "RuntimeError: a bug" in done.stderr
