"""``fastmae pretrain`` on shards, with sizes that grow and bad files."""

from __future__ import annotations

import json

import pytest
from training import FLAGS, write_images, write_shards

from fastmae import data
from fastmae.cli import main
from fastmae.loading import load

SHORT = [*FLAGS.split(), "--train.steps", "6"]


def run(out, path, *arguments: str) -> dict:
    """Train; return the summary."""
    assert main(["pretrain", "--out", str(out), "--data.path", str(path), *SHORT, *arguments]) == 0
    return json.loads((out / "summary.json").read_text())


def test_sizes_that_grow_are_printed_used_and_end_at_the_models(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", write_images(tmp_path / "images"))
    flags = ["--data.progressive-sizes", "16", "32", "--train.log-every-steps", "1", "--data.loader", "torch"]
    summary = run(tmp_path / "run", shards, *flags)
    text = capsys.readouterr().out
    assert "images of 16x24 from pass 0, 32x48 from pass 2 over the images" in text
    assert "Images: " in text
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["input_height"], row["input_width"]) for row in rows] == [(16, 24)] * 3 + [(32, 48)] * 3
    assert all(row["data_time"] >= 0 for row in rows)
    assert summary["sets"]["new crops of the training images"]["num_images"] > 0  # evaluated at the model's size
    assert load(tmp_path / "run").input_size == (32, 48)


@pytest.mark.skipif(not data.has_dali(), reason="needs NVIDIA DALI")
def test_sizes_that_grow_and_a_bad_file_with_dali(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (images / "3.jpg").write_bytes(b"")
    flags = ["--data.progressive-sizes", "16", "32", "--data.loader", "dali", "--data.max-bad-fraction", "0.1"]
    assert run(tmp_path / "run", images, *flags)["bad_files"] == 1
    assert f"1 bad file, replaced by others: {tmp_path / 'run/bad_files.jsonl'}" in capsys.readouterr().out
    (line,) = (tmp_path / "run/bad_files.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(images / "3.jpg")
