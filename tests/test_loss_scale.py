"""The loss scale follows ``torch.amp.GradScaler``'s, and goes on from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from fastmae.train.numerics.gradients import LossScale

OVERFLOWS = [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1]


def scales_of_torch(growth_interval: int) -> list[float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_interval)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    found = []
    for overflow in OVERFLOWS:
        scaler.scale(parameter.sum() * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(scaler.get_scale())
    return found


@pytest.mark.parametrize("growth_interval", [1, 2, 3])
def test_scale_is_torchs(growth_interval):
    ours, found = LossScale(torch.device("cpu"), 1024.0, growth_interval), []
    for step, overflow in enumerate(OVERFLOWS):
        if step == 9:
            state, ours = ours.state(), LossScale(torch.device("cpu"), 1.0, growth_interval)
            ours.restore(state)
        ours.update(torch.tensor(float(overflow)))
        found.append(float(ours.value))
    assert found == scales_of_torch(growth_interval)
