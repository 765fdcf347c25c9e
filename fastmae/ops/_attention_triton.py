"""The Triton backend of attention: launches, autograd and limits of the kernels for short sequences.

Saved for the backward are the inputs and one fp32 number a query. The packed forms read queries, keys and values by
strides where the projection left them, and write their gradient as one tensor of the same layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.ops._attention_autograd import differentiate, differentiate_with_bias
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
    """Launch options. The defaults are :func:`forward_tile` and :func:`backward_tile`.

    Attributes:
        queries: queries that a program handles at a time.
        warps: warps per program.
        stages: pipeline stages of the backward's loop over queries.
    """

    queries: int
    warps: int
    stages: int = 1


def forward_tile(num_queries: int, num_keys: int, itemsize: int) -> Tile:
    """As many queries as the registers hold scores for."""
    keys = _key_tile(num_keys, itemsize)["BLOCK_K"]
    if itemsize == 4:
        queries, warps = 16, 8
    elif _has_warpgroup_products():
        # A shared product takes 64 rows. Two programs of four warps fit, so one computes while the other loads.
        queries, warps = 64, 4
    else:
        queries, warps = (128, 8) if keys > 64 else (64, 4)
        if -num_queries % queries >= queries // 2:
            # Half as many where most of the last block would idle: 65 queries as three blocks of 32, 257 as five of 64.
            queries //= 2
    if _is_rocm():
        # More would fit, but takes LLVM a minute to compile.
        queries, warps = min(queries, 256 * 32 // keys, 64), 4
    return Tile(min(queries, _power_of_two(num_queries)), warps)


def backward_tile(num_queries: int, num_keys: int, head_dim: int, itemsize: int) -> Tile:
    """Few queries at a time, since the gradients of all keys and values stay in the registers."""
    tile, width = _key_tile(num_keys, itemsize), _power_of_two(head_dim)
    keys, extra = tile["BLOCK_K"], tile["EXTRA"]
    queries = 16 if width == 128 or (width == 64 and extra and keys > 64) or itemsize == 4 else 32
    warps = 4 if keys * width <= 64 * 64 and itemsize == 2 else 8
    if warps == 8 and itemsize == 2 and not extra and _has_warpgroup_products():
        # Two programs fit. The product for dq has few rows, so every warp repeats it: 16 cost half of what 32 do.
        queries, warps = 16, 4
    if _is_rocm():
        # A thread of four wavefronts may have 512 registers, of eight only 256.
        warps = 4
    return Tile(min(queries, _power_of_two(num_queries)), warps)


def forward_tiles(num_queries: int, num_keys: int, itemsize: int) -> list[Tile]:
    """Candidates of a sweep, the default first: those whose scores fill at most half of the registers."""
    keys, limit = _key_tile(num_keys, itemsize)["BLOCK_K"], _power_of_two(num_queries)
    tiles = [Tile(queries, warps) for queries in (16, 32, 64, 128) for warps in (4, 8) if queries <= limit]
    fit = [t for t in tiles if t.queries * keys <= 128 * 32 * t.warps]
    return list(dict.fromkeys([forward_tile(num_queries, num_keys, itemsize), *fit]))


def backward_tiles(num_queries: int, num_keys: int, head_dim: int, itemsize: int) -> list[Tile]:
    """As :func:`forward_tiles`, for the backward; a few candidates spill some registers."""
    keys, limit = _key_tile(num_keys, itemsize)["BLOCK_K"], _power_of_two(num_queries)
    tiles = [Tile(q, warps, stages) for q in (16, 32, 64) for warps in (4, 8) for stages in (1, 2) if q <= limit]
    # The gradients of keys and values, the scores and the scores' gradients.
    fit = [t for t in tiles if 2 * keys * (_power_of_two(head_dim) + t.queries) <= 192 * 32 * t.warps]
    return list(dict.fromkeys([backward_tile(num_queries, num_keys, head_dim, itemsize), *fit]))


def _key_tile(num_keys: int, itemsize: int) -> dict[str, int | bool]:
    """The tile for all keys: its size, how many keys need no mask, and whether one key is left over.

    One is left over of 2^k patches and a class token. FULL_K is a multiple of 16, so that close lengths share code.
    """
    extra = itemsize == 2 and num_keys in (17, 33, 65, 129, 257)
    block = num_keys - 1 if extra else _power_of_two(num_keys)
    return {"BLOCK_K": block, "FULL_K": min(num_keys // 16 * 16, block), "EXTRA": extra}


def _is_rocm() -> bool:
    return torch.version.hip is not None


def _has_warpgroup_products() -> bool:
    """Whether four warps share a matrix product on the current device: Hopper, data-center Blackwell.

    Without a GPU (in the interpreter) the answer is Hopper's.
    """
    if _is_rocm():
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in (9, 10)


def _power_of_two(size: int) -> int:
    """The next one, at least 16: the least that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on inputs of inner stride 1. Returns what :func:`triton_attention` does."""
    refuse_unless_here(q)
    n, queries, heads, dim = q.shape
    out = torch.empty(n, queries, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(n, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):
            tile = tile or forward_tile(queries, k.shape[1], q.element_size())
            _kernels.attention_fwd_kernel[(n * heads * -(-queries // tile.queries),)](
                out, lse, q, k, v, heads, queries, k.shape[1], dim**-0.5 / math.log(2),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                D=dim, BLOCK_D=_power_of_two(dim), BLOCK_Q=tile.queries, **_key_tile(k.shape[1], q.element_size()),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    tile: Tile | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the backward kernel, which writes dq, dk and dv (strides of the heads: Dh). q, k, v: inner stride 1.

    It also writes ``sums``, float32 (N, 3, H, Dh), if given: each image's part of the gradient of a bias that was added
    to queries, keys and values.
    """
    refuse_unless_here(q)
    n, queries, heads, dim = q.shape
    grad = _with_contiguous_rows(grad)
    if not n * heads:
        return
    with torch.cuda.device_of(q):
        tile = tile or backward_tile(queries, k.shape[1], dim, q.element_size())
        keys = _key_tile(k.shape[1], q.element_size())
        limit = {} if _is_rocm() else {"maxnreg": _register_limit(tile, keys, dim, q.element_size())}
        _kernels.attention_bwd_kernel[(n * heads,)](
            dq, dk, dv, sums, grad, lse, q, k, v, heads, queries, k.shape[1], dim**-0.5 / math.log(2), dim**-0.5,
            *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dq.stride()[:2], *dk.stride()[:2],
            D=dim, BLOCK_D=_power_of_two(dim), BLOCK_Q=tile.queries, **keys,
            num_warps=tile.warps, num_stages=tile.stages, **limit,
        )  # fmt: skip


def _register_limit(tile: Tile, keys: dict[str, int | bool], head_dim: int, itemsize: int) -> int:
    """Of a thread of the backward, on NVIDIA: without one, ptxas may spill a value or two to reach 128."""
    small = keys["BLOCK_K"] * _power_of_two(head_dim) <= 64 * 64 and not keys["EXTRA"] and itemsize == 2
    if small and tile.warps == 4 and tile.queries <= 32 and _has_warpgroup_products():
        # Three programs fit on a Hopper processor. The sums for a bias would take five registers more than need be.
        return 168
    return 255


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("fastmae::triton_attention", mutates_args=())
def triton_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (N, Lq, H, Dh), and (N, H, Lq) for the backward: the logarithm, to base 2, of each row's sum."""
    return forward(_with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v))


@torch.library.custom_op("fastmae::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backward(grad, lse, q, k, v, dq, dk, dv)
    return dq, dk, dv


@torch.library.custom_op("fastmae::triton_attention_qkvpacked", mutates_args=())
def triton_attention_qkvpacked(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`triton_attention`, from (N, L, 3, H, Dh). ``bias`` (3 * H * Dh,) is in it already: not read."""
    return forward(*_with_contiguous_rows(qkv).unbind(2))


@torch.library.custom_op("fastmae::triton_attention_qkvpacked_backward", mutates_args=())
def triton_attention_qkvpacked_backward(
    grad: Tensor, lse: Tensor, qkv: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, and of the bias: empty where ``bias_dtype`` is None."""
    packed = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = _with_contiguous_rows(qkv).unbind(2)
    return packed, _backward_with_bias(grad, lse, q, k, v, *packed.unbind(2), bias_dtype=bias_dtype)


@torch.library.custom_op("fastmae::triton_attention_kvpacked", mutates_args=())
def triton_attention_kvpacked(q: Tensor, kv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`triton_attention_qkvpacked`, with keys and values from (N, Lk, 2, H, Dh)."""
    return forward(_with_contiguous_rows(q), *_with_contiguous_rows(kv).unbind(2))


@torch.library.custom_op("fastmae::triton_attention_kvpacked_backward", mutates_args=())
def triton_attention_kvpacked_backward(
    grad: Tensor, lse: Tensor, q: Tensor, kv: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = _with_contiguous_rows(q), _with_contiguous_rows(kv)
    dq, dkv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    return dq, dkv, _backward_with_bias(grad, lse, q, *kv.unbind(2), dq, *dkv.unbind(2), bias_dtype=bias_dtype)


def _backward_with_bias(
    grad: Tensor, lse: Tensor, q: Tensor, *others: Tensor, bias_dtype: torch.dtype | None
) -> Tensor:
    """As :func:`backward`. Returns the gradient of the bias of queries, keys and values, or an empty tensor."""
    if bias_dtype is None:
        backward(grad, lse, q, *others)
        return q.new_empty(0)
    n, _, heads, dim = q.shape
    sums = torch.empty(n, 3, heads, dim, dtype=torch.float32, device=q.device)
    backward(grad, lse, q, *others, sums=sums)
    return sums.sum(0).flatten().to(bias_dtype)


def _fake_forward(n: int, queries: int, heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
    out = like.new_empty(n, queries, heads, like.shape[-1])
    return out, like.new_empty(n, heads, queries, dtype=torch.float32)


def _fake_bias(q: Tensor, dtype: torch.dtype | None) -> Tensor:
    return q.new_empty(0) if dtype is None else q.new_empty(3 * q.shape[-2] * q.shape[-1], dtype=dtype)


triton_attention.register_fake(lambda q, k, v: _fake_forward(*q.shape[:3], q))
triton_attention_kvpacked.register_fake(lambda q, kv, bias: _fake_forward(*q.shape[:3], q))
triton_attention_qkvpacked.register_fake(lambda qkv, bias: _fake_forward(*qkv.shape[:2], qkv.shape[3], qkv))
triton_attention_backward.register_fake(lambda grad, lse, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
triton_attention_kvpacked_backward.register_fake(
    lambda grad, lse, q, kv, dtype: (q.new_empty(q.shape), kv.new_empty(kv.shape), _fake_bias(q, dtype))
)
triton_attention_qkvpacked_backward.register_fake(
    lambda grad, lse, qkv, dtype: (qkv.new_empty(qkv.shape), _fake_bias(qkv, dtype))
)


differentiate(triton_attention, triton_attention_backward)
differentiate_with_bias(triton_attention_qkvpacked, triton_attention_qkvpacked_backward)
differentiate_with_bias(triton_attention_kvpacked, triton_attention_kvpacked_backward)
