"""Every kernel as the training step launches it, with what its code may cost. A new kernel is one line of ``LINES``.

A line is compiled from a real call of the op: block shapes, strides and alignment are those that the op would launch.
Bounds hold for every target (registers: a little above the most that any takes, since compilers differ by a few), and
``amd`` replaces those that differ there. Where the widest access is 128 bits, so is all bulk data: ``few`` counts the
narrower instructions that are left for indices, numbers that there is one of a row, and parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module

import pytest
import torch
from cross_compile import Compiled, Launch, record_launches
from traffic_cases import OPS, VIT_B, gradient_of, masking_of

from fastmae import ops
from fastmae.ops import _attention_triton

# Masks are inputs of the other ops, so theirs is the one kernel that is not recorded with the rest. The package's names
# of some of these are the functions.
MASKING = [import_module("fastmae.ops.masking")]
OTHERS = [
    import_module(f"fastmae.ops.{name}")
    for name in (
        "gather_patches", "masked_patch_mse", "gather_tokens", "restore_tokens", "norm_linear", "_add_norm",
        "gelu_linear", "_attention_triton",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A kernel in one use.

    Attributes:
        kernel: its name without ``_kernel``.
        make: builds the inputs, and may run the op; what it returns is called.
        registers: a thread's, at most.
        few: how many loads and stores may be narrower than the widest.
        load, store: bits of the widest access, at least.
        narrowest: bits of the narrowest access, at least.
        amd: the bounds that are others on AMD.
    """

    kernel: str
    make: Callable[[], Callable[[], object]]
    registers: int
    few: tuple[int, int] = (0, 0)
    load: int = 128
    store: int = 128
    narrowest: int = 32
    amd: dict[str, object] = field(default_factory=dict)

    def on(self, target: str) -> Line:
        return replace(self, **self.amd) if target.startswith("gfx") else self

    def launch(self, target: str) -> Launch:
        """What the op launches on the target."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
            patch.setattr(_attention_triton, "_has_warpgroup_products", lambda: target in ("sm_90", "sm_100"))
            recorded = record_launches(patch, *(MASKING if "masking" in self.kernel else OTHERS))
            self.make()()
        return [launch for launch in recorded if launch.kernel.__name__ == f"{self.kernel}_kernel"][-1]

    def excess(self, code: Compiled) -> list[str]:
        """What of the accesses is narrower than the line says, in words."""
        found = []
        for what, accesses, wide, few in (
            ("load", code.loads, self.load, self.few[0]),
            ("store", code.stores, self.store, self.few[1]),
        ):
            if wide and max(accesses, default=0) < wide:
                found.append(f"widest {what} {max(accesses, default=0)}, not {wide} bits")
            if min(accesses, default=128) < self.narrowest:
                found.append(f"narrowest {what} {min(accesses)}, not {self.narrowest} bits")
            narrower = sum(n for bits, n in accesses.items() if bits < wide)
            if narrower > few:
                found.append(f"{narrower} {what}s of less than {wide} bits, not {few}")
        return found


@cache
def compiled(name: str, target: str) -> Compiled:
    return LINES[name].launch(target).compile(target)


def _op(name, **sizes):
    return partial(OPS[name].call, VIT_B._replace(**sizes))


def _masking(strategy):
    grid, ids = (None if strategy == "random" else (14, 14)), torch.arange(2)
    options = {"seed": 1, "sample_ids": ids, "strategy": strategy, "grid_size": grid, "masks_per_image": 2}
    return lambda: lambda: ops.random_masking(2, 196, 0.75, **options)


def _gather_float32():
    tokens = torch.randn(VIT_B.N, VIT_B.L, VIT_B.E, requires_grad=True)
    return gradient_of(ops.gather_tokens(tokens, masking_of(VIT_B).ids_keep), tokens)


def _restore(dtype, table=False):
    """Mask token, or a table of one per position, and positions in one dtype, which is also the result's."""

    def make():
        visible = torch.randn(VIT_B.N, 1 + VIT_B.K, VIT_B.E).bfloat16().requires_grad_()
        token = torch.randn(1, VIT_B.L if table else 1, VIT_B.E).to(dtype).requires_grad_()
        positions = torch.randn(1, 1 + VIT_B.L, VIT_B.E).to(dtype)
        out = ops.restore_tokens(visible, token, masking_of(VIT_B).ids_restore, positions, 1)
        return gradient_of(out, visible, token)

    return make


def _attention(queries, keys, dim):
    """As in the model: 16 heads side by side, from one projection or the queries from their own, with its bias."""

    def make():
        bias = torch.empty(3 * 16 * dim, requires_grad=True)
        if queries == keys:
            qkv = torch.empty(2, keys, 3, 16, dim, dtype=torch.bfloat16, requires_grad=True)
            return gradient_of(ops.attention_qkvpacked(qkv, "triton", bias), qkv, bias)
        q = torch.empty(2, queries, 16, dim, dtype=torch.bfloat16, requires_grad=True)
        kv = torch.empty(2, keys, 2, 16, dim, dtype=torch.bfloat16, requires_grad=True)
        return gradient_of(ops.attention_kvpacked(q, kv, "triton", bias), q, kv, bias)

    return make


_BF16, _F32 = torch.bfloat16, torch.float32
_IDS = {"few": (0, 8), "load": 0, "store": 64}
_ROWS = {"few": (4, 0), "narrowest": 64}
_SCATTER = {"few": (2, 0), "narrowest": 64}
_AMD = {"registers": 512, "store": 64}
_LONG_AMD = _AMD | {"few": (6, 1)}
_WIDTHS = (192, 512, 768, 1024, 1280)
# Queries and keys of an encoder (ViT-B and L, H), a decoder (B and L, H), and the last decoder block.
_ENCODER, _ENCODER_H, _DECODER, _DECODER_H, _LAST = (
    _attention(50, 50, 64), _attention(65, 65, 80), _attention(197, 197, 32), _attention(257, 257, 32),
    _attention(147, 197, 32),
)  # fmt: skip

LINES: dict[str, Line] = {
    "random_masking": Line("random_masking", _masking("random"), 104, **_IDS),
    "random_masking, block": Line("block_masking", _masking("block"), 96, **_IDS),
    "random_masking, grid": Line("grid_masking", _masking("grid"), 96, **_IDS),
    "gather_patches": Line("gather_patches_fwd", _op("gather_patches"), 72, (8, 0)),
    "gather_patches backward": Line(
        "gather_patches_bwd", _op("gather_patches backward"), 80, (28, 0), narrowest=64
    ),
    **{
        name: Line("masked_patch_mse_fwd", _op(name), 72, (8, 0), store=32)
        for name in ("masked_patch_mse", "masked_patch_mse, full pred")
    },
    **{
        name: Line("masked_patch_mse_bwd", _op(name), 80, few)
        for name, few in (("masked_patch_mse backward", (8, 0)), ("masked_patch_mse backward, full pred", (22, 0)))
    },
    "gather_tokens": Line("gather_tokens", _op("gather_tokens"), 48, **_ROWS),
    "gather_tokens backward": Line("scatter_tokens", _op("gather_tokens backward"), 88, **_SCATTER),
    "gather_tokens, float32": Line("gather_tokens", _gather_float32, 48, **_ROWS),
    "gather_tokens backward, float32": Line("scatter_tokens", _gather_float32, 88, **_SCATTER),
    "restore_tokens": Line("restore_tokens", _restore(_F32), 48, (2, 0), narrowest=64),
    "restore_tokens, bfloat16": Line("restore_tokens", _restore(_BF16), 64, (5, 0)),
    "restore_tokens, table": Line("restore_tokens", _restore(_F32, True), 48, (2, 0)),
    "restore_tokens, table, bfloat16": Line("restore_tokens", _restore(_BF16, True), 64, (4, 0)),
    "restore_tokens backward, visible": Line("scatter_tokens", _restore(_F32), 88, **_SCATTER),
    "restore_tokens backward, visible, bfloat16": Line("scatter_tokens", _restore(_BF16), 88, **_SCATTER),
    "restore_tokens backward, mask token": Line(
        "mask_token_grad", _restore(_F32), 56, **_ROWS, amd={"store": 64}
    ),
    "restore_tokens backward, mask token, bfloat16": Line(
        "mask_token_grad", _restore(_BF16), 56, **_SCATTER, amd={"store": 64}
    ),
    "restore_tokens backward, table": Line("mask_table_grad", _restore(_F32, True), 56, **_ROWS),
    "restore_tokens backward, table, bfloat16": Line("mask_table_grad", _restore(_BF16, True), 48, **_SCATTER),
    # Two narrow stores of the forward are mean and rstd.
    **{
        f"norm_linear, {width} wide": Line(
            "add_norm_fwd", _op("norm_linear backward", D=width), 72, (3, 2) if width == 192 else (0, 2),
            amd={"few": (3, 2)},
        )
        for width in _WIDTHS
    },
    **{
        f"norm_linear backward, {width} wide": Line(
            "add_norm_bwd", _op("norm_linear backward", D=width), 128, (4, 3) if width == 192 else (2, 0),
            amd={"few": (5, 5)},
        )
        for width in _WIDTHS
    },
    **{
        f"gelu_linear, {4 * width} wide": Line(
            "bias_gelu_fwd", _op("gelu_linear backward", D=width), 80, (1, 0) if width == 192 else (0, 0)
        )
        for width in _WIDTHS
    },
    **{
        f"gelu_linear backward, {4 * width} wide": Line(
            "bias_gelu_bwd", _op("gelu_linear backward", D=width), 112, (1, 1) if width == 192 else (0, 0)
        )
        for width in _WIDTHS
    },
    "attention, 50 of 64": Line("attention_fwd", _ENCODER, 128, (0, 1), amd=_AMD),
    "attention, 65 of 80": Line("attention_fwd", _ENCODER_H, 160, (4, 1), narrowest=16, amd=_AMD),
    "attention, 197 of 32": Line("attention_fwd", _DECODER, 255, (0, 1), amd=_LONG_AMD),
    "attention, 257 of 32": Line("attention_fwd", _DECODER_H, 255, (4, 1), amd=_LONG_AMD),
    "attention, 147 to 197 of 32": Line("attention_fwd", _LAST, 255, (0, 1), amd=_LONG_AMD),
    # The narrow loads of the backward are lse, one number per query; three narrow stores are the bias's gradient.
    "attention backward, 50 of 64": Line("attention_bwd", _ENCODER, 240, (16, 3), amd=_AMD),
    "attention backward, 65 of 80": Line("attention_bwd", _ENCODER_H, 255, (7, 5), narrowest=16, amd=_AMD),
    "attention backward, 197 of 32": Line("attention_bwd", _DECODER, 255, (34, 4), amd=_AMD),
    "attention backward, 257 of 32": Line("attention_bwd", _DECODER_H, 255, (48, 6), narrowest=16, amd=_AMD),
    "attention backward, 147 to 197 of 32": Line("attention_bwd", _LAST, 255, (34, 4), amd=_AMD),
}  # fmt: skip
"""By what is compiled: training shapes of ViT-B/16 where nothing else is said."""
