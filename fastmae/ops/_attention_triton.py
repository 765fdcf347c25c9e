"""The Triton backend of attention: launches, autograd and limits of the kernels for short sequences.

Saved for the backward are the inputs and one fp32 number a query. The packed forms read queries, keys and values by
strides where the projection left them, and write their gradient as one tensor of the same layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.ops._attention_autograd import differentiate
from fastmae.ops._dispatch import is_interpreted, load_kernels, takes_triton

_kernels = load_kernels("attention")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unfit(dtype: torch.dtype, num_keys: int, head_dim: int) -> str | None:
    """Why the kernels cannot take such tensors, or None where they can."""
    if dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    wide = 64 if dtype == torch.float32 else 128
    if not 1 <= head_dim <= wide:
        return f"takes heads of 1 to {wide} channels in {str(dtype).removeprefix('torch.')}, not {head_dim}"
    # Only compared, so that a symbolic number of keys is not turned into a constant.
    limit = max_keys(head_dim, dtype.itemsize)
    if num_keys < 1 or num_keys > limit:
        return f"keeps a head's keys in one tile: up to {limit} of {head_dim} channels, not {num_keys}"
    return None


def max_keys(head_dim: int, itemsize: int) -> int:
    """256 of up to 32 channels, 128 of 64, 64 of 128; and one more where it does not take a larger tile."""
    return min(256, 256 * 32 // _power_of_two(head_dim)) + (itemsize == 2)


def is_installed() -> bool:
    """Whether Triton is there; not whether a GPU is."""
    return _kernels is not None


def status() -> str:
    """One line: whether the kernels can be used here, and if not, why."""
    if _kernels is None:
        return "Triton is not installed"
    if is_interpreted():
        return "in Triton's interpreter, float16 and float32"
    return "available" if torch.cuda.is_available() else "available on GPUs; there is none"


def refuse_unless_here(x: Tensor) -> None:
    """Raise ``ValueError`` where the kernels cannot run on this tensor's device."""
    if not takes_triton(x, _kernels):
        why = "Triton is not installed" if _kernels is None else f"its kernels do not run on {x.device.type} tensors"
        raise ValueError(f"backend: 'triton' cannot be used here: {why}")
    if x.dtype == torch.bfloat16 and is_interpreted():
        raise ValueError(
            "backend: 'triton' in Triton's interpreter takes float16 or float32: its bfloat16 dot is wrong"
        )


class Tile(NamedTuple):
    """Block shapes of a launch.

    Attributes:
        queries: handled at a time.
        keys: all of them, rounded up to a power of two.
        extra: whether one key is left over.
        warps: of the program.
    """

    queries: int
    keys: int
    extra: bool
    warps: int


def forward_tile(num_queries: int, num_keys: int, itemsize: int) -> Tile:
    """As many queries as the registers have room for scores, but half as many where most of the last would idle."""
    keys, extra = _key_tile(num_keys, itemsize)
    queries, warps = (128, 8) if keys > 64 else (64, 4)
    if itemsize == 4:
        queries, warps = 16, 8
    elif -num_queries % queries >= queries // 2:
        # 65 queries as three blocks of 32, 257 as five of 64.
        queries //= 2
    if _is_rocm():
        # More would fit, but takes LLVM a minute to compile.
        queries, warps = min(queries, 256 * 32 // keys, 64), 4
    return Tile(min(queries, _power_of_two(num_queries)), keys, extra, warps)


def backward_tile(num_queries: int, num_keys: int, head_dim: int, itemsize: int) -> Tile:
    """Few queries at a time, since the gradients of all keys and values stay in the registers."""
    keys, extra = _key_tile(num_keys, itemsize)
    width = _power_of_two(head_dim)
    queries = 16 if width == 128 or (width == 64 and extra and keys > 64) or itemsize == 4 else 32
    warps = 4 if keys * width <= 64 * 64 and itemsize == 2 else 8
    if _is_rocm():
        # A thread of four wavefronts may have 512 registers, of eight only 256.
        warps = 4
    return Tile(min(queries, _power_of_two(num_queries)), keys, extra, warps)


def _key_tile(num_keys: int, itemsize: int) -> tuple[int, bool]:
    """The tile for all keys, and whether one is left over: of 2^k patches and a class token."""
    extra = itemsize == 2 and num_keys in (17, 33, 65, 129, 257)
    return (num_keys - 1 if extra else _power_of_two(num_keys)), extra


def _is_rocm() -> bool:
    return torch.version.hip is not None


def _power_of_two(size: int) -> int:
    """The next one, at least 16: the least that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    refuse_unless_here(q)
    n, queries, heads, dim = q.shape
    out = torch.empty(n, queries, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(n, heads, queries, dtype=torch.float32, device=q.device)
    tile = forward_tile(queries, k.shape[1], q.element_size())
    if out.numel():
        with torch.cuda.device_of(q):
            _kernels.attention_fwd_kernel[(n * heads * -(-queries // tile.queries),)](
                out, lse, q, k, v, heads, queries, k.shape[1], dim**-0.5 / math.log(2),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                D=dim, BLOCK_D=_power_of_two(dim), BLOCK_Q=tile.queries, BLOCK_K=tile.keys, EXTRA=tile.extra,
                num_warps=tile.warps, num_stages=1,
            )  # fmt: skip
    return out, lse


def _backward(grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv, whose heads lie side by side."""
    refuse_unless_here(q)
    n, queries, heads, dim = q.shape
    tile = backward_tile(queries, k.shape[1], dim, q.element_size())
    grad = _with_contiguous_rows(grad)
    if not n * heads:
        return
    # Left alone, ptxas may spill a value or two to reach 128 registers. ROCm has no such option, nor the need.
    limit = {} if _is_rocm() else {"maxnreg": 255}
    with torch.cuda.device_of(q):
        _kernels.attention_bwd_kernel[(n * heads,)](
            dq, dk, dv, grad, lse, q, k, v, heads, queries, k.shape[1], dim**-0.5 / math.log(2), dim**-0.5,
            *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:2], *dk.stride()[:2],
            D=dim, BLOCK_D=_power_of_two(dim), BLOCK_Q=tile.queries, BLOCK_K=tile.keys, EXTRA=tile.extra,
            num_warps=tile.warps, num_stages=1, **limit,
        )  # fmt: skip


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("fastmae::triton_attention", mutates_args=())
def triton_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (N, Lq, H, Dh), and (N, H, Lq) for the backward: the logarithm, to base 2, of each row's sum."""
    return _forward(_with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v))


@torch.library.custom_op("fastmae::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(grad, lse, q, k, v, dq, dk, dv)
    return dq, dk, dv


@torch.library.custom_op("fastmae::triton_attention_qkvpacked", mutates_args=())
def triton_attention_qkvpacked(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`triton_attention`, from (N, L, 3, H, Dh)."""
    return _forward(*_with_contiguous_rows(qkv).unbind(2))


@torch.library.custom_op("fastmae::triton_attention_qkvpacked_backward", mutates_args=())
def triton_attention_qkvpacked_backward(grad: Tensor, lse: Tensor, qkv: Tensor) -> Tensor:
    packed = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(grad, lse, *_with_contiguous_rows(qkv).unbind(2), *packed.unbind(2))
    return packed


@torch.library.custom_op("fastmae::triton_attention_kvpacked", mutates_args=())
def triton_attention_kvpacked(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`triton_attention`, with keys and values from (N, Lk, 2, H, Dh)."""
    return _forward(_with_contiguous_rows(q), *_with_contiguous_rows(kv).unbind(2))


@torch.library.custom_op("fastmae::triton_attention_kvpacked_backward", mutates_args=())
def triton_attention_kvpacked_backward(grad: Tensor, lse: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    q, kv = _with_contiguous_rows(q), _with_contiguous_rows(kv)
    dq, dkv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    _backward(grad, lse, q, *kv.unbind(2), dq, *dkv.unbind(2))
    return dq, dkv


def _fake_forward(n: int, queries: int, heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
    out = like.new_empty(n, queries, heads, like.shape[-1])
    return out, like.new_empty(n, heads, queries, dtype=torch.float32)


triton_attention.register_fake(lambda q, k, v: _fake_forward(*q.shape[:3], q))
triton_attention_kvpacked.register_fake(lambda q, kv: _fake_forward(*q.shape[:3], q))
triton_attention_qkvpacked.register_fake(lambda qkv: _fake_forward(*qkv.shape[:2], qkv.shape[3], qkv))
triton_attention_backward.register_fake(lambda grad, lse, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
triton_attention_kvpacked_backward.register_fake(lambda grad, lse, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
triton_attention_qkvpacked_backward.register_fake(lambda grad, lse, qkv: qkv.new_empty(qkv.shape))


differentiate(triton_attention, triton_attention_backward)
differentiate(triton_attention_qkvpacked, triton_attention_qkvpacked_backward)
differentiate(triton_attention_kvpacked, triton_attention_kvpacked_backward)
