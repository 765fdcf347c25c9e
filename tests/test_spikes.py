"""Spikes of loss and gradient norm: found at their step, and nothing found where nothing is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fastmae.train.numerics.spikes import LEAST, MAX_TOLD, WINDOW, Spikes

STEPS, INTERVAL = 1500, 20
T = np.arange(STEPS)


@pytest.fixture
def watch(tmp_path):
    """Feeds losses and gradient norms by intervals; returns rows, lines of the file, lines on the terminal."""

    def feed(losses, norms=None, interval=INTERVAL, cut=None):
        norms = np.ones(len(losses)) if norms is None else norms
        path, told, rows = tmp_path / "spikes.jsonl", [], []
        path.unlink(missing_ok=True)
        spikes = Spikes(path, lambda step: (8 * (step - 1), 8 * step - 1), told.append)
        for start in range(0, len(losses), interval):
            row = {"step": min(start + interval, len(losses))}
            part = slice(start, row["step"])
            spikes.observe(row, {"loss": list(losses[part]), "grad_norm": list(norms[part])})
            rows.append(row)
            if row["step"] == cut:  # killed, and resumed from what a manifest keeps
                state = json.loads(json.dumps(spikes.state()))
                spikes = Spikes(path, lambda step: (8 * (step - 1), 8 * step - 1), told.append)
                spikes.restore(state)
        return rows, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [], told

    return feed


def falling(noise=0.0, seed=0):
    """A loss as pretraining has it, and a gradient norm that rises in the warm-up and falls afterwards."""
    scatter = np.random.default_rng(seed).standard_normal((2, STEPS))
    losses = (0.4 + 0.6 * np.exp(-T / 200)) * np.exp(noise * scatter[0])
    return losses, (0.05 + 2 * np.minimum(T / 150, 1) * np.exp(-T / 500)) * np.exp(2 * noise * scatter[1])


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03, 0.2])
def test_a_usual_run_has_no_spikes(watch, noise):
    for seed in range(3):
        rows, lines, told = watch(*falling(noise, seed))
        assert lines == told == []
        assert all(row["loss_spikes"] == row["grad_norm_spikes"] == 0 for row in rows)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_values_have_no_spikes_and_their_scatter_of_zero_is_no_bar(watch, value):
    losses = np.full(300, value)
    assert watch(losses, losses)[1:] == ([], [])
    losses[200] = value + 0.1
    assert [line["step"] for line in watch(losses)[1]] == [201]


def test_rising_smoothly_is_no_spike(watch):
    assert watch(0.1 + T / 500, 0.01 * np.exp(T / 60))[1] == []


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03])
def test_a_spike_is_told_with_step_value_usual_and_positions(watch, noise):
    losses, norms = falling(noise)
    losses[[700, 1203]] *= 2.5
    norms[703] *= 30
    rows, lines, told = watch(losses, norms)
    assert [(line["step"], line["what"], line["row"]) for line in lines] == [
        (701, "loss", 720),
        (704, "grad_norm", 720),
        (1204, "loss", 1220),
    ]
    assert lines[0]["value"] == losses[700]
    assert lines[0]["usual"] == np.median(losses[700 - WINDOW : 700])
    assert lines[0]["positions"] == [5600, 5607]
    row = rows[35]
    assert (row["step"], row["loss_spikes"], row["grad_norm_spikes"]) == (720, 1, 1)
    assert (row["loss_max"], row["grad_norm_max"]) == (losses[700], norms[703])
    assert sum(row["loss_spikes"] for row in rows) == 2
    assert told[0].startswith(f"step 701: loss {losses[700]:.4g}, usually {lines[0]['usual']:.4g} (images 5,600 to")
    assert "gradient norm" in told[1]


def test_the_first_steps_are_not_judged(watch):
    losses = np.full(200, 0.5)
    losses[[3, LEAST - 1, LEAST + 1]] = 5.0
    assert [line["step"] for line in watch(losses)[1]] == [LEAST + 2]


def test_steps_that_are_not_finite_are_neither_spikes_nor_usual(watch):
    losses, norms = falling(0.01)
    losses[500:520], norms[500:521] = math.nan, math.inf
    rows, lines, _ = watch(losses, norms)
    assert lines == []
    assert (rows[25]["loss_max"], rows[25]["grad_norm_max"]) == (None, None)
    json.dumps(rows, allow_nan=False)
    losses[600] = 3.0
    assert [line["step"] for line in watch(losses, norms)[1]] == [601]


def test_a_level_that_stays_becomes_the_usual_one_and_is_told_once(watch):
    losses = falling(0.003)[0]
    losses[800:] += 1.0
    _, lines, told = watch(losses)
    steps = [line["step"] for line in lines]
    assert steps == list(range(801, 801 + len(steps)))
    assert len(steps) <= WINDOW / 2 + 1
    assert len(told) == 1


def test_the_terminal_is_told_a_bounded_number_of_times(watch):
    losses = falling(0.003)[0]
    losses[200::30] *= 3
    _, lines, told = watch(losses)
    assert len(lines) > 40
    assert len(told) == MAX_TOLD
    assert told[-1].endswith("more of them in spikes.jsonl only")


def test_images_of_another_size_have_another_usual_loss(tmp_path):
    told = []
    spikes = Spikes(tmp_path / "spikes.jsonl", lambda step: (step, step), told.append)
    for step in range(20, 401, 20):
        height = 160 if step <= 200 else 224
        losses = [0.5 + 0.4 * (height == 224)] * 20
        row = {"step": step, "input_height": height, "input_width": height}
        spikes.observe(row, {"loss": losses, "grad_norm": losses})
    assert told == []


@pytest.mark.parametrize("cut", [700, 720])
def test_an_interrupted_run_tells_the_same(watch, cut):
    losses, norms = falling(0.02)
    losses[690:730:7] *= 4
    losses[200:650:30] *= 4
    losses[700:706] *= 4
    straight, interrupted = watch(losses, norms), watch(losses, norms, cut=cut)
    assert straight == interrupted
    assert len(straight[1]) > 20


def test_other_ranks_count_the_same_and_write_nothing(tmp_path):
    path = tmp_path / "spikes.jsonl"
    assert count_of_one(path, writes=False) == (1, 1)
    assert not path.exists()


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path):
    assert count_of_one(tmp_path / "no folder/spikes.jsonl") == (1, 1)


def count_of_one(path, **options):
    losses, row = [0.5] * 99 + [5.0], {"step": 100}
    Spikes(path, lambda step: (step, step), lambda text: None, **options).observe(
        row, {"loss": losses, "grad_norm": losses}
    )
    return row["loss_spikes"], row["grad_norm_spikes"]
