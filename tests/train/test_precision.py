"""``--train.precision auto``: bf16 on CUDA, the faster of two on a CPU, and what a checkpoint says on resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import TRAIN, make_trainer, write_images

from fastmae.train import precision
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import PretrainConfig
from fastmae.train.precision import Speeds, measure_products, settle_precision

OLD, NEW = Speeds(fp32=56.0, bf16=1.1), Speeds(fp32=100.0, bf16=200.0)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settle(asked: str, device: torch.device = CPU, ranks: Ranks | None = None, saved: str | None = None):
    config = PretrainConfig(train=replace(TRAIN, precision=asked))
    manifest = saved and {"config": {"train": {"precision": saved}}}
    settled = settle_precision(config, 64, device, ranks or Ranks(), manifest)
    return settled.config.train.precision, settled.text, settled.warning


def refuse(width: int) -> Speeds:
    raise AssertionError("measured")


@pytest.mark.parametrize("width", [24, 1280])
def test_both_rates_are_measured(width):
    state = torch.get_rng_state()
    assert all(0.01 < rate < 1e5 for rate in measure_products(width))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("speeds", "expected"), [(OLD, "fp32"), (NEW, "bf16")])
def test_a_cpu_takes_the_faster_one_and_shows_both(monkeypatch, speeds, expected):
    monkeypatch.setattr(precision, "measure_products", lambda width: speeds)
    chosen, text, warning = settle("auto")
    assert (chosen, warning) == (expected, "")
    assert f"{speeds.bf16:g} GFLOP/s in bf16, {speeds.fp32:g} in fp32" in text


def test_bf16_that_is_asked_for_is_kept_with_a_warning_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(precision, "measure_products", lambda width: OLD)
    chosen, text, warning = settle("bf16")
    assert (chosen, text) == ("bf16", "")
    assert "--train.precision bf16: matrix products run at 0.02 of fp32's rate" in warning
    monkeypatch.setattr(precision, "measure_products", lambda width: NEW)
    assert settle("bf16") == ("bf16", "", "")


def test_what_needs_no_measurement_gets_none(monkeypatch):
    monkeypatch.setattr(precision, "measure_products", refuse)
    assert settle("auto", CUDA) == ("bf16", "", "")
    assert settle("bf16", CUDA) == ("bf16", "", "")
    for asked in ("fp16", "fp32"):
        assert settle(asked) == (asked, "", "")
    for device in (CPU, CUDA):
        assert settle("auto", device, saved="fp32") == ("fp32", "Precision auto: fp32, as the run began", "")


def test_the_first_rank_decides(monkeypatch):
    class Second(Ranks):
        def first(self, what, function):
            return OLD

    monkeypatch.setattr(precision, "measure_products", refuse)
    assert settle("auto", ranks=Second())[0] == "fp32"


def test_a_trainer_needs_a_settled_one(tmp_path):
    with pytest.raises(ValueError, match=r"precision: .*settle_precision.*got auto"):
        make_trainer(tmp_path / "run", write_images(tmp_path / "images", 2), precision="auto")
