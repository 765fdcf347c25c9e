"""What the property tests draw, and how they judge: memory layouts, and errors against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from patch_cases import LAYOUTS as IMAGE_LAYOUTS
from patch_cases import Case, make_images
from torch import Tensor

from fastmae.ops._dispatch import is_interpreted, load_kernels

INTERPRETED = load_kernels("masking") is not None and is_interpreted()
plain_only = pytest.mark.skipif(INTERPRETED, reason="reaches no kernel, or no other than in another test")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TINY = {F64: 1e-13, F32: 5e-6, F16: 2e-3, BF16: 1.6e-2}
"""Share of the largest value that any implementation may be off: a few units in the last place of each dtype.

One of them is the interpreter's, which truncates to bfloat16 where hardware rounds.
"""

WORD = (1 << 32) - 1

# Interpreted, making a failing example smaller takes minutes and gains little.
PHASES = [phase for phase in Phase if not (INTERPRETED and phase in (Phase.shrink, Phase.explain))]
examples = settings(max_examples=12 if INTERPRETED else 30, deadline=None, derandomize=True, phases=PHASES)
many_examples = settings(examples, max_examples=24 if INTERPRETED else 60)
"""For what has many optional arguments and costs little."""
few = st.integers(1, 3)
lengths = st.one_of(st.integers(1, 12), st.integers(1, 48), st.integers(1, 100 if INTERPRETED else 256))
ratios = st.floats(0.05, 0.95)
dtypes = st.sampled_from([F32, BF16, F16])


class Draw:
    """Draws by name's strategy and by tensor; tensors hang on a drawn seed, so that a failure can be repeated."""

    def __init__(self, data: st.DataObject):
        self.data = data
        torch.manual_seed(self(st.integers(0, 1 << 16)))

    def __call__(self, strategy: st.SearchStrategy):
        return self.data.draw(strategy)

    def one_of(self, *values):
        """By the seed: hypothesis likes to repeat itself, and would leave combinations out."""
        return values[int(torch.randint(len(values), ()))]

    def flag(self) -> bool:
        return self.one_of(False, True)

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0, varied: bool = False) -> Tensor:
        """Normal values of ``dtype`` in some memory layout, a leaf that requires a gradient."""
        return self.laid_out((torch.randn(shape) * scale).to(dtype), varied).requires_grad_()

    def laid_out(self, values: Tensor, varied: bool = False) -> Tensor:
        """Equal values (in an expanded layout, those of the first of its kind) somewhere else in memory.

        What lies between them is NaN, or 0 for integers, so that a read in the wrong place is seen. Where they have to
        be ``varied``, the last dimension is not expanded.
        """
        gap = float("nan") if values.is_floating_point() else 0
        kinds = ("permuted",) * (values.ndim > 1) + ("offset", "sliced", "expanded") * (values.ndim > 0)
        kind = self.one_of(*kinds, "contiguous")
        if kind == "offset":
            start = self(st.integers(1, 9))
            memory = values.new_full((start + values.numel(),), gap)
            return memory[start:].view(values.shape).copy_(values)
        if kind == "permuted":
            order = self(st.permutations(range(values.ndim)).filter(lambda order: order != sorted(order)))
            back = [order.index(i) for i in range(values.ndim)]
            return values.permute(order).contiguous().permute(back)
        if kind == "sliced":
            memory = values.new_full([2 * size + 2 for size in values.shape], gap)
            for dim, size in enumerate(values.shape):
                start, step = self.one_of((0, 1), (1, 2), (2, 1))
                memory = memory.narrow(dim, start, size * step)[(slice(None),) * dim + (slice(None, None, step),)]
            return memory.copy_(values)
        if kind == "expanded":
            dim = self(st.integers(0, values.ndim - 1 - varied))
            return values.narrow(dim, 0, 1).expand(values.shape)
        return values

    def case(self, smallest_patch: int = 1) -> Case:
        """A few images of a few patches, square or not, mostly small."""
        # The interpreter takes milliseconds for each patch of the gradient of images.
        side, most = st.integers(smallest_patch, 6 if INTERPRETED else 10), 4 if INTERPRETED else 6
        patch, grid = self(st.tuples(side, side)), self(st.tuples(st.integers(1, most), st.integers(1, most)))
        if not INTERPRETED and not self(st.integers(0, 7)):
            patch, grid = (2, 2), (16, 16)
        return Case(self(few), self(st.integers(1, 4)), (grid[0] * patch[0], grid[1] * patch[1]), patch, self(ratios))

    def images(self, case: Case, dtype: torch.dtype) -> Tensor:
        """(N, C, H, W), channels last, planar, cut from larger images or in any other layout."""
        layout = self.one_of(*IMAGE_LAYOUTS, "any")
        return self.laid_out(make_images(case, "nchw", dtype)) if layout == "any" else make_images(case, layout, dtype)

    def ids(self, rows: int, count: int, length: int, repeats: bool) -> Tensor:
        """int64 (rows, count) in [0, length), distinct in each row unless they may repeat."""
        if repeats:
            return self.laid_out(torch.randint(0, length, (rows, count)))
        return self.laid_out(torch.rand(rows, length).argsort(1)[:, :count])


def values_and_gradients(function: Callable, inputs: tuple[Tensor | None, ...], grads: list[Tensor]) -> list[Tensor]:
    outputs = as_tuple(function(*inputs))
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    if not leaves:
        return list(outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def assert_as_accurate(
    op: Callable,
    definition: Callable,
    inputs: tuple[Tensor | None, ...],
    *,
    draw: Draw | None = None,
    tiny: float | None = None,
    floor: float = 0.0,
) -> None:
    """Results and gradients of the floating inputs at most twice as far from the definition in float64 as the
    definition in the inputs' precision, plus a tiny share of the largest value (of ``floor`` where that is larger).

    The outputs' gradients are drawn in any layout if there is a ``draw``.
    """
    with torch.no_grad():
        outputs = as_tuple(op(*inputs))
    tiny = tiny or max(TINY[x.dtype] for x in (*inputs, *outputs) if x is not None)
    grads = [torch.randn_like(out, memory_format=torch.contiguous_format) for out in outputs]
    grads = grads if draw is None else [draw.laid_out(grad) for grad in grads]
    wide = tuple(None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    ours, plain, exact = (
        values_and_gradients(f, x, grads) for f, x in ((op, inputs), (definition, inputs), (definition, wide))
    )
    for got, other, truth in zip(ours, plain, exact, strict=True):
        assert got.shape == truth.shape
        assert got.dtype == other.dtype
        assert got.isfinite().all()
        error, allowed = (got.double() - truth).abs().max(), 2 * (other.double() - truth).abs().max()
        allowed = allowed + tiny * max(float(truth.abs().max()), floor)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, shape {tuple(got.shape)}"


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 of Salmon et al. 2011 on Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k0, second & WORD, (first >> 32) ^ d ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d
