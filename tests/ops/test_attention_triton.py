"""The Triton backend of attention: values, gradients, layouts and limits."""

from __future__ import annotations

import pytest
import torch
from property_cases import assert_as_accurate
from test_attention import formula_kv
from torch import Tensor

from fastmae.ops import _attention_triton as op
from fastmae.ops import _dispatch
from fastmae.ops.attention import attention_kvpacked, attention_qkvpacked

pytest.importorskip("triton")
pytestmark = pytest.mark.ops

INTERPRETED = _dispatch.is_interpreted()
needs_a_kernel = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)
# Where products are interpreted, few and small; the extra key of 2^k + 1 and the last block's fewer queries included.
SIZES = [(1, 1, 1, 1, 4), (2, 17, 17, 2, 16), (1, 50, 50, 2, 64), (1, 20, 33, 3, 20), (1, 40, 129, 1, 32)]


GPU_SIZES = [
    (8, 50, 50, 12, 64), (8, 65, 65, 16, 80), (8, 147, 197, 16, 32), (4, 257, 257, 16, 32), (2, 65, 65, 2, 128),
    (5, 100, 7, 3, 8), (1, 1, 1, 1, 16),
]  # fmt: skip


def run(function, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The output, then the inputs' gradients."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def tensors(n, queries, keys, heads, dim, dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (n, queries, heads, dim), (n, keys, 2, heads, dim), (n, queries, heads, dim)
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


@needs_a_kernel
@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((s, torch.float16) for s in SIZES), (SIZES[1], torch.float32), (SIZES[3], torch.float32)],
)
def test_agrees(size, dtype, device):
    q, kv, grad = tensors(*size, dtype, device)
    bias = torch.randn(3 * q[0, 0].numel(), device=device).to(dtype)
    with_bias = lambda q, kv, bias: attention_kvpacked(q, kv, "triton", bias)  # noqa: E731
    inputs = tuple(x.clone().requires_grad_() for x in (q, kv, bias))
    assert_as_accurate(with_bias, formula_kv, inputs, floor=1.0)
    without = run(lambda q, kv: attention_kvpacked(q, kv, "triton"), (q, kv), grad)
    *same, bias_gradient = run(with_bias, (q, kv, bias), grad)
    assert all(map(torch.equal, without, same))
    assert not bias_gradient.chunk(3)[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", GPU_SIZES, ids=lambda s: "x".join(map(str, s)))
def test_gpu_agrees(size, dtype):
    if op.unfit(dtype, size[2], size[4]) is not None:
        pytest.skip("too many keys in this dtype")
    q, kv, _ = tensors(*size, dtype, "cuda")
    bias = torch.zeros(3 * q[0, 0].numel(), device="cuda", dtype=dtype)
    inputs = tuple(x.requires_grad_() for x in (q, kv, bias))
    assert_as_accurate(lambda q, kv, bias: attention_kvpacked(q, kv, "triton", bias), formula_kv, inputs, floor=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "dim"), [(50, 64), (197, 32), (257, 32)])
def test_gpu_gradients_repeat_bit_by_bit(length, dim):
    qkv = torch.randn(8, length, 3, 4, dim, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(8, length, 4, dim, device="cuda", dtype=torch.bfloat16)
    inputs = qkv, torch.zeros(3 * 4 * dim, device="cuda")
    first, *others = (run(lambda x, b: attention_qkvpacked(x, "triton", b), inputs, grad) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_a_kernel
def test_any_tile_gives_the_same(device):
    queries, keys = 17, 33
    q, kv, grad = tensors(1, queries, keys, 1, 16, torch.float16, device)
    k, v = kv.unbind(2)
    tiles = op.forward_tiles(queries, keys, 2)
    assert tiles[0] == op.forward_tile(queries, keys, 2)
    assert {t.queries for t in tiles} >= {16, 32}
    (out, lse), *others = (op.forward(q, k, v, tile) for tile in tiles)
    for other in others:
        torch.testing.assert_close(other, (out, lse))
    gradients = []
    for tile in op.backward_tiles(queries, keys, 16, 2):
        gradients.append([torch.full_like(x, torch.nan) for x in (q, k, v)])
        op.backward(grad, lse, q, k, v, *gradients[-1], tile)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-2, atol=1e-3)


@needs_a_kernel
def test_large_scores_do_not_overflow(device):
    q, kv, grad = tensors(1, 5, 20, 1, 16, torch.float32, device)
    out, dq, dkv = run(lambda q, kv: attention_kvpacked(q, kv, "triton"), (q * 1e3, kv * 1e3), grad)
    assert out.isfinite().all()
    assert dq.isfinite().all()
    assert dkv.isfinite().all()


@needs_a_kernel
def test_compiles_to_one_graph(device):
    function = lambda x, b: attention_qkvpacked(x * 2, "triton", b)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = tuple(torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 5, 3, 2, 16), (96,)))
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, want)


@needs_a_kernel
def test_empty_batch(device):
    qkv = torch.randn(0, 5, 3, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(96, device=device, requires_grad=True)
    attention_qkvpacked(qkv, "triton", bias).sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert not bias.grad.any()


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((1, 5, 3, 1, 16), torch.float64, "float64"),
        ((1, 258, 3, 1, 32), torch.float16, "up to 257 of 32 channels, not 258"),
        ((1, 130, 3, 1, 64), torch.bfloat16, "up to 129 of 64 channels, not 130"),
        ((1, 257, 3, 1, 32), torch.float32, "up to 256 of 32 channels, not 257"),
        ((1, 5, 3, 1, 136), torch.bfloat16, "1 to 128 channels in bfloat16, not 136"),
        ((1, 5, 3, 1, 80), torch.float32, "1 to 64 channels in float32, not 80"),
    ],
)
def test_what_does_not_fit_is_refused_never_replaced(shape, dtype, why, device):
    qkv = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=f"backend: 'triton' .*{why}"):
        attention_qkvpacked(qkv, "triton")
    assert attention_qkvpacked(qkv, "auto").shape == (1, shape[1], 1, shape[4])


@pytest.mark.skipif(INTERPRETED, reason="runs on the CPU in this process")
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot be used here.* cpu tensors"):
        attention_qkvpacked(torch.zeros(1, 5, 3, 1, 16), "triton")


@pytest.mark.skipif(not INTERPRETED, reason="a fault of the interpreter")
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(ValueError, match="its bfloat16 dot is wrong"):
        attention_qkvpacked(torch.zeros(1, 5, 3, 1, 16, dtype=torch.bfloat16), "triton")


def test_saved_for_the_backward_are_the_inputs_and_one_number_a_query():
    shapes = []
    qkv = torch.zeros(2, 5, 3, 2, 16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        op.triton_attention_qkvpacked(qkv, torch.zeros(96, device="meta", requires_grad=True))
    assert sorted(shapes) == [(2, 2, 5), (2, 5, 3, 2, 16)]
