"""gelu_linear against bias, GELU and product in float64, as an op of kernels and as PyTorch's composition."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from property_cases import as_tuple, compare, plain_only

from fastmae.ops import _dispatch, gelu_linear

pytestmark = pytest.mark.ops

op = import_module("fastmae.ops.gelu_linear")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def plain(h, bias, weight, out_bias):
    return F.linear(F.gelu(h if bias is None else h + bias), weight, out_bias)


def make(shape, width, dtype=F32, absent=(), device="cpu"):
    sizes = {"h": shape, "bias": shape[-1:], "weight": (width, shape[-1]), "out_bias": (width,)}
    values = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    values["h"] *= 3  # into the tails, where GELU is nearly 0 or nearly the identity
    values["weight"] *= shape[-1] ** -0.5
    made = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    return {name: None if name in absent else value for name, value in made.items()}


def assert_as_accurate(arguments, tiny=1e-5):
    """The results and each gradient at most twice as far from float64 as plain PyTorch at the same precision."""
    inputs = tuple(arguments.values())
    grads = [torch.randn_like(out) for out in as_tuple(plain(*inputs))]
    compare(gelu_linear, plain, inputs, grads, tiny)


@pytest.mark.parametrize(
    ("shape", "width", "absent"),
    [
        ((2, 5, 64), 16, ()),
        ((37, 130), 8, ("bias",)),
        ((1, 3, 7), 5, ("out_bias",)),
        ((1, 3, 7), 5, ("bias", "out_bias")),
    ],
    ids=str,
)
def test_agrees(device, route, shape, width, absent):
    assert_as_accurate(make(shape, width, absent=absent, device=device))


@plain_only
def test_float64_to_the_last_digits(route):
    arguments = make((4, 12), 6, F64)
    assert torch.autograd.gradcheck(gelu_linear, tuple(arguments.values()), nondet_tol=0.0)


def test_it_is_the_exact_gelu(device, route):
    """The tanh approximation is off by up to 5e-4."""
    h = torch.linspace(-6, 6, 4001, device=device)[:, None]
    out = gelu_linear(h, None, torch.ones(1, 1, device=device)).double()
    wide = h.double()
    torch.testing.assert_close(out, wide * 0.5 * (1 + torch.erf(wide * 0.5**0.5)), rtol=0, atol=2e-6)


@pytest.mark.skipif(not (torch.cuda.is_available() or _dispatch.is_interpreted()), reason="needs the kernel")
def test_the_lower_tail_keeps_its_digits(device):
    """Down to 1e-14, where ``1 + erf`` has none left in float32."""
    h = torch.linspace(-8, 0, 4001, device=device)[:, None]
    out, wide = gelu_linear(h, None, torch.ones(1, 1, device=device)).double(), h.double()
    torch.testing.assert_close(out, 0.5 * wide * torch.erfc(-wide * 0.5**0.5), rtol=1e-5, atol=0)


def test_autocast_decides_the_compute_dtype(device, route):
    arguments = make((2, 5, 32), 16, device=device) | {"h": torch.randn(2, 5, 32, device=device).to(BF16)}
    with torch.autocast(device.type, BF16):
        out, expected = gelu_linear(**arguments), plain(**arguments)
    assert out.dtype == BF16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=3e-2)
    out.sum().backward()
    assert arguments["weight"].grad.dtype == arguments["bias"].grad.dtype == F32


def test_a_copy_of_the_weight_is_used(device, fused):
    arguments = make((2, 5, 32), 16, device=device)
    copy = (2 * arguments["weight"].detach()).to(BF16)
    with torch.autocast(device.type, BF16):
        out = gelu_linear(**arguments, weight_cast=copy)
        expected = gelu_linear(**arguments | {"weight": copy})
    assert torch.equal(out, expected)
    out.sum().backward()
    assert arguments["weight"].grad.dtype == F32


def test_only_the_input_is_saved(device, fused):
    arguments, saved = make((4, 16, 64), 256, BF16, device=device), set()

    def keep(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gelu_linear(**arguments)
    assert saved <= {value.untyped_storage().data_ptr() for value in arguments.values()}


def test_opcheck(device):
    a = make((3, 32), 16, BF16, device=device)
    torch.library.opcheck(op._gelu_linear, (a["h"], a["bias"], a["weight"], a["out_bias"], None, BF16))
    torch.library.opcheck(op._gelu_linear, (a["h"], None, a["weight"], None, None, BF16))
    grad, h, weight = torch.randn(3, 16, device=device).to(BF16), a["h"].detach(), a["weight"].detach()
    torch.library.opcheck(op._gelu_linear_backward, (grad, h, a["bias"].detach(), weight, F32, F32))
    torch.library.opcheck(op._gelu_linear_backward, (grad, h, None, weight, F32, None))


@plain_only
def test_compiles_whole(device, route):
    arguments = make((2, 5, 32), 16, device=device)
    function = torch.compile(lambda **a: gelu_linear(**a).square().sum(), fullgraph=True)
    got = torch.autograd.grad(function(**arguments), list(arguments.values()))
    want = torch.autograd.grad(plain(**arguments).square().sum(), list(arguments.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("h", torch.zeros(2, 8, dtype=torch.int64)), ("h", torch.zeros(8)), ("bias", torch.zeros(9)),
        ("bias", torch.zeros(8, 1)), ("weight", torch.zeros(4, 9)), ("out_bias", torch.zeros(5)),
        ("weight_cast", torch.zeros(4, 9)),
    ],
)  # fmt: skip
def test_bad_arguments(name, value):
    arguments = {k: v.detach() for k, v in make((2, 8), 4).items()}
    gelu_linear(**arguments)
    with pytest.raises(ValueError, match=name):
        gelu_linear(**arguments | {name: value})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("shape", "width"), [((64, 50, 3072), 768), ((16, 197, 2048), 512), ((8, 65, 1280), 640)])
def test_gpu_agrees(shape, width, dtype):
    assert_as_accurate(make(shape, width, dtype, device="cuda"), tiny=1e-3)
