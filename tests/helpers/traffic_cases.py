"""The ops whose traffic is counted: inputs, byte budget, and what one writes without the op. A new op is one entry.

Sizes are those of ``Sizes``. Budgets are bytes by kernel argument, written down from the definition of the op alone.
An argument in ``tables`` is small and shared by many programs (indices, per-pixel statistics, parameters): of it the
distinct bytes of a launch are compared with the budget; of every other argument all accesses are, so that reading
something twice fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import traffic_inputs as inputs
from patch_cases import take
from traffic_inputs import Sizes

from fastmae.ops._attention_triton import forward_tile

BF16, F32, I64 = 2, 4, 8


@dataclass(frozen=True)
class Op:
    """One op, in one direction.

    Attributes:
        make: builds the inputs and returns what is counted, without arguments.
        reads, writes: budgets in bytes, by kernel argument.
        eager: the same result in plain PyTorch, as ``make`` builds it: the function and its arguments. For a backward,
            the forward function: its gradient is counted.
        backward: whether this is a gradient.
        kernels: launches of our own kernels.
        tables: arguments that are shared and small.
        runs: bytes of the contiguous runs in which an argument is touched, where they are no multiple of a sector;
            a run of R bytes at any multiple of 16 bytes touches at most ``(R + 16 + 31) // 32`` sectors.
        again: bytes of an argument that are read more than once by design: counted, and in no budget.
    """

    make: Callable[[Sizes], Callable[[], object]]
    reads: Callable[[Sizes], dict[str, int]]
    writes: Callable[[Sizes], dict[str, int]]
    eager: Callable[[Sizes], tuple[Callable, tuple]]
    backward: bool = False
    kernels: int = 1
    tables: frozenset[str] = frozenset()
    runs: Callable[[Sizes], dict[str, int]] = lambda s: {}
    again: Callable[[Sizes], dict[str, int]] = lambda s: {}


def _rows(s):
    """Tokens that an encoder's block sees."""
    return s.N * (1 + s.K)


def _partial_sums(s, width):
    """One row of fp32 sums for every 16 tokens (for up to 128 where a batch is large)."""
    return F32 * -(-_rows(s) // 16) * width


# A row of a patch, and of a token, is contiguous; it starts at a multiple of 16 bytes.
def _patch_row(s):
    return {"images": 3 * s.patch}


def _attention(where, *, backward=False):
    """Queries, keys and values are packed: all three are read, and their gradients written, where the first starts."""

    def sizes(s):
        return (1 + s.K, s.heads, s.D) if where == "encoder" else (1 + s.L, 16, s.E)

    def rows(s):
        length, _, width = sizes(s)
        return BF16 * s.N * length * width

    def lse(s):
        length, heads, _ = sizes(s)
        return F32 * s.N * heads * length

    def again(s):
        length = sizes(s)[0]
        # Every block of queries reads all keys and values.
        blocks = -(-length // forward_tile(length, length, BF16).queries)
        return {"q": 2 * (blocks - 1) * rows(s)}

    if backward:
        return Op(
            make=inputs.attention_backward(where),
            reads=lambda s: {"q": 3 * rows(s), "grad": rows(s), "lse": lse(s)},
            writes=lambda s: {"dq": 3 * rows(s)},
            eager=inputs.eager_attention(where),
            backward=True,
        )
    return Op(
        make=inputs.attention(where),
        reads=lambda s: {"q": 3 * rows(s)},
        writes=lambda s: {"out": rows(s), "lse": lse(s)},
        eager=inputs.eager_attention(where),
        again=again,
    )


_LOSS = Op(
    make=inputs.loss(full=False),
    reads=lambda s: {
        "pred": BF16 * s.N * s.M * s.P, "images": s.N * s.M * s.P, "ids": I64 * s.N * s.M,
        "mean": F32 * 3, "std": F32 * 3,
    },
    writes=lambda s: {"loss": F32 * s.N * s.M},
    eager=inputs.eager_loss(full=False),
    tables=frozenset({"ids", "mean", "std", "grad"}),
    runs=_patch_row,
)  # fmt: skip

OPS: dict[str, Op] = {
    "random_masking": Op(
        make=inputs.random_masking,
        reads=lambda s: {"sample_ids": I64 * s.N},
        writes=lambda s: {
            "ids_keep": I64 * s.N * s.K, "ids_mask": I64 * s.N * s.M, "ids_restore": I64 * s.N * s.L,
            "mask": F32 * s.N * s.L,
        },
        eager=inputs.eager_masking,
        tables=frozenset({"sample_ids"}),
    ),
    "gather_patches": Op(
        make=inputs.gather_patches,
        reads=lambda s: {
            "images": s.N * s.K * s.P, "ids": I64 * s.N * s.K, "mean": F32 * 3, "std": F32 * 3,
        },
        writes=lambda s: {"out": BF16 * s.N * s.K * s.P},
        eager=inputs.eager_gather_patches,
        tables=frozenset({"ids", "mean", "std"}),
        runs=_patch_row,
    ),
    "gather_patches backward": Op(
        make=inputs.gather_patches_backward,
        reads=lambda s: {"grad": F32 * s.N * s.K * s.P, "ids": I64 * s.N * s.K},
        writes=lambda s: {"grad_images": F32 * s.N * s.L * s.P},
        eager=inputs.eager_gather_patches_backward,
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "gather_tokens": Op(
        make=inputs.gather_tokens,
        reads=lambda s: {"tokens": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.K * s.D},
        eager=lambda s: (take, inputs.token_inputs(s)),
        tables=frozenset({"ids"}),
    ),
    "gather_tokens backward": Op(
        make=inputs.gather_tokens_backward,
        reads=lambda s: {"in": BF16 * s.N * s.K * s.D, "ids": I64 * s.N * s.K},
        writes=lambda s: {"out": BF16 * s.N * s.L * s.D},
        eager=lambda s: (take, inputs.token_inputs(s)),
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens": Op(
        make=inputs.restore_tokens,
        reads=lambda s: {
            "visible": BF16 * s.N * (1 + s.K) * s.E, "mask_token": F32 * s.E, "pos_embed": F32 * (1 + s.L) * s.E,
            "ids_restore": I64 * s.N * s.L,
        },
        writes=lambda s: {"out": F32 * s.N * (1 + s.L) * s.E},
        eager=inputs.eager_restore(),
        tables=frozenset({"mask_token", "pos_embed", "ids_restore"}),
    ),
    "restore_tokens backward, visible": Op(
        make=inputs.restore_backward(0),
        reads=lambda s: {"in": F32 * s.N * (1 + s.K) * s.E, "ids": I64 * s.N * s.L},
        writes=lambda s: {"out": BF16 * s.N * (1 + s.K) * s.E},
        eager=inputs.eager_restore(0),
        backward=True,
        tables=frozenset({"ids"}),
    ),
    "restore_tokens backward, mask token": Op(
        make=inputs.restore_backward(1),
        # One partial sum for every 128 rows.
        reads=lambda s: {"grad": F32 * s.N * s.M * s.E, "ids_restore": I64 * s.N * s.L},
        writes=lambda s: {"partial": F32 * -(-s.N * s.L // 128) * s.E},
        eager=inputs.eager_restore(1),
        backward=True,
        tables=frozenset({"ids_restore"}),
    ),
    "masked_patch_mse": _LOSS,
    "masked_patch_mse, full pred": replace(_LOSS, make=inputs.loss(full=True), eager=inputs.eager_loss(full=True)),
    "masked_patch_mse backward": replace(
        _LOSS,
        make=inputs.loss_backward(full=False),
        reads=lambda s: _LOSS.reads(s) | {"grad": F32 * s.N * s.M},
        writes=lambda s: {"grad_pred": BF16 * s.N * s.M * s.P},
        backward=True,
    ),
    "masked_patch_mse backward, full pred": replace(
        _LOSS,
        make=inputs.loss_backward(full=True),
        reads=lambda s: _LOSS.reads(s) | {"grad": F32 * s.N * s.M},
        writes=lambda s: {"grad_pred": BF16 * s.N * s.L * s.P},
        eager=inputs.eager_loss(full=True),
        backward=True,
    ),
    "norm_linear": Op(
        make=lambda s: inputs.norm_linear_of(s)[0],
        reads=lambda s: {
            "x": F32 * _rows(s) * s.D, "branch": BF16 * _rows(s) * s.D,
            "branch_bias": F32 * s.D, "weight": F32 * s.D, "bias": F32 * s.D,
        },
        writes=lambda s: {
            "x_new": F32 * _rows(s) * s.D, "normed": BF16 * _rows(s) * s.D,
            "mean": F32 * _rows(s), "rstd": F32 * _rows(s),
        },
        eager=inputs.eager_norm(with_bias=False),
        tables=frozenset({"branch_bias", "weight", "bias"}),
    ),
    "norm_linear backward": Op(
        make=inputs.norm_linear_backward,
        reads=lambda s: {
            "grad_normed": BF16 * _rows(s) * s.D, "grad_x_new": F32 * _rows(s) * s.D, "x_new": F32 * _rows(s) * s.D,
            "mean": F32 * _rows(s), "rstd": F32 * _rows(s), "weight": F32 * s.D, "bias": F32 * s.D,
        },
        writes=lambda s: {
            "grad_x": F32 * _rows(s) * s.D, "grad_branch": BF16 * _rows(s) * s.D, "normed": BF16 * _rows(s) * s.D,
            "partial": 3 * _partial_sums(s, s.D),
        },
        eager=inputs.eager_norm(with_bias=True),
        backward=True,
        tables=frozenset({"weight", "bias"}),
    ),
    "gelu_linear": Op(
        make=lambda s: inputs.gelu_linear_of(s)[0],
        reads=lambda s: {"h": BF16 * _rows(s) * 4 * s.D, "bias": F32 * 4 * s.D},
        writes=lambda s: {"out": BF16 * _rows(s) * 4 * s.D},
        eager=inputs.eager_gelu(with_bias=False),
        tables=frozenset({"bias"}),
    ),
    "gelu_linear backward": Op(
        make=inputs.gelu_linear_backward,
        reads=lambda s: {
            "grad": BF16 * _rows(s) * 4 * s.D, "h": BF16 * _rows(s) * 4 * s.D, "bias": F32 * 4 * s.D,
        },
        writes=lambda s: {
            "grad_h": BF16 * _rows(s) * 4 * s.D, "activated": BF16 * _rows(s) * 4 * s.D,
            "partial": _partial_sums(s, 4 * s.D),
        },
        eager=inputs.eager_gelu(with_bias=True),
        backward=True,
        tables=frozenset({"bias"}),
    ),
    "attention, encoder": _attention("encoder"),
    "attention, encoder backward": _attention("encoder", backward=True),
    "attention, decoder": _attention("decoder"),
    "attention, decoder backward": _attention("decoder", backward=True),
}  # fmt: skip
