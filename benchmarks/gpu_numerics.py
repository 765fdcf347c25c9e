"""The numerics of every op at training shapes: as accurate as plain PyTorch at the same precision, copies exact.

Values and gradients as training computes them: bfloat16 autocast, weights in float32 with a low-precision copy. The
truth is plain PyTorch in float32. An error may be twice that of plain PyTorch under autocast, and a thousandth of the
largest value on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import bench_attention
import plain
import torch
import torch.nn.functional as F
from gpu_results import describe
from torch import Tensor

from fastmae import ops
from fastmae.ops._linear import linear

TINY = 1e-3
BF16, F32 = torch.bfloat16, torch.float32

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        name: the shape, for the results.
        ours, plain: take the arguments by name and return a tensor or several, the same ones.
        make: the arguments; those that require a gradient get one.
        exact: results have to be equal to plain PyTorch's.
    """

    op: str
    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    make: Callable[[], Arguments]
    exact: bool = False


def check(case: Case) -> dict:
    """A line of the results: for each value and gradient the error and what is allowed; never raises."""
    found: dict = {"op": case.op, "case": case.name, "passed": False, "values": []}
    try:
        found["values"] = [_compare(*row, case.exact) for row in _computed(case)]
        found["passed"] = all(value["passed"] for value in found["values"])
    except Exception as error:
        found["error"] = describe(error)
    return found


def _computed(case: Case) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, ours, plain PyTorch's and the truth, of each result and gradient."""
    arguments = case.make()
    wide = {key: _widened(value) for key, value in arguments.items()}
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    grads: list[Tensor] = []

    def run(function: Callable[..., Any], given: Arguments, autocast: bool) -> list[Tensor]:
        with torch.autocast(device.type, dtype=BF16, enabled=autocast):
            out = function(**given)
        out = [out] if isinstance(out, Tensor) else list(out)
        inputs = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
        if not inputs:
            return out
        if not grads:
            grads.extend(torch.randn(o.shape, device=device).to(BF16) for o in out)
        return [*out, *torch.autograd.grad(out, inputs, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])]

    ours = run(case.ours, arguments, True)
    theirs = run(case.plain, arguments, True)
    truth = theirs if case.exact else run(case.plain, wide, False)
    inputs = [key for key, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]
    names = [f"result {i}" for i in range(len(ours) - len(inputs))] + [f"gradient of {key}" for key in inputs]
    return zip(names, ours, theirs, truth, strict=True)


def _widened(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().float().requires_grad_(value.requires_grad)
    return value


def _compare(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, exact: bool) -> dict:
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if exact:
        return {"name": name, "passed": bool(torch.equal(ours, theirs))}
    truth = truth.detach()
    scale = float(truth.abs().max())
    error, bound = (float((x.detach().float() - truth).abs().max()) for x in (ours, theirs))
    allowed = 2 * bound + TINY * scale
    # A NaN is no less than what is allowed, and not more either.
    return {"name": name, "error": error, "allowed": allowed, "scale": scale, "passed": error <= allowed}


def cases(device: torch.device, tiny: bool) -> list[Case]:
    """About sixty; a few small ones of every op if ``tiny``."""
    if tiny:
        groups = (
            _norm_linears(device, 6, [(16, 24)]), _gelu_linears(device, 6, [(16, 8)]), _linears(device, 6, [(16, 8)]),
            _attentions(device, 2, [(5, 5, 2, 16), (3, 5, 2, 16)]), _tokens(device, 2, 9, 2, (16,), 8),
            _pixels(device, 2, 32, 8, 4), _masks(device, 2, 16),
        )  # fmt: skip
        return [case for group in groups for case in group]
    encoders, decoder = (1024, 768, 1280), [(512, 1536), (512, 2048)]
    groups = (
        _norm_linears(device, 256 * 50, [(d, f * d) for d in encoders for f in (3, 4)]),
        _norm_linears(device, 256 * 197, decoder),
        _gelu_linears(device, 256 * 50, [(4 * d, d) for d in encoders]),
        _gelu_linears(device, 256 * 197, [(2048, 512)]),
        _linears(device, 256 * 50, [(d, d) for d in encoders]),
        _linears(device, 256 * 197, [(512, 512)]),
        _attentions(device, 256, [(50, 50, 16, 64), (197, 197, 16, 32), (147, 197, 16, 32)]),
        _attentions(device, 128, [(50, 50, 12, 64), (65, 65, 16, 80), (257, 257, 16, 32), (192, 257, 16, 32)]),
        _tokens(device, 256, 196, 49, (1024, 768), 512),
        _tokens(device, 128, 256, 64, (1280,), 512),
        _pixels(device, 256, 224, 16, 49),
        _pixels(device, 128, 224, 14, 64),
        _masks(device, 256, 196),
        _masks(device, 128, 256),
        _attention_tiles(device, 64, [(50, 50, 16, 64), (197, 197, 16, 32), (147, 197, 16, 32)]),
    )
    return [case for group in groups for case in group]


def _random(device: torch.device, *shape: int, dtype: torch.dtype = F32, grad: bool = True, scale: float = 1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _norm_linears(device: torch.device, rows: int, widths: list[tuple[int, int]]) -> Iterable[Case]:
    """With and without a branch to add, on a stream in float32 and, with one, in bfloat16."""

    def make(dim: int, out: int, branch: bool, stream: torch.dtype) -> Arguments:
        r = partial(_random, device)
        added = {"branch": r(rows, dim, dtype=BF16), "branch_bias": r(dim)} if branch else {}
        norm = {"norm_weight": r(dim), "norm_bias": r(dim)}
        linear = {"weight": r(out, dim, scale=dim**-0.5), "bias": r(out)}
        return {"x": r(rows, dim, dtype=stream), **added, **norm, **linear}

    def ours(x, norm_weight, norm_bias, weight, bias, branch=None, branch_bias=None):
        cast = weight.detach().to(BF16)
        found = ops.norm_linear(x, branch, branch_bias, norm_weight, norm_bias, weight, bias, 1e-6, weight_cast=cast)
        return found if branch is not None else found[1]

    def composed(x, norm_weight, norm_bias, weight, bias, branch=None, branch_bias=None):
        new = x if branch is None else (x + branch + branch_bias).to(x.dtype)
        out = F.linear(F.layer_norm(new, new.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype)), weight, bias)
        return (new, out) if branch is not None else out

    for dim, out in widths:
        for branch, stream in ((True, F32), (False, F32), (True, BF16)):
            name = f"{rows} x {dim} to {out}, {'with' if branch else 'without'} a branch, stream in {stream}"
            yield Case("norm_linear", name, ours, composed, partial(make, dim, out, branch, stream))


def _gelu_linears(device: torch.device, rows: int, widths: list[tuple[int, int]]) -> Iterable[Case]:
    def make(hidden: int, out: int, bias: bool) -> Arguments:
        r = partial(_random, device)
        made = {"h": r(rows, hidden, dtype=BF16, scale=2.0), "weight": r(out, hidden, scale=hidden**-0.5)}
        return made | ({"bias": r(hidden)} if bias else {})

    def ours(h, weight, bias=None):
        return ops.gelu_linear(h, bias, weight, weight_cast=weight.detach().to(BF16))

    def composed(h, weight, bias=None):
        return F.linear(F.gelu(h if bias is None else h + bias.to(h.dtype)), weight)

    for hidden, out in widths:
        for bias in (True, False):
            name = f"{rows} x {hidden} to {out}, {'with' if bias else 'without'} bias"
            yield Case("gelu_linear", name, ours, composed, partial(make, hidden, out, bias))


def _linears(device: torch.device, rows: int, widths: list[tuple[int, int]]) -> Iterable[Case]:
    def make(inner: int, out: int) -> Arguments:
        r = partial(_random, device)
        return {"x": r(rows, inner, dtype=BF16), "weight": r(out, inner, scale=inner**-0.5), "bias": r(out)}

    def ours(x, weight, bias):
        return linear(x, weight, bias, weight.detach().to(BF16))

    for inner, out in widths:
        yield Case("linear", f"{rows} x {inner} to {out}", ours, F.linear, partial(make, inner, out))


def _attentions(device: torch.device, n: int, shapes: list[tuple[int, int, int, int]]) -> Iterable[Case]:
    """Triton's kernels where they run, else what "auto" picks."""

    def ours(qkv=None, q=None, kv=None):
        backend = "triton" if device.type == "cuda" else "auto"
        return ops.attention_kvpacked(q, kv, backend) if qkv is None else ops.attention_qkvpacked(qkv, backend)

    for shape in shapes:
        yield Case(
            "attention", _attention_name(n, *shape), ours, _attend, partial(_attention_inputs, device, n, *shape)
        )


def _attention_tiles(device: torch.device, n: int, shapes: list[tuple[int, int, int, int]]) -> Iterable[Case]:
    """Our kernels in each tile of the sweep, which also compiles them. A wrong one is no fault of the op's defaults."""
    for queries, keys, heads, dim in shapes:
        candidates = bench_attention.tiles(BF16, keys, dim, None if queries == keys else queries)
        for pair in zip_longest(*candidates):

            def ours(qkv=None, q=None, kv=None, pair=pair):
                return bench_attention.Tiled.apply(*pair, *([q, kv] if qkv is None else [qkv]))

            name = f"{_attention_name(n, queries, keys, heads, dim)}, {pair}"
            make = partial(_attention_inputs, device, n, queries, keys, heads, dim)
            yield Case("attention tiles", name, ours, _attend, make)


def _attention_name(n: int, queries: int, keys: int, heads: int, dim: int) -> str:
    return f"{n} x {queries} of {keys} tokens, {heads} heads of {dim}"


def _attention_inputs(device: torch.device, n: int, queries: int, keys: int, heads: int, dim: int) -> Arguments:
    inputs = bench_attention.make_inputs(n, BF16, keys, dim, device, None if queries == keys else queries, heads)
    return dict(zip(["qkv"] if queries == keys else ["q", "kv"], inputs, strict=True))


def _attend(qkv: Tensor | None = None, q: Tensor | None = None, kv: Tensor | None = None) -> Tensor:
    """Attention written out, the softmax in float32."""
    parts = (q, *kv.unbind(2)) if qkv is None else qkv.unbind(2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _tokens(device: torch.device, n: int, length: int, keep: int, dims: Sequence[int], out: int) -> Iterable[Case]:
    """gather_tokens of the encoders' widths, restore_tokens of the decoder's, in bfloat16 and in float32."""

    def gathered(dim: int) -> Arguments:
        return {"x": _random(device, n, length, dim), "ids": plain.choose(n, length, keep, device)}

    def gather(x, ids):
        return ops.gather_tokens(x, ids)

    def restored(dtype: torch.dtype, table: bool) -> Arguments:
        ids = torch.rand(n, length, device=device).argsort(1).argsort(1)
        made = {"visible": _random(device, n, keep + 1, out, dtype=dtype), "ids_restore": ids}
        made["mask_token"] = _random(device, 1, length if table else 1, out, dtype=dtype)
        return made if table else made | {"pos_embed": _random(device, 1, length + 1, out, grad=False)}

    def composed(visible, mask_token, ids_restore, pos_embed=None):
        n, rows, dim = visible.shape
        table = mask_token.expand(n, ids_restore.shape[1], dim)
        padded = F.pad(visible[:, 1:], (0, 0, 0, table.shape[1] - rows + 1))
        is_masked = (ids_restore >= rows - 1)[..., None]
        x = torch.cat([visible[:, :1], torch.where(is_masked, table, plain.pick(padded, ids_restore))], dim=1)
        return x if pos_embed is None else x + pos_embed

    for dim in dims:
        name = f"{n} x {keep} of {length} x {dim}"
        yield Case("gather_tokens", name, gather, plain.pick, partial(gathered, dim))
    ours = partial(ops.restore_tokens, num_prefix_tokens=1)
    for dtype, table in ((F32, False), (BF16, False), (BF16, True)):
        name = f"{n} x {keep} of {length} x {out}, {dtype}{', a token for each position' if table else ''}"
        yield Case("restore_tokens", name, ours, composed, partial(restored, dtype, table))


def _pixels(device: torch.device, n: int, side: int, patch: int, keep: int) -> Iterable[Case]:
    """gather_patches and masked_patch_mse, from raw bytes and from floats."""
    length = (side // patch) ** 2
    mean, std = plain.statistics(device)

    def images(raw: bool) -> Tensor:
        return plain.batch_of_images(n, side, device) if raw else _random(device, n, 3, side, side, grad=False)

    def gathered(raw: bool) -> Arguments:
        return {"images": images(raw), "ids": plain.choose(n, length, keep, device)}

    def predicted(raw: bool, full: bool) -> Arguments:
        pred = _random(device, n, length if full else length - keep, 3 * patch * patch, dtype=BF16)
        return {"pred": pred, "images": images(raw), "ids": plain.choose(n, length, length - keep, device)}

    def gather(images, ids):
        return ops.gather_patches(images, ids, patch, mean, std)

    def gather_plain(images, ids):
        found = plain.pick(plain.normalised_patches(images, patch, mean, std), ids)
        return found.to(BF16) if torch.is_autocast_enabled(device.type) else found

    def loss(pred, images, ids):
        return ops.masked_patch_mse(pred, images, ids, patch, True, mean, std) * pred.shape[0]

    def loss_plain(pred, images, ids):
        pred = plain.pick(pred, ids) if pred.shape[1] == length else pred
        target = plain.pick(plain.normalised_patches(images, patch, mean, std), ids)
        return plain.squared_error(pred, target).mean() * pred.shape[0]

    for raw in (True, False):
        name = f"{n} images of {side}, patch {patch}, {'uint8 NHWC' if raw else 'float32 NCHW'}"
        yield Case("gather_patches", name, gather, gather_plain, partial(gathered, raw))
        for full in (True, False):
            kind = f"{name}, {'all' if full else 'masked'} predictions"
            yield Case("masked_patch_mse", kind, loss, loss_plain, partial(predicted, raw, full))


def _masks(device: torch.device, n: int, length: int) -> Iterable[Case]:
    """The same bits as on the CPU."""

    def draw(sample_ids, strategy, where):
        found = ops.random_masking(
            n, length, 0.75, seed=3, epoch=1, sample_ids=sample_ids.to(where), strategy=strategy,
            grid_size=int(length**0.5),
        )  # fmt: skip
        return [part.to(sample_ids.device) for part in found]

    for strategy in ("random", "block"):
        make = lambda strategy=strategy: {  # noqa: E731
            "sample_ids": torch.arange(n, device=device) * 977, "strategy": strategy
        }  # fmt: skip
        ours, theirs = partial(draw, where=device), partial(draw, where=torch.device("cpu"))
        yield Case("random_masking", f"{n} x {length}, {strategy}", ours, theirs, make, exact=True)
