"""Every op on drawn shapes, strides, offsets, dtypes and ratios, values and gradients, against its definition.

The definitions are the papers' formulas in plain PyTorch, run in float64 for the truth and in the inputs' precision for
the error that any implementation may make.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from patch_cases import make_mean_std, normalised, patchify, take
from property_cases import (
    BF16,
    F16,
    F32,
    INTERPRETED,
    WORD,
    Draw,
    assert_as_accurate,
    dtypes,
    examples,
    few,
    lengths,
    many_examples,
    philox,
    ratios,
)
from test_masking import assert_same, block_by_definition, from_mask
from torch import Tensor

from fastmae import ops

pytestmark = pytest.mark.ops


def masked_by_definition(strategy, length, grid, ratio, seed, epoch, sample, draw) -> Tensor:
    """bool (L,), True for masked."""
    if strategy == "block":
        return torch.from_numpy(block_by_definition(grid, ratio, seed, epoch, sample, draw)).flatten()
    counter = epoch, sample & WORD, sample >> 32 | draw << 24
    words = [w for i in range(-(-length // 4)) for w in philox((i, *counter), (seed & WORD, seed >> 32))][:length]
    if strategy == "grid":
        corner = divmod(words[0] >> 30, 2)
        return torch.tensor([(i // grid[1] % 2, i % grid[1] % 2) != corner for i in range(length)])
    kept = sorted(range(length), key=lambda i: (words[i], i))[: int(length * (1 - ratio))]
    return torch.ones(length, dtype=torch.bool).index_fill_(0, torch.tensor(kept), False)


@examples
@given(st.data(), st.sampled_from(["random", "block", "grid"]))
def test_random_masking(data, strategy):
    draw = Draw(data)
    n, repeats, ratio, seed = draw(few), draw(few), draw(ratios), draw(st.integers(0, (1 << 63) - 1))
    first, grid = draw(st.integers(0, 256 - repeats)), draw(st.tuples(st.integers(1, 16), st.integers(2, 16)))
    if strategy == "grid":
        grid, ratio = (2 * grid[0], 2 * grid[1]), 0.75
    length = max(2, draw(lengths)) if strategy == "random" else grid[0] * grid[1]
    epoch, samples, epochs = draw(st.integers(0, WORD)), torch.arange(n), None
    if draw.flag():
        samples = draw.laid_out(torch.randint(0, 1 << 48, (n,)))
    if draw.flag():
        epochs = draw.laid_out(torch.randint(0, 1 << 32, (n,)))
    arguments = {"seed": seed, "epoch": epoch if epochs is None else epochs, "sample_ids": samples, "draw": first}
    arguments |= {} if strategy == "random" else {"strategy": strategy, "grid_size": grid}

    def masking():
        return ops.random_masking(n, length, ratio, masks_per_image=repeats, **arguments)

    if int(length * (1 - ratio)) == 0:
        with pytest.raises(ValueError, match="mask_ratio"):
            masking()
        return
    epochs = torch.full((n,), epoch) if epochs is None else epochs
    keys = [(int(epochs[i]), int(samples[i]), first + r) for i in range(n) for r in range(repeats)]
    want = torch.stack([masked_by_definition(strategy, length, grid, ratio, seed, *key) for key in keys])
    assert_same(masking(), from_mask(want))


@many_examples
@given(st.data())
def test_masking_from_noise(data):
    draw = Draw(data)
    length, ratio = max(2, draw(lengths)), draw(ratios)
    noise = draw.laid_out(torch.rand(draw(few), length).to(draw(dtypes)))
    kept = int(length * (1 - ratio))
    if kept == 0:
        with pytest.raises(ValueError, match="mask_ratio"):
            ops.masking_from_noise(noise, ratio)
        return
    rows = [sorted(range(length), key=lambda i, row=row: (row[i], i)) for row in noise.tolist()]
    order = torch.tensor(rows)
    restore = torch.tensor([[row.index(i) for i in range(length)] for row in rows])
    want = ops.Masking(order[:, :kept], order[:, kept:], restore, (restore >= kept).float())
    assert_same(ops.masking_from_noise(noise, ratio), want)


@examples
@given(st.data())
def test_gather_patches(data):
    draw = Draw(data)
    case, repeats = draw.case(), draw(few)
    images, dtype = draw.images(case, draw.one_of(torch.uint8, F32, BF16, F16)), draw(dtypes)
    count = max(1, int(case.num_patches * (1 - case.ratio)))
    ids = draw.ids(case.n * repeats, count, case.num_patches, repeats=draw.flag())
    mean_std = make_mean_std(case.channels) if draw.flag() else (None, None)
    is_raw = images.dtype == torch.uint8

    def op(x):
        return ops.gather_patches(images if is_raw else x, ids, case.patch, *mean_std, dtype)

    def definition(x):
        pixels = normalised(images, *mean_std, torch.promote_types(x.dtype, F32)) if is_raw else x
        chosen = take(patchify(pixels.repeat_interleave(repeats, 0), case.patch), ids)
        return chosen if x.dtype == torch.float64 else chosen.to(dtype)

    # Bytes have no gradient: the zero in their place carries the precision of the definition and of the result.
    x = torch.zeros((), dtype=dtype) if is_raw else images.requires_grad_()
    assert_as_accurate(op, definition, (x,), draw=draw)


@examples
@given(st.data())
def test_gather_tokens(data):
    draw = Draw(data)
    n, length = draw(few), draw(lengths)
    tokens = draw.normal(n, length, draw(st.integers(1, 40)), dtype=draw(dtypes))
    ids = draw.ids(n, max(1, int(length * draw(ratios))), length, repeats=draw.flag())

    def definition(x):
        return F.one_hot(ids, length).to(x.dtype) @ x

    assert torch.equal(ops.gather_tokens(tokens, ids), definition(tokens))
    assert_as_accurate(lambda x: ops.gather_tokens(x, ids), definition, (tokens,), draw=draw)


@examples
@given(st.data(), st.sampled_from(["flat", "token", "table"]))
def test_restore_tokens(data, form):
    draw = Draw(data)
    n, length, prefix, dim = draw(few), draw(lengths), draw(st.integers(0, 2)), draw(st.integers(1, 40))
    visible = draw.normal(n, prefix + max(1, int(length * (1 - draw(ratios)))), dim, dtype=draw(dtypes))
    shape = {"flat": (dim,), "token": (1, 1, dim), "table": (1, length, dim)}[form]
    token = draw.normal(*shape, dtype=draw(dtypes))
    positions = draw.normal(1, prefix + length, dim, dtype=draw(dtypes)) if draw.flag() else None
    # Rows of ids that are no permutation follow the formula too.
    ids = draw.ids(n, length, length, repeats=draw.flag())

    def definition(visible, token, positions):
        kept = visible.shape[1] - prefix
        dtype = torch.promote_types(visible.dtype, token.dtype)
        chosen = F.one_hot(ids, length)[..., :kept].to(dtype) @ visible[:, prefix:].to(dtype)
        chosen = chosen + (ids >= kept)[..., None].to(dtype) * token.to(dtype)
        out = torch.cat([visible[:, :prefix].to(dtype), chosen], 1)
        return out if positions is None else out + positions

    def op(visible, token, positions):
        return ops.restore_tokens(visible, token, ids, positions, prefix)

    assert_as_accurate(op, definition, (visible, token, positions), draw=draw)


@examples
@given(st.data(), st.sampled_from(["mean", "sum", "none"]))
def test_masked_patch_mse(data, reduction):
    draw = Draw(data)
    case, repeats, norm_pix = draw.case(smallest_patch=2), draw(few), draw.flag()
    images = draw.images(case, draw.one_of(torch.uint8, F32, BF16, F16))
    mean_std, eps = make_mean_std(case.channels) if draw.flag() else (None, None), draw.one_of(1e-6, 1e-3)
    length, rows = case.num_patches, case.n * repeats
    ids = draw.ids(rows, max(1, int(length * case.ratio)), length, repeats=False)
    full = draw.flag() and ids.shape[1] < length
    pred = draw.normal(rows, length if full else ids.shape[1], case.pixels, dtype=draw(dtypes))

    def definition(pred):
        # Statistics and loss are defined in float32 at least.
        pred = pred.to(torch.promote_types(pred.dtype, F32))
        pixels = normalised(images, *mean_std, pred.dtype).repeat_interleave(repeats, 0)
        target = take(patchify(pixels, case.patch), ids)
        if norm_pix:
            centred = target - target.mean(-1, keepdim=True)
            variance = centred.square().sum(-1, keepdim=True) / (case.pixels - 1)
            target = centred / (variance + eps).sqrt()
        losses = ((take(pred, ids) if full else pred) - target).square().mean(-1)
        return losses if reduction == "none" else getattr(losses, reduction)()

    def op(pred):
        return ops.masked_patch_mse(pred, images, ids, case.patch, norm_pix, *mean_std, eps, reduction)

    assert_as_accurate(op, definition, (pred,), draw=draw)


@many_examples
@given(st.data())
def test_norm_linear(data):
    draw = Draw(data)
    stream, compute = draw.one_of((F32, F32), (F32, BF16), (BF16, BF16), (F32, F16))
    shape, width = (draw(few), draw(lengths), draw(st.integers(4, 48))), draw(st.integers(1, 24))
    if draw.flag():
        shape = shape[1:]
    dim, has_branch = shape[-1], draw.one_of(True, False, True)
    # The norm of a row of equal values is nothing but rounding, in any arithmetic.
    x = draw.normal(*shape, dtype=stream, varied=True)
    branch = draw.normal(*shape, dtype=compute) if has_branch else None
    branch_bias = draw.normal(dim, dtype=stream) if has_branch and draw.flag() else None
    norm = (draw.normal(dim, dtype=stream), draw.normal(dim, dtype=stream))
    weight = draw.normal(width, dim, dtype=compute, scale=dim**-0.5)
    bias = draw.normal(width, dtype=compute) if draw.flag() else None

    def definition(x, branch, branch_bias, norm_weight, norm_bias, weight, bias):
        x = x if branch is None else x + branch
        x = x if branch_bias is None else x + branch_bias
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
        return x, F.linear(normed.to(weight.dtype), weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        by_op = INTERPRETED or draw.flag()
        patch.setattr(import_module("fastmae.ops.norm_linear"), "fuses", lambda *_: by_op)
        assert_as_accurate(
            ops.norm_linear, definition, (x, branch, branch_bias, *norm, weight, bias), floor=1.0, draw=draw
        )


@many_examples
@given(st.data())
def test_gelu_linear(data):
    draw = Draw(data)
    dtype, shape = draw(dtypes), (draw(few), draw(lengths), draw(st.integers(1, 48)))
    h, width = draw.normal(*shape[draw(st.integers(0, 1)) :], dtype=dtype, scale=3), draw(st.integers(1, 24))
    bias = draw.normal(shape[-1], dtype=dtype) if draw.flag() else None
    weight = draw.normal(width, shape[-1], dtype=dtype, scale=shape[-1] ** -0.5)
    out_bias = draw.normal(width, dtype=dtype) if draw.flag() else None

    def definition(h, bias, weight, out_bias):
        h = h if bias is None else h + bias
        return F.linear(0.5 * h * (1 + torch.erf(h * 0.5**0.5)), weight, out_bias)

    with pytest.MonkeyPatch.context() as patch:
        by_op = INTERPRETED or draw.flag()
        patch.setattr(import_module("fastmae.ops.gelu_linear"), "fuses", lambda *_: by_op)
        assert_as_accurate(ops.gelu_linear, definition, (h, bias, weight, out_bias), floor=1.0, draw=draw)


@examples
@given(st.data(), st.sampled_from(["separate", "kvpacked", "qkvpacked"]))
def test_attention(data, form):
    draw = Draw(data)
    # In the interpreter Triton's kernels are what is new; they take no bfloat16 there, and products are slow.
    backend = "triton" if INTERPRETED else draw.one_of("auto", "plain", "sdpa")
    dtype = draw.one_of(F32, F16) if INTERPRETED else draw(dtypes)
    sizes = st.integers(1, 48) if INTERPRETED else lengths
    n, heads, dim, queries, keys = draw(few), draw(few), draw(st.integers(1, 40)), draw(sizes), draw(sizes)
    if form == "qkvpacked":
        keys, shapes = queries, [(n, queries, 3, heads, dim)]
    elif form == "kvpacked":
        shapes = [(n, queries, heads, dim), (n, keys, 2, heads, dim)]
    else:
        shapes = [(n, queries, heads, dim), (n, keys, heads, dim), (n, keys, heads, dim)]
    op = {"separate": ops.attention, "kvpacked": ops.attention_kvpacked, "qkvpacked": ops.attention_qkvpacked}[form]

    def definition(*inputs):
        q, k, v = [part for x in inputs for part in (x.unbind(2) if x.ndim == 5 else (x,))]
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) * dim**-0.5).softmax(-1)
        return torch.einsum("nhqk,nkhd->nqhd", weights, v)

    # With one key, or equal ones, some gradients are 0 in truth, and rounding in any arithmetic: hence the floor.
    inputs = tuple(draw.normal(*shape, dtype=dtype) for shape in shapes)
    assert_as_accurate(lambda *x: op(*x, backend), definition, inputs, floor=1.0, draw=draw)
