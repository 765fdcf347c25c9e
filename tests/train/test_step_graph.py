"""The step as a CUDA graph: with a CPU substitute for capture and replay it trains as eager steps do, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from commands import mistake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import assert_same_tensors, make_trainer, numbers, write_images

from fastmae.train import trainer as loop
from fastmae.train.config import DataConfig, PretrainConfig, TrainConfig
from fastmae.train.guard import LossScale
from fastmae.train.parallel import Parallelism
from fastmae.train.rules import validate
from fastmae.train.step_graph import WARM_UP, StepGraph

STEPS = 16
OPTIONS = {"steps": STEPS, "checkpoint_every_steps": 8, "log_every_steps": 7}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators that ran, to be run again on the same memory.

    Python does not run again, so a number that it computed stays what it was. Memory is kept, as a graph keeps its own.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for to, of in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != of.data_ptr():
                    to.detach().copy_(of)


class TapedStep(StepGraph):
    """Captures to a :class:`Tape`; capturing changes nothing, as that of a CUDA graph computes nothing."""

    warmed, captured = 0, 0

    def __init__(self, update, parallelism):
        self._update, self._inputs, self._steps, self._device = update, [], 0, parallelism.device
        self.trainer = update.__self__
        self.reset()

    def _run_eagerly(self):
        self.warmed += 1
        return self._update(self._inputs)

    def _capture(self):
        self.captured += 1
        scale, states = self.trainer.loss_scale, self.trainer.optimizer.state.values()
        lasting = [*self.trainer.model.parameters(), *(t for state in states for t in state.values())]
        lasting += [scale.value, scale._good_steps] if scale else []
        before = [t.detach().clone() for t in lasting]
        with Tape() as tape:
            results = torch.stack(self._update(self._inputs))
        with torch.no_grad():
            torch._foreach_copy_(lasting, before)
        return tape.replay, results


@pytest.fixture
def waited(monkeypatch):
    """How often the device was waited for."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    return calls


@pytest.fixture
def graphed(monkeypatch, images):
    """Makes a trainer whose steps are taped; loss scales, eager ones' too, double every three steps."""
    monkeypatch.setattr(loop, "StepGraph", TapedStep)
    monkeypatch.setattr(loop, "LossScale", lambda device: LossScale(device, growth_interval=3))
    return lambda out, **options: make_trainer(out, images, cuda_graph=True, **OPTIONS | options)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "batch_size": 4, "masks_per_image": 2, "clip_grad": 0.5},
        {"precision": "fp16", "activation_checkpointing": "full"},
    ],
    ids=lambda options: options["precision"],
)
def test_steps_are_those_of_eager_and_continue_from_a_checkpoint(tmp_path, images, graphed, waited, options):
    eager = make_trainer(tmp_path / "eager", images, **OPTIONS | options)
    graph = graphed(tmp_path / "graph", **options)
    assert eager.fit() == graph.fit() == "finished"
    assert (graph.step_graph.warmed, graph.step_graph.captured, waited) == (WARM_UP, 1, [])
    assert numbers(graph.run) == numbers(eager.run)
    assert graph.loss_scale is None or graph.loss_scale.value > 2**16
    last = f"checkpoints/step-{STEPS}"
    assert_same_tensors(eager.run.path / last, graph.run.path / last)
    # A graph knows tensors by their place, so it is forgotten and recorded again.
    assert graph.resume(tmp_path / f"graph/checkpoints/step-{STEPS // 2}") == []
    assert len(waited) == 1  # a graph must not be freed while it runs
    graph.fit()
    assert (graph.step_graph.warmed, graph.step_graph.captured) == (2 * WARM_UP, 2)
    assert numbers(graph.run) == numbers(eager.run)
    assert_same_tensors(eager.run.path / last, graph.run.path / last)
    for trainer in (eager, graph):
        trainer.run.close()


def test_a_step_without_a_finite_gradient_is_skipped_in_the_graph(tmp_path, graphed):
    trainer = graphed(tmp_path / "run")
    with trainer.loader_at(trainer.samples) as trainer.loader:
        for _ in range(WARM_UP + 1):
            trainer.train_step()
        with torch.no_grad():
            trainer.model.decoder_pred.bias[0] = float("inf")
        before = [p.clone() for p in trainer.model.parameters()]
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.reporter.values.take()()["skipped"] == [0.0] * (WARM_UP + 1) + [1.0]
    trainer.run.close()


def test_refused_where_there_can_be_none(capsys, tmp_path, images):
    with pytest.raises(ValueError, match=r"cuda_graph: expected none with several processes, .* got one with ddp"):
        StepGraph(max, Parallelism("ddp", 0, 2, device=torch.device("cuda", 0)))
    flags = ["--train.cuda-graph", "--train.device", "cpu"]
    found = mistake(capsys, "pretrain", "--data.path", images, "--out", tmp_path / "run", *flags)
    assert "--train.cuda-graph: expected none without a GPU, got one on cpu" in found
    train = TrainConfig(steps=10, cuda_graph=True)
    validate(PretrainConfig(train=train))
    for config, reason in (
        (PretrainConfig(train=train, data=DataConfig(progressive_sizes=(112, 224))), "--data.progressive-sizes"),
        (PretrainConfig(train=replace(train, optimizer="apex")), "--train.optimizer apex"),
        (
            PretrainConfig(train=replace(train, compile="blocks", compile_mode="reduce-overhead")),
            "--train.compile-mode reduce-overhead",
        ),
    ):
        with pytest.raises(ValueError, match=f"--train.cuda-graph: expected no CUDA graph with {reason}"):
            validate(config)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compile": "blocks"}, {"precision": "fp16", "batch_size": 4}], ids=str)
def test_a_gpu_trains_in_a_graph_as_without(tmp_path, images, options):
    options = {"device": "cuda", "clip_grad": 1.0} | options
    runs = {}
    for graph in (False, True):
        trainer = make_trainer(tmp_path / str(graph), images, cuda_graph=graph, **OPTIONS | options)
        trainer.fit()
        trainer.run.close()
        runs[graph] = [row["loss"] for row in trainer.run.read_metrics()]
        torch.compiler.reset()
    assert runs[True] == pytest.approx(runs[False], rel=1e-3)
