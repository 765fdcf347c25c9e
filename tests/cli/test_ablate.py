"""``fastmae ablate`` with a stand-in for the commands that it starts, and ``fastmae fit-target``."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from training import write_images

from fastmae.cli import EXIT_USAGE, main
from fastmae.train.liveness import EXIT_PREEMPTED
from fastmae.train.targets import create_target

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
log = pathlib.Path(__file__).with_name("log.jsonl")
log.open("a").write(json.dumps(words) + "\\n")
out = pathlib.Path(words[words.index("--out") + 1])
seed = out.parent.name[-1] if words[0] == "evaluate" else out.name[-1]
if words[0] == "pretrain":
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text('{"model": {"mask_ratio": 0.75}}')
    end = log.with_name("end").read_text() if log.with_name("end").exists() else "0"
    if end != "0" and "0.5" in words:
        sys.exit(int(end))
    summary = {"last_loss": 0.5, "seconds": 3.0, "images_per_second": 10.0}
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "status.json").write_text('{"status": "finished"}')
else:
    found = {"protocol": words[1], "features": "avg", "top1": 0.4 + 0.1 * int(seed), "command": " ".join(words)}
    out.write_text(json.dumps(found))
"""
SPEC = """
command = "{python} {stand_in}"
seeds = [0, 2]
[pretrain]
data.path = "photos"
train.steps = 20
model.norm-pix-loss = true
[variants]
base = {{}}
"mask 50 %" = {{model.mask-ratio = 0.5, model.norm-pix-loss = false}}
[evaluate.knn]
data.val = "others"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "spec.toml").write_text(SPEC.format(python=sys.executable, stand_in=tmp_path / "stand_in.py"))
    return tmp_path


def ablate(folder) -> int:
    return main(["ablate", str(folder / "spec.toml"), "--out", str(folder / "out")])


def calls(folder) -> list[list[str]]:
    log = folder / "log.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    return found


def test_all_variants_run_once_with_their_flags(folder, capfd):
    assert ablate(folder) == 0
    first, *_, fourth = [words for words in calls(folder) if words[0] == "pretrain"]
    common = ["pretrain", "--data.path", "photos", "--train.steps", "20"]
    out = folder / "out"
    assert first == [*common, "--model.norm-pix-loss", "--train.seed", "0", "--out", str(out / "base-seed0")]
    changed = ["--model.no-norm-pix-loss", "--model.mask-ratio", "0.5"]
    assert fourth == [*common, *changed, "--train.seed", "2", "--out", str(out / "mask-50---seed2")]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(r["variant"], r["seed"], r["protocol"], r["--model.mask-ratio"]) for r in rows][1:3] == [
        ("base", "2", "knn", "0.75"),
        ("mask 50 %", "0", "knn", "0.5"),
    ]
    table = (out / "table.md").read_text()
    assert "| mask 50 % | 50.0 ± 14.1 | 0.5000 ± 0.0000 | 3 ± 0 |" in table
    assert table in capfd.readouterr().out
    assert ablate(folder) == 0
    assert not (folder / "log.jsonl").exists()  # nothing is left to run


def test_continues_what_was_interrupted(folder, capfd):
    (folder / "end").write_text(str(EXIT_PREEMPTED))
    assert ablate(folder) == EXIT_PREEMPTED
    assert calls(folder)[-1][0] == "pretrain"
    (folder / "end").write_text("3")
    assert ablate(folder) == EXIT_USAGE
    assert "variant mask 50 %: exit code 3 of " in capfd.readouterr().err
    calls(folder)
    (folder / "end").unlink()
    assert ablate(folder) == 0
    resumed, evaluated, *_ = calls(folder)
    assert resumed[-1] == "--resume"
    assert evaluated[:5] == ["evaluate", "knn", str(folder / "out" / "mask-50---seed0"), "--data.path", "photos"]


def test_protocols_that_train_have_a_folder_and_continue_there(folder):
    spec = folder / "spec.toml"
    spec.write_text(spec.read_text().replace("[0, 2]", "[0]").replace("evaluate.knn", "evaluate.finetune"))
    with spec.open("a") as file:
        file.write("[evaluate.scratch]\ntrain.epochs = 5\n")
    started = folder / "out" / "base-seed0" / "finetune"
    started.mkdir(parents=True)
    (started / "config.json").write_text("{}")
    assert ablate(folder) == 0
    run = str(folder / "out" / "base-seed0")
    evaluations = [words for words in calls(folder) if words[0] == "evaluate"]
    assert evaluations[0][1:6] == ["finetune", run, "--run-folder", f"{run}/finetune", "--resume"]
    scratch = ["scratch", "--run-folder", f"{run}/scratch", "--data.path", "photos", "--train.seed", "0"]
    assert evaluations[1][1:8] == scratch
    rows = list(csv.DictReader((folder / "out" / "results.csv").open()))
    assert [row["protocol"] for row in rows] == ["finetune", "scratch"] * 2


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("steps = 20", "steps = 30", "base-seed0 was run with --train.steps 20, the specification says 30"),
        (
            '"others"',
            '"third"',
            "--data.val others --out {out}/base-seed0/knn.json, the specification says --data.path",
        ),
    ],
)
def test_results_with_other_flags_are_not_taken_for_these(folder, capfd, was, now, message):
    assert ablate(folder) == 0
    spec = folder / "spec.toml"
    spec.write_text(spec.read_text().replace(was, now))
    assert ablate(folder) == EXIT_USAGE
    assert message.format(out=folder / "out") in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[variants", "expected a TOML file"),
        ("[variants]\nbase = 1", "expected a table of flags for each entry"),
        ("[pretrain]", "expected a table of flags for each entry"),
        ("[variants]\n'a b' = {}\n'a-b' = {}", "expected variants that differ in letters or digits"),
        ("epochs = 3\n[variants]\na = {}", "got epochs"),
    ],
)
def test_specifications_that_are_none(folder, capfd, text, message):
    (folder / "spec.toml").write_text(text)
    assert ablate(folder) == EXIT_USAGE
    assert message in capfd.readouterr().err


def test_fit_target(tmp_path, capfd):
    write_images(tmp_path / "images", 4)
    options = ["--img-size", "32", "--patch-size", "8", "--images", "4"]
    for kind, size in (("pca", 3), ("codebook", 5)):
        out = tmp_path / f"{kind}.safetensors"
        words = ["fit-target", str(tmp_path / "images"), str(out), "--kind", kind, "--size", str(size), *options]
        assert main(words) == 0
        assert create_target(str(out), (8, 8), 3).size == size
    assert main([*words[:-1], "4", "--size", "1000"]) == EXIT_USAGE
    assert "size: expected at most the 64 patches of a batch, got 1000" in capfd.readouterr().err
