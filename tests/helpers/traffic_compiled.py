"""What torch.compile would move: the schedule that Inductor makes for its Triton code, stopped before any code is made.

Runs without a GPU: the graphs are traced on the CPU and scheduled by Inductor's rules for Triton
(``config.cpu_backend = "triton"``), and the graphs themselves are then run eagerly. Bytes are Inductor's own count of
the distinct buffers that each scheduled kernel reads and writes. A lower bound: Inductor's kernels for long rows read
their input once for each pass over it, and on a GPU it splits reductions to a scalar into two launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Scheduled(NamedTuple):
    """One graph: forward or backward."""

    bytes: int
    launches: int


def compiled_traffic(function: Callable[..., Tensor], *args: Tensor) -> list[Scheduled]:
    """The schedules of ``function(*args)``, and of its backward where an argument requires a gradient."""
    from torch._inductor import compile_fx, config

    found: list[Scheduled] = []

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=_scheduler_into(found))

    torch._dynamo.reset()
    with config.patch(cpu_backend="triton"):
        out = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
        outs: Sequence[Tensor] = out if isinstance(out, tuple | list) else (out,)
        outs = [o for o in outs if o.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    torch._dynamo.reset()
    return found


def _scheduler_into(found: list[Scheduled]) -> Callable:
    from functorch.compile import make_boxed_func
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import record_original_output_strides, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    def schedule(graph_module, example_inputs, is_backward=False, is_inference=False, **_):
        record_original_output_strides(graph_module)
        view_to_reshape(graph_module)
        with V.set_fake_mode(detect_fake_mode(example_inputs)), V.set_debug_handler(DebugContext()):
            post_grad_passes(graph_module, is_inference)
            graph = GraphLowering(
                graph_module, example_inputs=example_inputs, is_backward=is_backward, is_inference=is_inference
            )
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*example_inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                moved, _, _ = graph.count_bytes()
                kernels = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
                found.append(Scheduled(int(moved), len(kernels)))
        return make_boxed_func(graph_module.forward)

    return schedule
