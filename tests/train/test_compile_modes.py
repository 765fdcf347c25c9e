"""Modes of torch.compile: refused where there can be no CUDA graphs; on a GPU each trains as eager does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from commands import mistake
from torch import nn
from training import fitted, make_trainer, write_images

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking
from fastmae.train import compilation, parallel
from fastmae.train.config import PretrainConfig, TrainConfig
from fastmae.train.parallel import Parallelism
from fastmae.train.rules import MAX_COMPILED_SIZES, validate

GRAPHS, NO_GRAPHS = ("reduce-overhead", "max-autotune"), ("default", "max-autotune-no-cudagraphs")
SMALL = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("mode", [*GRAPHS, *NO_GRAPHS])
def test_cuda_graphs_are_refused_without_cuda_and_with_shards(mode):
    compilation.check_compile_mode(mode, device_type="cuda", sharded=False)
    for device_type, sharded, reason in (("cpu", False, "without CUDA"), ("cuda", True, "fsdp or hsdp")):
        if mode in NO_GRAPHS:
            compilation.check_compile_mode(mode, device_type=device_type, sharded=sharded)
        else:
            with pytest.raises(ValueError, match=f"compile_mode: .* {reason}.* got {mode}"):
                compilation.check_compile_mode(mode, device_type=device_type, sharded=sharded)


def test_a_mode_that_does_not_fit_the_run_names_the_flag(capsys, tmp_path, images):
    flags = ["--train.compile", "blocks", "--train.compile-mode", "reduce-overhead", "--train.device", "cpu"]
    found = mistake(capsys, "pretrain", "--data.path", images, "--out", tmp_path / "run", *flags)
    assert "--train.compile-mode: expected default or max-autotune-no-cudagraphs without CUDA" in found
    config = PretrainConfig(train=TrainConfig(steps=10, compile_mode="max-autotune"))
    with pytest.raises(ValueError, match=r"--train\.compile-mode: expected default without --train\.compile"):
        validate(config)
    validate(replace(config, train=replace(config.train, compile="blocks")))


@pytest.fixture
def compiled(monkeypatch) -> SimpleNamespace:
    """What torch.compile is asked for, and how often compiled functions are called; nothing is compiled."""
    seen = SimpleNamespace(targets=[], modes=[], limits=[], runs=0)

    def compiles(target, *, dynamic, mode, recompile_limit=8):
        def run(*args, **options):
            seen.runs += 1
            return target(*args, **options)

        seen.targets.append(getattr(target, "__func__", target))
        seen.modes.append(mode)
        seen.limits.append(recompile_limit)
        return target if isinstance(target, nn.Module) else run

    monkeypatch.setattr(torch, "compile", compiles)
    return seen


@pytest.fixture
def model() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**SMALL, seed=0)


@pytest.mark.parametrize("what", ["none", "blocks", "model"])
def test_what_is_asked_for_is_compiled_in_its_mode(compiled, model, what):
    mode = {} if what == "none" else {"compile_mode": "max-autotune-no-cudagraphs"}
    blocks = [block.forward.__func__ for block in (*model.blocks, *model.decoder_blocks)]
    parallel.parallelize(model, Parallelism(), TrainConfig(compile=what, **mode))
    assert compiled.targets == {"none": [], "blocks": blocks, "model": [model]}[what]
    assert set(compiled.modes) <= {"max-autotune-no-cudagraphs"}


def test_blocks_may_have_graphs_for_eight_sizes(compiled, model, monkeypatch):
    with torch.compiler.config.patch(recompile_limit=8):
        compilation.compile_blocks(model, "default")
        assert min(compiled.limits) >= 6 * MAX_COMPILED_SIZES
        assert torch.compiler.config.recompile_limit == 8
        # PyTorch 2.11 has one limit for the whole process.
        monkeypatch.setattr(torch, "compile", lambda target, *, dynamic, mode: target)
        compilation.compile_blocks(model, "default")
        assert torch.compiler.config.recompile_limit >= 6 * MAX_COMPILED_SIZES


def test_blocks_run_in_graphs_only_while_they_train(compiled, model):
    compilation.compile_blocks(model, "reduce-overhead")
    masking = random_masking(2, model.num_patches, 0.75, seed=0)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with torch.no_grad():
        model(pixels, masking=masking)
    assert compiled.runs == 0
    model(pixels, masking=masking).loss.backward()
    assert compiled.runs == 4


class Graphed(nn.Module):
    """A backward that writes gradients where it wrote them before, as that of a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.weight, self.cuda_graphs = nn.Parameter(torch.zeros(3)), True
        self.memory = torch.zeros(3)

    def backward(self, value: float) -> None:
        stolen = self.weight.grad
        self.memory.fill_(value)
        self.weight.grad = self.memory if stolen is None else stolen.add_(self.memory)


def test_accumulated_gradients_survive_the_next_run_of_a_graph_and_every_batch_begins_one(monkeypatch):
    model, marks = Graphed(), []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    for batches in (1, 2, 2, 4):
        marks.clear()
        for index in range(batches):
            with parallel.no_sync(model, last=index == batches - 1):
                model.backward(index + 1.0)
        assert model.weight.grad.tolist() == [sum(range(1, batches + 1))] * 3
        assert len(marks) == batches
        model.weight.grad = None
    model.cuda_graphs = False
    with parallel.no_sync(model, last=True):
        pass
    assert len(marks) == batches


def losses(out, images, accumulation, resumes=False, **train) -> list[float]:
    options = {"device": "cuda", "precision": "bf16", "steps": 20, "log_every_steps": 1, "base_lr": 0.01}
    options |= {"batch_size": 8 // accumulation, "checkpoint_every_steps": 10} | train
    trainer = fitted(out, images, **options)
    if resumes:
        trainer = make_trainer(out, images, resume=True, **options)
        trainer.resume(out / "checkpoints" / "step-10")
        with trainer.run:
            trainer.fit()
    torch.compiler.reset()
    return [row["loss"] for row in trainer.run.read_metrics()]


@pytest.fixture(scope="module")
def eager(tmp_path_factory, images):
    return cache(lambda accumulation: losses(tmp_path_factory.mktemp("eager") / "run", images, accumulation))


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["blocks", "model"])
@pytest.mark.parametrize(
    ("mode", "accumulation"), [*((m, 1) for m in NO_GRAPHS), *((m, a) for m in GRAPHS for a in (1, 2))]
)
def test_every_mode_trains_as_eager_does(tmp_path, images, eager, what, mode, accumulation):
    found = losses(tmp_path / "run", images, accumulation, compile=what, compile_mode=mode)
    assert len(found) == 20
    assert found[-1] < found[0]
    assert found == pytest.approx(eager(accumulation), rel=2e-2)
    assert found[:3] == pytest.approx(eager(accumulation)[:3], rel=5e-3)


BLOCKS = {"compile": "blocks", "compile_mode": "reduce-overhead"}


@pytest.mark.gpu
def test_graphs_of_blocks_train_as_eager_does_with_ddp(tmp_path, images, eager):
    place = parallel.initialize("ddp", "cuda")
    try:
        found = losses(tmp_path / "run", images, 2, place=place, parallel="ddp", **BLOCKS)
    finally:
        parallel.shutdown(place)
    assert found == pytest.approx(eager(2), rel=2e-2)


@pytest.mark.gpu
def test_a_run_in_graphs_goes_on_after_a_resume(tmp_path, images):
    whole, resumed = (losses(tmp_path / str(resumes), images, 2, resumes, **BLOCKS) for resumes in (False, True))
    assert resumed == pytest.approx(whole, rel=1e-2)
