"""The whole optimiser step as one CUDA graph: forward, backward, clipping and update are a single launch.

A replay repeats the captured kernels on the memory that they were captured with, so whatever changes from step to step
has to be written to a fixed address: images and masks are copied to buffers, the learning rate is a tensor that is
filled before the step, the loss scale is updated in place. Gradients, copies of weights and activations live inside the
graph. What a step returns is copied out, since the next replay overwrites it.

Kernels have to be compiled, workspaces allocated and the optimiser's state created before the capture, so the first
steps run eagerly, on the stream of the capture. A capture computes nothing: no step is taken twice or skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fastmae.train.parallel import Parallelism

Inputs = tuple[Any, ...]
"""Images and masks of one forward pass."""

WARM_UP = 3
"""Eager steps before the capture, as many as PyTorch's documentation of whole-network capture takes."""


class StepGraph:
    """Runs ``update`` for a few steps, then captures it, and replays it from then on.

    Args:
        update: from the inputs of each forward pass to scalars: loss, gradient norm, whether the step was skipped. It
            must not read the device, leave gradients, or use Python values that change.

    Raises:
        ValueError: without a GPU, or with several processes.
    """

    def __init__(self, update: Callable[[Iterable[Inputs]], tuple[Tensor, ...]], parallelism: Parallelism) -> None:
        self._update, self._inputs, self._device, self._steps = update, [], parallelism.device, 0
        if self._device.type != "cuda":
            raise ValueError(f"cuda_graph: expected none without a GPU, got one on {self._device.type}")
        if parallelism.mode != "none":
            raise ValueError(
                "cuda_graph: expected none with several processes, whose collectives are not captured, got one with "
                f"{parallelism.mode}"
            )
        self._stream = torch.cuda.Stream(self._device)
        self.reset()

    def __call__(self, inputs: Iterable[Inputs]) -> tuple[Tensor, ...]:
        """What ``update(inputs)`` returns; inputs have the shapes of the first time."""
        inputs = list(inputs)
        if not self._inputs:
            self._inputs = deepcopy(inputs)
        torch._foreach_copy_(_tensors(self._inputs), _tensors(inputs))
        self._steps += 1
        if self._steps <= WARM_UP:
            return self._run_eagerly()
        if self._replay is None:
            self._replay, self._results = self._capture()
        self._replay()
        return self._results.clone().unbind()

    def reset(self) -> None:
        """Forget the graph: the optimiser's state is about to be replaced, and a graph knows tensors by address."""
        if self._steps > WARM_UP:
            torch.cuda.synchronize(self._device)  # a graph must not be freed while it runs
        self._replay, self._results, self._steps = None, torch.empty(0), 0

    def _run_eagerly(self) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self._update(self._inputs)
        current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)
        return results

    def _capture(self) -> tuple[Callable[[], None], Tensor]:
        """A function that takes the step on the current stream, and the tensor that each run writes."""
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on allocating pinned memory and querying events, which "global" would forbid them.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            results = torch.stack(self._update(self._inputs))
        return graph.replay, results


def _tensors(inputs: list[Inputs]) -> list[Tensor]:
    """Those of each input, which is a tensor, a tuple of tensors such as ``Masking``, or None."""
    parts = (part if isinstance(part, tuple) else (part,) for one in inputs for part in one)
    return [tensor for part in parts for tensor in part if tensor is not None]
