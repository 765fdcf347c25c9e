"""What PyTorch knows of every op: fake results, autograd and schemas are right, and torch.compile makes one graph.

Masking has more forms than are counted, and a test of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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


SOME = ["gather_patches", "gather_tokens", "restore_tokens", "masked_patch_mse", "norm_linear", "attention"]


def of_batch(name, n):
    """Plain tensors for a batch of n."""
    if name == "attention":
        return ATTENTION[name][0], tuple(torch.randn(n, *shape[1:]) for shape in ATTENTION[name][1])
    function, inputs = make(name, SIZES._replace(N=n))
    return function, tuple(x.detach() for x in inputs)


def batched(name):
    """Which inputs have a row per sample."""
    return [len(x) != len(y) for x, y in zip(of_batch(name, 3)[1], of_batch(name, 5)[1], strict=True)]


@plain_only
@pytest.mark.parametrize("name", SOME)
def test_one_graph_serves_all_batch_sizes(name, fused):
    counter = CompileCounter()
    function = of_batch(name, 3)[0]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in (3, 5, 8, 13):
        inputs = of_batch(name, n)[1]
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert counter.frame_count <= 2  # of the first size, and of any


@plain_only
@pytest.mark.parametrize("name", SOME)
def test_exports_with_any_batch_size(name, fused):
    function, inputs = of_batch(name, 3)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} if own else None for own in batched(name))
    program = torch.export.export(Module(), inputs, dynamic_shapes=(shapes,))
    inputs = of_batch(name, 7)[1]
    torch.testing.assert_close(program.module()(*inputs), function(*inputs))


@plain_only
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", SOME)
def test_vmap_is_a_loop(name, fused):
    function, one = of_batch(name, 2)
    other = of_batch(name, 2)[1]
    pairs = zip(batched(name), one, other, strict=True)
    stacked = tuple(torch.stack([x, y]) if own else x for own, x, y in pairs)
    dims = tuple(0 if own else None for own in batched(name))
    got = torch.func.vmap(function, dims)(*stacked)
    for i, inputs in enumerate((one, other)):
        inputs = tuple(x if own else y for own, x, y in zip(batched(name), inputs, one, strict=True))
        want = as_tuple(function(*inputs))
        torch.testing.assert_close(tuple(x[i] for x in as_tuple(got)), want, rtol=1e-4, atol=1e-5)


@plain_only
def test_distributed_tensors_are_refused_by_name():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tokens, ids = torch.randn(2, 4, 8), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(NotImplementedError, match=r"fastmae.gather_tokens.* sharding strategy"):
            ops.gather_tokens(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (tokens, ids)))
    finally:
        torch.distributed.destroy_process_group()


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
