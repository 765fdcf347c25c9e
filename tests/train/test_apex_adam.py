"""apex's FusedAdam behind the interface of PyTorch's AdamW; where apex is missing, a stand-in that calls as it does."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn

from fastmae.train.config import TrainConfig
from fastmae.train.guard import LossScale, step_unless_non_finite
from fastmae.train.optim import create_apex_adam, create_optimizer, parameter_groups


class StandIn(torch.optim.Optimizer):
    """The protocol of apex.optimizers.FusedAdam, capturable: learning rates are tensors, steps are counted in groups
    (of the first one by the overflow of the step before), overflow and scale are a scaler's."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, capturable=False):
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["lr"] = group["lr"].to(group["params"][0].device)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def zero_grad(self):
        raise NotImplementedError

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int)
            device = group["params"][0].device
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self._dummy_overflow_buf.item():
                    continue
                (b1, b2), g, t = group["betas"], p.grad * inverse, group["step"].item()
                m, v = state["exp_avg"].lerp_(g, 1 - b1), state["exp_avg_sq"].lerp_(g * g, 1 - b2)
                update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = StandIn
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def train(optimizer: str, device: str, scaled: bool) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """Eight steps, the first and the fifth without a finite gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(device)
    made = create_optimizer(parameter_groups(model, 0.05), TrainConfig(optimizer=optimizer))
    scale = LossScale(torch.device(device), initial=64.0) if scaled else None
    skipped = []
    for step in range(8):
        for group in made.param_groups:
            group["lr"] = 0.01 * (step + 1)
        loss = model(torch.randn(4, 6).to(device)).square().mean() * (float("inf") if step in (0, 4) else 1.0)
        (loss if scale is None else loss * scale.value).backward()
        skipped.append(float(step_unless_non_finite(made, 0.5, scale)[1]))
        made.zero_grad(set_to_none=True)
    return model, made, skipped


def assert_equals_adamw(device: str, scaled: bool) -> None:
    (model, ours, skipped), (expected, theirs, same) = (train(name, device, scaled) for name in ("apex", "adamw"))
    assert skipped == same == [1, 0, 0, 0, 1, 0, 0, 0]
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert ours.state[p]["step"] == theirs.state[q]["step"] == 6
        assert ours.state[p]["step"].dtype == torch.float32
    assert [group["lr"] for group in ours.param_groups] == [0.08, 0.08]
    assert all("step" not in group for group in ours.param_groups)


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_skips_and_state_are_adamws(apex, scaled):
    assert_equals_adamw("cpu", scaled)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("apex") is None, reason="needs NVIDIA's apex")
@pytest.mark.parametrize("scaled", [False, True])
def test_the_real_one_does_too(scaled):
    assert_equals_adamw("cuda", scaled)


def test_missing_apex_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"--train.optimizer: apex's FusedAdam does not load .*GitHub source"):
        create_apex_adam(parameter_groups(model, 0.05), (0.9, 0.95))
