"""The leaderboard: the committed page is up to date, runs replace their own lines, and the CIFAR-10 script's parts."""

from __future__ import annotations

import json
import re

import cifar10
import leaderboard
import numpy as np
import pytest
from PIL import Image


def test_the_committed_page_is_what_the_results_give():
    text, rows, others = (
        leaderboard.PAGE.read_text(),
        leaderboard.read_rows(),
        leaderboard.read_rows(leaderboard.PUBLISHED),
    )
    assert leaderboard.page(text, rows, others) == text
    for row in rows:
        assert (leaderboard.HERE / row["log"]).is_file()
        assert f"| {row['top1']} ± {row['spread']} |" in text
    assert {row["source"] for row in others} == leaderboard.SOURCES.keys()
    assert re.search(r"\| ViT-B \| 1600 \| 83.6 \| 67.8 \|", text)
    assert "| 46.0* |" in text  # another protocol than ours


def test_the_lines_of_a_run_are_those_of_its_log_and_replace_earlier_ones(tmp_path):
    results = json.loads((leaderboard.HERE / "cifar10.json").read_text())
    committed = [row for row in leaderboard.read_rows() if row["log"] == "cifar10.json"]
    path = tmp_path / "results.csv"
    leaderboard.replace_rows([dict(committed[0], log="other.json"), dict(committed[0], top1="1.0")], "other.json", path)
    rows = cifar10.lines(results, cifar10.STEPS, committed[0]["command"])
    leaderboard.replace_rows(rows, "cifar10.json", path)
    *found, last = leaderboard.read_rows(path)
    assert last["log"] == "other.json"
    hardware = {"hardware": committed[0]["hardware"]}
    assert [row | hardware for row in found] == committed
    means = {row["features"]: float(row["top1"]) for row in found if row["protocol"] == "linear"}
    assert means["pretrained"] == pytest.approx(100 * np.mean([r["pretrained"]["linear"] for r in results]), abs=0.05)
    for other in ("random weights", "pretrained on shuffled pixels"):
        assert means["pretrained"] > means[other] + 5  # what the page claims


def test_draws_hold_as_many_images_of_each_class_and_depend_on_the_seed(tmp_path):
    for name in ("cat", "dog", ".fastmae"):
        (tmp_path / name).mkdir()
        for number in range(9):
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    drawn = [cifar10.draw(tmp_path, 3, seed) for seed in (0, 0, 1, None)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [path.name for path in drawn[3]] == ["0.png", "3.png", "6.png"] * 2
    assert all([path.parent.name for path in paths] == ["cat"] * 3 + ["dog"] * 3 for paths in drawn)
    (once, again), image = leaderboard.shuffle([np.arange(48).reshape(4, 4, 3)] * 2), np.arange(48).reshape(16, 3)
    assert sorted(map(tuple, once.reshape(16, 3))) == list(map(tuple, image))  # whole pixels move
    assert not np.array_equal(once, again)
    found = cifar10.each(drawn[3], cifar10.colour_statistics)
    np.testing.assert_allclose(found[2], [120 / 255, 0, 0, 0, 0, 0], atol=1e-4)
    assert cifar10.each(drawn[3], cifar10.small_pixels).shape == (6, 192)
