"""``torch.compile`` of a model or of its blocks, and what its CUDA graphs require of a training step.

Modes "reduce-overhead" and "max-autotune" replay CUDA graphs, one of the forward and one of the backward. A replay
writes to the addresses of the recording, so it overwrites the results of the replay before:

- the loss is divided outside of the graph, which makes it a separate tensor;
- gradients that a later micro-batch is added to are copied (once per step, with accumulation only): autograd would
  return the graph's own memory as ``.grad``, and the next backward would overwrite it silently;
- every micro-batch marks the beginning of a run, since nothing else tells PyTorch that the results are used up.

A graph also reads from fixed addresses: images, masks and low-precision copies of weights are copied there, at ViT-L
and a batch of 256 about 1.3 GB forward and 1.2 GB backward, a millisecond on an H100.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

_BLOCK_GRAPHS = 64
"""Graphs of a block that the compiler may keep: six per model (first, middle and last block of encoder and decoder
differ) for each image size."""


def uses_cuda_graphs(mode: str) -> bool:
    """Whether a mode of ``torch.compile`` records CUDA graphs."""
    return mode in ("reduce-overhead", "max-autotune")


def check_compile_mode(mode: str, *, device_type: str, sharded: bool) -> None:
    """Refuse CUDA graphs where there can be none.

    Raises:
        ValueError: without CUDA; with shards, since gathered weights have another address each time.
    """
    if not uses_cuda_graphs(mode):
        return
    if device_type != "cuda":
        raise ValueError(f"compile_mode: expected default or max-autotune-no-cudagraphs without CUDA, got {mode}")
    if sharded:
        raise ValueError(
            "compile_mode: expected default or max-autotune-no-cudagraphs with fsdp or hsdp, whose gathered weights "
            f"lie elsewhere each time, got {mode}"
        )


def compile_model(model: nn.Module, mode: str) -> nn.Module:
    """The whole model, compiled for each size of images."""
    model.cuda_graphs = uses_cuda_graphs(mode)
    return torch.compile(model, dynamic=False, mode=mode)


def compile_blocks(model: nn.Module, mode: str) -> None:
    """Compile each block's forward on the instance. A wrapper would change names and take hooks into the graph."""
    model.cuda_graphs, limit = uses_cuda_graphs(mode), {"recompile_limit": _BLOCK_GRAPHS}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        # PyTorch 2.11 has one limit for the whole process: eight, which the blocks pass at the second size of images.
        limit, config = {}, torch.compiler.config
        config.recompile_limit = max(config.recompile_limit, _BLOCK_GRAPHS)
    for block in model.all_blocks:
        compiled = torch.compile(block.forward, dynamic=False, mode=mode, **limit)
        block.forward = _while_training(compiled, block.forward) if model.cuda_graphs else compiled


def _while_training(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled forward while gradients are enabled. Pictures and probes in between do not use the graphs, in whose
    memory the next block would overwrite the results of the one before."""
    return lambda *args, **options: (compiled if torch.is_grad_enabled() else plain)(*args, **options)


@contextmanager
def graphed_batch(model: nn.Module, last: bool, inside: AbstractContextManager[None]) -> Iterator[None]:
    """Context of forward and backward of one of several batches that accumulate into a step, in CUDA graphs.

    Args:
        model: compiled.
        last: whether the optimiser step comes next, and not another batch.
        inside: another context, entered within this one.
    """
    first = all(p.grad is None for p in model.parameters())
    torch.compiler.cudagraph_mark_step_begin()
    with inside:
        yield
    if first and not last:  # the following ones are added to these, which the graph's next run overwrites
        parameters = [p for p in model.parameters() if p.grad is not None]
        copies = torch._foreach_mul([p.grad for p in parameters], 1.0)  # one launch for many
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.grad = copy
