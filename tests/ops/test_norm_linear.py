"""norm_linear against add, LayerNorm and product in float64, as an op of kernels and as PyTorch's composition."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from property_cases import assert_as_accurate, plain_only

from fastmae.ops import norm_linear

pytestmark = pytest.mark.ops

op = import_module("fastmae.ops.norm_linear")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
NAMES = ("x", "branch", "branch_bias", "norm_weight", "norm_bias", "weight", "bias")


def plain(x, branch, branch_bias, norm_weight, norm_bias, weight, bias):
    x = x if branch is None else x + branch
    x = x if branch_bias is None else x + branch_bias
    normed = F.layer_norm(x.to(norm_weight.dtype), x.shape[-1:], norm_weight, norm_bias, 1e-6).to(weight.dtype)
    return x, F.linear(normed, weight, bias)


def make(shape, width, stream=F32, compute=F32, device="cpu"):
    """The arguments by name: stream and norm in one dtype, branch and product in the other."""
    sizes = {"x": shape, "branch": shape, "branch_bias": shape[-1:], "norm_weight": shape[-1:], "norm_bias": shape[-1:]}
    sizes |= {"weight": (width, shape[-1]), "bias": (width,)}
    values = {name: torch.randn(size, device=device) + 0.3 for name, size in sizes.items()}
    values["weight"] *= shape[-1] ** -0.5
    dtypes = {name: compute if name in ("branch", "weight", "bias") else stream for name in NAMES}
    return {name: value.to(dtypes[name]).requires_grad_() for name, value in values.items()}


@plain_only
def test_float64_to_the_last_digits(route):
    arguments = make((4, 12), 6, F64, F64)
    function = lambda *values: norm_linear(*values)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(arguments.values()), nondet_tol=0.0)


def test_autocast_decides_the_compute_dtype(device, route):
    arguments = make((2, 5, 32), 16, device=device) | {"branch": torch.randn(2, 5, 32, device=device).to(BF16)}
    with torch.autocast(device.type, BF16):
        x_new, out = norm_linear(**arguments)
        expected = plain(**arguments)
    assert (x_new.dtype, out.dtype) == (F32, BF16)
    torch.testing.assert_close(x_new, expected[0])
    torch.testing.assert_close(out, expected[1], rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert arguments["weight"].grad.dtype == F32


def test_copies_of_weight_and_bias_are_used(device, fused):
    arguments = make((2, 5, 32), 16, device=device)
    copies = {name: (2 * arguments[name].detach()).to(BF16) for name in ("weight", "bias")}
    with torch.autocast(device.type, BF16):
        _, out = norm_linear(**arguments, **{f"{name}_cast": copy for name, copy in copies.items()})
        _, expected = norm_linear(**arguments | copies)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(arguments[name].grad.dtype == F32 for name in copies)


def test_only_the_stream_is_saved(device, fused):
    arguments, saved = make((4, 16, 64), 256, F32, BF16, device=device), {}
    parameters = {v.untyped_storage().data_ptr() for k, v in arguments.items() if k not in ("x", "branch")}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm_linear(**arguments)
    assert sum(size for where, size in saved.items() if where not in parameters) == 4 * 16 * (64 * 4 + 2 * 4)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_is_enough(device, route, used):
    arguments = make((2, 5, 32), 16, device=device)
    want = torch.autograd.grad(plain(**arguments)[used].sum(), list(arguments.values()), allow_unused=True)
    got = torch.autograd.grad(norm_linear(**arguments)[used].sum(), list(arguments.values()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_long_column_sums_are_repeatable(device, fused):
    inputs = tuple(make((300, 16), 8, device=device).values())
    first, second = (torch.autograd.grad([o.sum() for o in norm_linear(*inputs)], inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_opcheck_without_a_branch(device):
    a = make((3, 32), 16, F32, BF16, device=device)
    norm = (a["norm_weight"], a["norm_bias"], a["weight"], a["bias"], None, None, 1e-6, BF16)
    torch.library.opcheck(op._norm_linear, (a["x"], *norm))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(8, dtype=torch.int64)), ("x", torch.zeros(8)), ("branch", torch.zeros(2, 9)),
        ("branch", torch.zeros(2, 8, dtype=torch.int64)), ("branch_bias", torch.zeros(9)),
        ("norm_weight", torch.zeros(7)), ("norm_bias", torch.zeros(8, 1)), ("weight", torch.zeros(4, 9)),
        ("weight", torch.zeros(8)), ("bias", torch.zeros(5)), ("eps", -1.0), ("weight_cast", torch.zeros(4, 9)),
        ("bias_cast", torch.zeros(5)),
        ("branch", None),
    ],
)  # fmt: skip
def test_bad_arguments(name, value):
    arguments = {k: v.detach() for k, v in make((2, 8), 4).items()}
    norm_linear(**arguments)
    with pytest.raises(ValueError, match="branch_bias" if value is None else name):
        norm_linear(**arguments | {name: value})


@pytest.mark.gpu
@pytest.mark.parametrize(("stream", "compute"), [(F32, F32), (F32, BF16), (BF16, BF16), (F32, F16)])
@pytest.mark.parametrize(("shape", "width"), [((64, 50, 768), 2304), ((16, 197, 512), 2048), ((8, 65, 1280), 640)])
def test_gpu_agrees(shape, width, stream, compute):
    inputs = tuple(make(shape, width, stream, compute, device="cuda").values())
    assert_as_accurate(norm_linear, plain, inputs, tiny=1e-3)
