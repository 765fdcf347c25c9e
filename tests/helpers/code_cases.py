"""Every kernel as the training step launches it, with what its code may cost. A new kernel is one line of ``LINES``.

A line is compiled from a real call of the op: block shapes, strides and alignment are those that the op would launch.
Bounds hold for every target (registers: a little above the most that any takes, since compilers differ by a few), and
``amd`` replaces those that differ there. Where the widest access is 128 bits, so is all bulk data: ``few`` counts the
narrower instructions that are left for indices, numbers that there is one of a row, and parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module

import pytest
import torch
import traffic_inputs as inputs
from cross_compile import Compiled, Launch, record_launches
from traffic_inputs import VIT_B

from fastmae import ops
from fastmae.ops import _attention_triton

# The package's names of some of these are the functions.
MODULES = {
    "masking": ("masking",),
    "gather_patches": ("gather_patches",),
    "masked_patch_mse": ("masked_patch_mse",),
    "gather_tokens": ("gather_tokens",),
    "restore_tokens": ("restore_tokens", "gather_tokens"),
    "norm_linear": ("norm_linear", "_add_norm"),
    "gelu_linear": ("gelu_linear",),
    "attention": ("_attention_triton",),
}


@dataclass(frozen=True)
class Line:
    """A kernel in one use.

    Attributes:
        op: a key of ``MODULES``.
        kernel: its name without ``_kernel``.
        make: builds the inputs, and may run the op; what it returns is called.
        registers: a thread's, at most.
        load, store: bits of the widest access, at least.
        few: how many loads and stores may be narrower than that.
        narrowest: bits of the narrowest access, at least.
        amd: the bounds that are others on AMD.
    """

    op: str
    kernel: str
    make: Callable[[], Callable[[], object]]
    registers: int
    load: int = 128
    store: int = 128
    few: tuple[int, int] = (0, 0)
    narrowest: int = 32
    amd: dict[str, object] = field(default_factory=dict)

    def on(self, target: str) -> Line:
        return replace(self, **self.amd) if target.startswith("gfx") else self

    def launch(self, target: str) -> Launch:
        """What the op launches on the target."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
            patch.setattr(_attention_triton, "_has_warpgroup_products", lambda: target in ("sm_90", "sm_100"))
            recorded = record_launches(patch, *(import_module(f"fastmae.ops.{name}") for name in MODULES[self.op]))
            self.make()()
        return [launch for launch in recorded if launch.kernel.__name__ == f"{self.kernel}_kernel"][-1]


@cache
def compiled(name: str, target: str) -> Compiled:
    return LINES[name].launch(target).compile(target)


def excess(line: Line, code: Compiled) -> list[str]:
    """What of the accesses is narrower than the line says, in words."""
    found = []
    for what, accesses, wide, few in (
        ("load", code.loads, line.load, line.few[0]),
        ("store", code.stores, line.store, line.few[1]),
    ):
        if wide and max(accesses, default=0) < wide:
            found.append(f"widest {what} {max(accesses, default=0)}, not {wide} bits")
        if min(accesses, default=128) < line.narrowest:
            found.append(f"narrowest {what} {min(accesses)}, not {line.narrowest} bits")
        narrower = sum(n for bits, n in accesses.items() if bits < wide)
        if narrower > few:
            found.append(f"{narrower} {what}s of less than {wide} bits, not {few}")
    return found


def _masking(strategy):
    grid, ids = (None if strategy == "random" else (14, 14)), torch.arange(2)
    options = {"seed": 1, "sample_ids": ids, "strategy": strategy, "grid_size": grid, "masks_per_image": 2}
    return lambda: lambda: ops.random_masking(2, 196, 0.75, **options)


def _at(make, sizes=VIT_B):
    return lambda: make(sizes)


def _gather_float32(s):
    tokens = torch.randn(s.N, s.L, s.E, requires_grad=True)
    return inputs.gradient_of(ops.gather_tokens(tokens, inputs.masking_of(s).ids_keep), tokens)


def _restore(dtype, table=False):
    """Mask token, or a table of one a position, and positions in one dtype: that of the result and of the gradient."""

    def make():
        visible, token, positions, ids = inputs.restore_inputs(VIT_B, 0)
        token = token.expand(1, VIT_B.L if table else 1, -1).to(dtype, copy=True).requires_grad_()
        out = ops.restore_tokens(visible, token, ids, positions.to(dtype), 1)
        return inputs.gradient_of(out, visible, token)

    return make


def _attention(queries, keys, dim):
    """As in the model: 16 heads side by side, from one projection or the queries from their own, with its bias."""

    def make():
        bias = torch.empty(3 * 16 * dim, requires_grad=True)
        if queries == keys:
            qkv = torch.empty(2, keys, 3, 16, dim, dtype=torch.bfloat16, requires_grad=True)
            return inputs.gradient_of(ops.attention_qkvpacked(qkv, "triton", bias), qkv, bias)
        q = torch.empty(2, queries, 16, dim, dtype=torch.bfloat16, requires_grad=True)
        kv = torch.empty(2, keys, 2, 16, dim, dtype=torch.bfloat16, requires_grad=True)
        return inputs.gradient_of(ops.attention_kvpacked(q, kv, "triton", bias), q, kv, bias)

    return make


_BF16, _F32 = torch.bfloat16, torch.float32
_IDS = {"load": 0, "store": 64, "few": (0, 8)}
# The residual stream's norm and the MLP by width; stores of the forward's narrow two are mean and rstd.
_NORM = {d: _at(inputs.norm_linear_backward, VIT_B._replace(D=d)) for d in (192, 512, 768, 1024, 1280)}
_GELU = {d: _at(inputs.gelu_linear_backward, VIT_B._replace(D=d)) for d in _NORM}
_NORM_AMD = {"few": (5, 5)}
# Queries and keys of an encoder (ViT-B and L, H), a decoder (B and L, H), and the last decoder block.
_ENCODER, _ENCODER_H, _DECODER, _DECODER_H, _LAST = (
    _attention(50, 50, 64), _attention(65, 65, 80), _attention(197, 197, 32), _attention(257, 257, 32),
    _attention(147, 197, 32),
)  # fmt: skip
_ATTENTION_AMD = {"registers": 512, "store": 64}
_LONG_AMD = _ATTENTION_AMD | {"few": (6, 1)}

LINES: dict[str, Line] = {
    "random_masking": Line("masking", "random_masking", _masking("random"), 104, **_IDS),
    "random_masking, block": Line("masking", "block_masking", _masking("block"), 96, **_IDS),
    "random_masking, grid": Line("masking", "grid_masking", _masking("grid"), 96, **_IDS),
    "gather_patches": Line("gather_patches", "gather_patches_fwd", _at(inputs.gather_patches), 72, few=(8, 0)),
    "gather_patches backward": Line(
        "gather_patches", "gather_patches_bwd", _at(inputs.gather_patches_backward), 80, few=(28, 0), narrowest=64
    ),
    "masked_patch_mse": Line(
        "masked_patch_mse", "masked_patch_mse_fwd", _at(inputs.loss(full=False)), 72, store=32, few=(8, 0)
    ),
    "masked_patch_mse, full pred": Line(
        "masked_patch_mse", "masked_patch_mse_fwd", _at(inputs.loss(full=True)), 72, store=32, few=(8, 0)
    ),
    "masked_patch_mse backward": Line(
        "masked_patch_mse", "masked_patch_mse_bwd", _at(inputs.loss_backward(full=False)), 80, few=(8, 0)
    ),
    "masked_patch_mse backward, full pred": Line(
        "masked_patch_mse", "masked_patch_mse_bwd", _at(inputs.loss_backward(full=True)), 80, few=(22, 0)
    ),
    "gather_tokens": Line("gather_tokens", "gather_tokens", _at(inputs.gather_tokens), 48, few=(4, 0), narrowest=64),
    "gather_tokens backward": Line(
        "gather_tokens", "scatter_tokens", _at(inputs.gather_tokens_backward), 88, few=(2, 0), narrowest=64
    ),
    "gather_tokens, float32": Line(
        "gather_tokens", "gather_tokens", _at(_gather_float32), 48, few=(4, 0), narrowest=64
    ),
    "gather_tokens backward, float32": Line(
        "gather_tokens", "scatter_tokens", _at(_gather_float32), 88, few=(2, 0), narrowest=64
    ),
    "restore_tokens": Line("restore_tokens", "restore_tokens", _restore(_F32), 48, few=(2, 0), narrowest=64),
    "restore_tokens, bfloat16": Line("restore_tokens", "restore_tokens", _restore(_BF16), 64, few=(5, 0)),
    "restore_tokens, table": Line("restore_tokens", "restore_tokens", _restore(_F32, True), 48, few=(2, 0)),
    "restore_tokens, table, bfloat16": Line("restore_tokens", "restore_tokens", _restore(_BF16, True), 64, few=(4, 0)),
    "restore_tokens backward, visible": Line(
        "restore_tokens", "scatter_tokens", _restore(_F32), 88, few=(2, 0), narrowest=64
    ),
    "restore_tokens backward, visible, bfloat16": Line(
        "restore_tokens", "scatter_tokens", _restore(_BF16), 88, few=(2, 0), narrowest=64
    ),
    "restore_tokens backward, mask token": Line(
        "restore_tokens", "mask_token_grad", _restore(_F32), 56, few=(4, 0), narrowest=64, amd={"store": 64}
    ),
    "restore_tokens backward, mask token, bfloat16": Line(
        "restore_tokens", "mask_token_grad", _restore(_BF16), 56, few=(2, 0), narrowest=64, amd={"store": 64}
    ),
    "restore_tokens backward, table": Line(
        "restore_tokens", "mask_table_grad", _restore(_F32, True), 56, few=(4, 0), narrowest=64
    ),
    "restore_tokens backward, table, bfloat16": Line(
        "restore_tokens", "mask_table_grad", _restore(_BF16, True), 48, few=(2, 0), narrowest=64
    ),
    "norm_linear, 192 wide": Line("norm_linear", "add_norm_fwd", _NORM[192], 72, few=(3, 2)),
    "norm_linear, 512 wide": Line("norm_linear", "add_norm_fwd", _NORM[512], 72, few=(0, 2), amd={"few": (3, 2)}),
    "norm_linear, 768 wide": Line("norm_linear", "add_norm_fwd", _NORM[768], 72, few=(0, 2)),
    "norm_linear, 1024 wide": Line("norm_linear", "add_norm_fwd", _NORM[1024], 72, few=(0, 2)),
    "norm_linear, 1280 wide": Line("norm_linear", "add_norm_fwd", _NORM[1280], 72, few=(0, 2)),
    "norm_linear backward, 192 wide": Line("norm_linear", "add_norm_bwd", _NORM[192], 112, few=(4, 3), amd=_NORM_AMD),
    "norm_linear backward, 512 wide": Line("norm_linear", "add_norm_bwd", _NORM[512], 128, few=(2, 0), amd=_NORM_AMD),
    "norm_linear backward, 768 wide": Line("norm_linear", "add_norm_bwd", _NORM[768], 128, few=(2, 0), amd=_NORM_AMD),
    "norm_linear backward, 1024 wide": Line("norm_linear", "add_norm_bwd", _NORM[1024], 128, few=(2, 0), amd=_NORM_AMD),
    "norm_linear backward, 1280 wide": Line("norm_linear", "add_norm_bwd", _NORM[1280], 128, few=(2, 0), amd=_NORM_AMD),
    "gelu_linear, 768 wide": Line("gelu_linear", "bias_gelu_fwd", _GELU[192], 80, few=(1, 0)),
    "gelu_linear, 2048 wide": Line("gelu_linear", "bias_gelu_fwd", _GELU[512], 80, narrowest=128),
    "gelu_linear, 3072 wide": Line("gelu_linear", "bias_gelu_fwd", _GELU[768], 80, narrowest=128),
    "gelu_linear, 4096 wide": Line("gelu_linear", "bias_gelu_fwd", _GELU[1024], 80, narrowest=128),
    "gelu_linear, 5120 wide": Line("gelu_linear", "bias_gelu_fwd", _GELU[1280], 80, narrowest=128),
    "gelu_linear backward, 768 wide": Line("gelu_linear", "bias_gelu_bwd", _GELU[192], 96, few=(1, 1)),
    "gelu_linear backward, 2048 wide": Line("gelu_linear", "bias_gelu_bwd", _GELU[512], 112, narrowest=128),
    "gelu_linear backward, 3072 wide": Line("gelu_linear", "bias_gelu_bwd", _GELU[768], 112, narrowest=128),
    "gelu_linear backward, 4096 wide": Line("gelu_linear", "bias_gelu_bwd", _GELU[1024], 112, narrowest=128),
    "gelu_linear backward, 5120 wide": Line("gelu_linear", "bias_gelu_bwd", _GELU[1280], 112, narrowest=128),
    "attention, 50 of 64": Line("attention", "attention_fwd", _ENCODER, 128, few=(0, 1), amd=_ATTENTION_AMD),
    "attention, 65 of 80": Line(
        "attention", "attention_fwd", _ENCODER_H, 160, few=(4, 1), narrowest=16, amd=_ATTENTION_AMD
    ),
    "attention, 197 of 32": Line("attention", "attention_fwd", _DECODER, 255, few=(0, 1), amd=_LONG_AMD),
    "attention, 257 of 32": Line("attention", "attention_fwd", _DECODER_H, 255, few=(4, 1), amd=_LONG_AMD),
    "attention, 147 to 197 of 32": Line("attention", "attention_fwd", _LAST, 255, few=(0, 1), amd=_LONG_AMD),
    # The narrow loads of the backward are lse, one number per query; three narrow stores are the bias's gradient.
    "attention backward, 50 of 64": Line("attention", "attention_bwd", _ENCODER, 240, few=(16, 3), amd=_ATTENTION_AMD),
    "attention backward, 65 of 80": Line(
        "attention", "attention_bwd", _ENCODER_H, 255, few=(7, 5), narrowest=16, amd=_ATTENTION_AMD
    ),
    "attention backward, 197 of 32": Line("attention", "attention_bwd", _DECODER, 255, few=(34, 4), amd=_ATTENTION_AMD),
    "attention backward, 257 of 32": Line(
        "attention", "attention_bwd", _DECODER_H, 255, few=(48, 6), narrowest=16, amd=_ATTENTION_AMD
    ),
    "attention backward, 147 to 197 of 32": Line(
        "attention", "attention_bwd", _LAST, 255, few=(34, 4), amd=_ATTENTION_AMD
    ),
}
"""By what is compiled: training shapes of ViT-B/16 where nothing else is said."""
