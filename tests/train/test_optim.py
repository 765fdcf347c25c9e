"""The schedule is facebookresearch/mae's, weight decay spares what it should, Muon and apex step and skip."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import nn

from fastmae.train.config import TrainConfig
from fastmae.train.guard import LossScale, step_unless_non_finite
from fastmae.train.optim import create_apex_adam, create_optimizer, create_schedule, orthogonalized, parameter_groups

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


def test_steps_of_a_run_are_exact():
    """In floating point 30 * (50,000 / 96) is above 15,625."""
    for epochs, images, batch, steps in (
        (30, 50_000, 96, 15_625),
        (10, 650, 64, 102),
        (0.1, 1000, 100, 1),
        (800, 1_281_167, 4096, 250_228),
    ):
        train = replace(TRAIN, epochs=epochs, warmup_epochs=0.05, global_batch_size=batch)
        assert create_schedule(train, images).total_steps == steps
        assert create_schedule(train, images).warmup_steps == pytest.approx(0.05 * images / batch)
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


# Muon


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 12)])

    def forward(self, x):
        first, second, third = self.blocks
        return third(second(first(self.embed(x)).tanh())).square().mean()


MUON = replace(TRAIN, optimizer="muon", muon_lr=2e-3, precision="fp32")


def muon_of(model: nn.Module, train: TrainConfig = MUON) -> torch.optim.Optimizer:
    optimizer = create_optimizer(parameter_groups(model, train.weight_decay, matrices=True), train)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 24, 24)])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_scales(shape, dtype):
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    scales = torch.logspace(0, -1.5, u.shape[-1])
    found = orthogonalized(((u * scales) @ vt).to(dtype)).float()
    inside = u.mT @ found @ vt.mT
    assert inside.diagonal(dim1=1, dim2=2).aminmax() == (pytest.approx(0.9, abs=0.3), pytest.approx(1.1, abs=0.15))
    off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_muon_moves_matrices_of_blocks_along_orthogonal_momentum_and_the_rest_as_adamw():
    torch.manual_seed(1)
    model, plain = Blocks(), Blocks()
    plain.load_state_dict(model.state_dict())
    ours = muon_of(model)
    inside = [p for name, p in plain.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    others = [group for group in parameter_groups(plain, 0.05, matrices=True) if "orthogonal" not in group]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), fused=True)
    momenta = [torch.zeros_like(p) for p in inside]
    for _ in range(3):
        x = torch.randn(8, 4)
        for module, optimizer in ((model, ours), (plain, adamw)):
            module.zero_grad()
            module(x).backward()
            optimizer.step()
        with torch.no_grad():
            for p, momentum in zip(inside, momenta, strict=True):
                momentum.mul_(0.9).add_(p.grad, alpha=0.1)
                direction = orthogonalized((0.1 * p.grad + 0.9 * momentum)[None])[0]
                p.mul_(1 - 0.02 * 0.05).sub_(0.02 * 0.2 * 12**0.5 * direction)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_muon_skips_a_step_without_a_finite_gradient_and_divides_by_the_loss_scale(scaled):
    torch.manual_seed(2)
    model, plain = Blocks(), Blocks()
    plain.load_state_dict(model.state_dict())
    ours, unscaled = muon_of(model), muon_of(plain)
    scale = LossScale(torch.device("cpu"), initial=64.0) if scaled else None
    for step in range(4):
        x = torch.randn(8, 4)
        if step == 2:
            before = {n: t.clone() for p in model.parameters() for n, t in (ours.state[p] | {"weight": p}).items()}
            (model(x) * float("nan")).backward()
            assert step_unless_non_finite(ours, 1.0, scale)[1] == 1
            after = {n: t for p in model.parameters() for n, t in (ours.state[p] | {"weight": p}).items()}
            assert all(torch.equal(before[name], after[name]) for name in before)
            model.zero_grad()
        factor = scale.value if scaled else 1.0
        (model(x) * factor).backward()
        plain(x).backward()
        assert [float(step_unless_non_finite(o, 1.0, s)[1]) for o, s in ((ours, scale), (unscaled, None))] == [0, 0]
        model.zero_grad()
        plain.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# NVIDIA's apex: where it is missing, a stand-in that calls as it does.


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


def train_with(optimizer: str, device: str, scaled: bool) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
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
    (model, ours, skipped), (expected, theirs, same) = (train_with(name, device, scaled) for name in ("apex", "adamw"))
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
