"""The leaderboard: the committed page is up to date, runs replace their lines, verdicts follow from the figures."""

from __future__ import annotations

import json
import re

import cifar10
import leaderboard
import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel


def test_the_committed_page_is_what_the_results_give():
    text, rows = leaderboard.PAGE.read_text(), leaderboard.read_rows()
    others = leaderboard.read_rows(leaderboard.PUBLISHED)
    assert leaderboard.page(text) == text
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


def ablated(accuracies: dict[str, list[float]], protocol: str = "linear") -> list[dict[str, str]]:
    """Rows of a results.csv of ``fastmae ablate``; a variant takes as many seconds as it has letters."""
    return [
        {"variant": name, "seed": seed, "protocol": protocol, "top1": top1, "seconds": len(name) + seed / 10,
         "images_per_second": 100 / (len(name) + seed / 10)}
        for name, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "verdicts"),
    [
        ({"a": [0.5, 0.6, 0.7], "b": [0.4, 0.51, 0.6], "c": [0.1, 0.2, 0.3]}, ("confirmed", "confirmed")),
        ({"a": [0.5, 0.6, 0.7], "b": [0.5, 0.62, 0.68], "c": [0.1, 0.2, 0.31]}, ("undecided", "confirmed")),
        ({"a": [0.5, 0.52, 0.54], "b": [0.5, 0.5, 0.5], "c": [0.5, 0.5, 0.5]}, ("undecided", "undecided")),
        ({"a": [0.5, 0.6, 0.7], "b": [0.6, 0.7, 0.81], "c": [0.1, 0.2, 0.3]}, ("contradicted", "contradicted")),
        ({"a": [0.5], "b": [0.4], "c": [0.1]}, ("not run", "not run")),
        ({"a": [0.5, 0.52], "b": [0.4, 0.42]}, ("not run", "not run")),
    ],
)
def test_a_claim_is_judged_by_differences_per_seed(accuracies, verdicts):
    found = [leaderboard.Claim("", "", "a", ("b", "c"), how_many) for how_many in (all, any)]
    assert tuple(leaderboard.judge(claim, ablated(accuracies))[2] for claim in found) == verdicts


def test_the_interval_of_a_difference_is_that_of_the_paired_t_test():
    rows = ablated({"a": [0.5, 0.55, 0.6, 0.52], "b": [0.45, 0.52, 0.56, 0.5]})
    measured, by, _ = leaderboard.judge(leaderboard.Claim("", "", "a", ("b",)), rows)
    assert measured == "a 54.2 ± 4.3; b 50.8 ± 4.6"
    low, high = 100 * np.array(ttest_rel([0.5, 0.55, 0.6, 0.52], [0.45, 0.52, 0.56, 0.5]).confidence_interval())
    assert by == f"+{(low + high) / 2:.1f} ± {(high - low) / 2:.1f}"


def test_an_ablation_gives_a_line_per_variant_and_protocol():
    rows = ablated({"MAE": [0.4, 0.5], "grid": [0.3]}) + ablated({"MAE": [0.2, 0.2]}, "scratch")
    mae, grid, scratch = leaderboard.of_ablation(rows, {"log": "claims.csv"}, 50)
    assert mae == {
        "log": "claims.csv", "features": "MAE", "epochs": "2.00", "images_seen": 100, "wall_clock_s": 3, "cpu_s": "",
        "protocol": "linear", "top1": "45.0", "spread": "7.1", "seeds": 2,
    }  # fmt: skip
    assert (grid["top1"], grid["spread"], grid["seeds"]) == ("30.0", "", 1)
    assert (scratch["features"], scratch["images_seen"], scratch["top1"]) == ("random weights", 0, "20.0")


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
