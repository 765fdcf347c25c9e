"""What PyTorch knows of every op: fake results, autograd and schemas are right, and torch.compile makes one graph.

Masking has more forms than are counted, and a test of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton")

from property_cases import INTERPRETED, as_tuple, plain_only
from traffic_cases import OPS, Sizes

from fastmae import ops

pytestmark = pytest.mark.ops

SIZES = Sizes(N=2, side=16, patch=4, D=32, E=16)
# Triton's attention takes CPU tensors in the interpreter alone.
BACKEND = "triton" if INTERPRETED else "plain"
ATTENTION = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, BACKEND), [(2, 3, 2, 16), (2, 5, 2, 16), (2, 5, 2, 16)]),
    "attention_kvpacked": (
        lambda q, kv, bias: ops.attention_kvpacked(q, kv, BACKEND, bias), [(2, 3, 2, 16), (2, 5, 2, 2, 16), (96,)],
    ),
    "attention_qkvpacked": (
        lambda qkv, bias: ops.attention_qkvpacked(qkv, BACKEND, bias), [(2, 5, 3, 2, 16), (96,)],
    ),
    "attention_qkvpacked without bias": (lambda qkv: ops.attention_qkvpacked(qkv, BACKEND), [(2, 5, 3, 2, 16)]),
}  # fmt: skip
DIFFERENTIABLE = [name for name, op in OPS.items() if op.backward and "attention" not in name] + [*ATTENTION]
NAMES = [*DIFFERENTIABLE, "gather_patches"]


def make(name, sizes=SIZES):
    """A function of ops, and its inputs."""
    if name in ATTENTION:
        function, shapes = ATTENTION[name]
        return function, tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    ours, _, inputs = OPS[name].pair(sizes)
    return ours, inputs


class Recorded(TorchDispatchMode):
    """The calls of our ops, with detached arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastmae":
            self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))))
        return func(*args, **kwargs or {})


def outputs_and_gradients(function, inputs):
    outputs, leaves = as_tuple(function(*inputs)), [x for x in inputs if x.requires_grad]
    if not leaves:
        return outputs
    total = sum(out.float().square().sum() for out in outputs)
    return *outputs, *(x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, fused):
    ours, inputs = make(name)
    leaves = {x.data_ptr() for x in inputs if x.requires_grad}
    with Recorded() as recorded:
        outputs_and_gradients(ours, inputs)
    (forward, *of_forward), *backward = recorded.calls
    assert len(backward) == bool(leaves)
    for x in of_forward[0]:
        if isinstance(x, torch.Tensor):
            x.requires_grad_(x.data_ptr() in leaves)
    torch.library.opcheck(forward, *of_forward)
    for call in backward:
        torch.library.opcheck(*call)


@plain_only
@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name, fused):
    ours, inputs = make(name)
    got = outputs_and_gradients(torch.compile(ours, fullgraph=True), inputs)
    torch.testing.assert_close(got, outputs_and_gradients(ours, inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name, fused):
    ours, inputs = make(name)
    leaves = [x for x in inputs if x.requires_grad]
    total = sum(out.float().square().sum() for out in as_tuple(ours(*inputs)))
    gradients = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        sum(x.float().sum() for x in gradients if x is not None).backward()


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if "tokens" in name])
def test_an_empty_batch_has_gradients(name):
    ours, inputs = make(name, SIZES._replace(N=0))
    leaves = [x for x in inputs if x.requires_grad]
    out, *gradients = outputs_and_gradients(ours, inputs)
    assert len(out) == 0
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    assert not any(x.any() for x in gradients)
