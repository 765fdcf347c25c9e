"""The schedule is facebookresearch/mae's, weight decay spares what it should, and a non-finite step changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastmae.train.config import TrainConfig
from fastmae.train.guard import step_unless_non_finite
from fastmae.train.optim import create_optimizer, create_schedule, parameter_groups

TRAIN = TrainConfig(global_batch_size=64, epochs=10, warmup_epochs=2, base_lr=1e-3, min_lr=1e-5)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.mask_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4), requires_grad=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.cls_token + self.mask_token + self.pos_embed)).square().mean()


def upstream_lr(epoch: float, peak: float) -> float:
    """``util/lr_sched.py`` of facebookresearch/mae, restated."""
    if epoch < 2:
        return peak * epoch / 2
    return 1e-5 + (peak - 1e-5) * 0.5 * (1.0 + math.cos(math.pi * (epoch - 2) / (10 - 2)))


def test_schedule_is_upstreams_and_moves_every_step():
    schedule = create_schedule(TRAIN, num_samples=640)  # ten steps an epoch
    rates = [schedule(step) for step in range(100)]
    assert schedule.total_steps == 100
    assert rates == pytest.approx([upstream_lr(step / 10, 1e-3 * 64 / 256) for step in range(100)], rel=1e-12)
    assert all(a != b for a, b in pairwise(rates))
    assert max(rates) == rates[20] == 1e-3 * 64 / 256
    assert schedule(100) == pytest.approx(1e-5)


def test_epochs_that_are_not_whole_steps_cover_every_sample():
    assert create_schedule(TRAIN, num_samples=650).total_steps == 102


def test_steps_of_a_run_are_exact():
    """In floating point 30 * (50,000 / 96) is above 15,625."""
    for epochs, images, batch, steps in (
        (30, 50_000, 96, 15_625),
        (0.1, 1000, 100, 1),
        (800, 1_281_167, 4096, 250_228),
    ):
        train = replace(TRAIN, epochs=epochs, warmup_epochs=0.05, global_batch_size=batch)
        assert create_schedule(train, images).total_steps == steps
        assert create_schedule(train, images).warmup_steps == pytest.approx(0.05 * images / batch)


def test_a_run_in_steps_needs_no_warmup():
    assert create_schedule(replace(TRAIN, epochs=None, steps=7, warmup_epochs=None), 650).warmup_steps == 0


def test_biases_and_norms_do_not_decay_and_frozen_tables_are_left_out():
    model = Toy()
    decayed, exempt = parameter_groups(model, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["cls_token", "mask_token", "head.weight"]
    assert {names[p] for p in exempt["params"]} == {"norm.weight", "norm.bias", "head.bias"}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)


def test_step_equals_plain_adamw():
    torch.manual_seed(1)
    model, plain = Toy(), Toy()
    plain.load_state_dict(model.state_dict())
    ours = create_optimizer(parameter_groups(model, TRAIN.weight_decay), TRAIN)
    theirs = torch.optim.AdamW(parameter_groups(plain, 0.05), lr=0.01, betas=(0.9, 0.95), foreach=False)
    for _ in range(5):
        x = torch.randn(8, 5, 4)
        for group in ours.param_groups:
            group["lr"] = 0.01
        for module, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            module(x).backward()
        norm, skipped = step_unless_non_finite(ours, clip_grad=0.1)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        theirs.step()
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-6, atol=1e-7)
