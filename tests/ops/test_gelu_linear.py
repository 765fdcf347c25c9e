"""gelu_linear against bias, GELU and product in float64, as an op of kernels and as PyTorch's composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from property_cases import assert_as_accurate, plain_only

from fastmae.ops import _dispatch, gelu_linear

pytestmark = pytest.mark.ops

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def plain(h, bias, weight, out_bias):
    return F.linear(F.gelu(h if bias is None else h + bias), weight, out_bias)


def make(shape, width, dtype=F32, device="cpu"):
    sizes = {"h": shape, "bias": shape[-1:], "weight": (width, shape[-1]), "out_bias": (width,)}
    values = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    values["h"] *= 3  # into the tails, where GELU is nearly 0 or nearly the identity
    values["weight"] *= shape[-1] ** -0.5
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


@plain_only
def test_float64_to_the_last_digits(route):
    arguments = make((4, 12), 6, F64)
    assert torch.autograd.gradcheck(gelu_linear, tuple(arguments.values()), nondet_tol=0.0)


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
    inputs = tuple(make(shape, width, dtype, device="cuda").values())
    assert_as_accurate(gelu_linear, plain, inputs, tiny=1e-3)
