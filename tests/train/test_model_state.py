"""Model and optimiser in a checkpoint of one process: exact continuation, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from checkpoints import assert_equal, load, save_checkpoint

from fastmae.train.checkpoint import CheckpointError, CheckpointManager
from fastmae.train.checkpoint.state import collect


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def make(device="cpu", fused=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, device=device), torch.nn.LayerNorm(3, device=device))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)


def train(model, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(images.to(model[0].weight.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_model_and_optimizer_go_on_exactly(folder):
    model, optimizer = make()
    path = save_checkpoint(folder, 0, collect(model, optimizer), {})
    assert optimizer.state == {}  # asking must not make a state, nor a step
    train(model, optimizer, range(3))
    path = save_checkpoint(folder, 3, collect(model, optimizer), {})
    train(model, optimizer, range(3, 5))

    again, other = make()
    load(folder / "step-0", again, other)
    train(again, other, range(1))
    load(path, again, other)
    assert all(state["step"].item() == 3 for state in other.state.values())
    train(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))
    load(folder / "step-0", again, other)
    assert other.state == {}


def test_a_model_of_other_names_is_refused(folder):
    model, optimizer = make()
    path = save_checkpoint(folder, 0, collect(model, optimizer), {})
    other = torch.nn.Sequential(torch.nn.Linear(5, 3))
    with pytest.raises(CheckpointError, match=r"do not fit the model: missing \[\], unknown \['model.1.bias'"):
        load(path, other, torch.optim.AdamW(other.parameters()))
    wider = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.LayerNorm(3))
    with pytest.raises(CheckpointError, match=r"model.0.weight is float32 \(3, 5\), expected float32 \(3, 6\)"):
        load(path, wider, torch.optim.AdamW(wider.parameters()))


@pytest.mark.gpu
def test_training_on_a_gpu_goes_on_exactly(folder):
    model, optimizer = make("cuda")
    train(model, optimizer, range(3))
    with CheckpointManager(folder, background=True) as saver:
        saver.save(3, collect(model, optimizer), {})
        train(model, optimizer, range(3, 5))
    again, other = make("cuda")
    load(folder / "step-3", again, other)
    here, there = (next(iter(o.state.values()))["step"].device.type for o in (other, optimizer))
    assert here == there
    train(again, other, range(3, 5))
    assert_equal(collect(again, other), collect(model, optimizer))
