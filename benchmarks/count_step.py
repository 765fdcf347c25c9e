"""Counts what a training step keeps and moves for each image, next to facebookresearch's; needs no GPU.

    python benchmarks/count_step.py

writes ``benchmarks/results/counted/step.json``; ``report.py`` puts it into docs/counted.md. Nothing is computed: the
step runs on fake tensors, which have shapes and no values. fastmae's kernels are Triton's interpreted ones, so that the
CPU tensors take the path that CUDA tensors take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from traffic import EagerTraffic, is_ours, nbytes  # noqa: E402

from fastmae import reference  # noqa: E402
from fastmae.model import PRESETS, create_model  # noqa: E402
from fastmae.ops import Masking  # noqa: E402

RESULT = ROOT / "benchmarks/results/counted/step.json"
MODELS = {"ViT-B/16": "mae_vit_base_patch16", "ViT-L/16": "mae_vit_large_patch16"}
# An image's share is the difference between these two batches: what a batch needs once (weights) drops out.
SMALL, LARGE = 4, 8
SIDE, RATIO = 224, 0.75


class FusedAttention(reference.Attention):
    """The reference's attention through PyTorch's fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, dim))


class Facebook(reference.MaskedAutoencoder):
    """The reference with the indices of its gathers written out in full, as facebookresearch/mae's ``repeat`` does."""

    def forward_encoder(self, images, mask_ratio, noise=None):
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        n, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = torch.rand(n, length).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = x.gather(1, ids_shuffle[:, :keep, None].repeat(1, 1, dim))
        mask = torch.ones(n, length)
        mask[:, :keep] = 0
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask.gather(1, ids_restore), ids_restore

    def forward_decoder(self, latent, ids_restore):
        x = self.decoder_embed(latent)
        n, rows, dim = x.shape
        patches = torch.cat([x[:, 1:], self.mask_token.repeat(n, ids_restore.shape[1] + 1 - rows, 1)], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].repeat(1, 1, dim))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def build_facebook(name: str, fused: bool) -> nn.Module:
    sizes = {key: value for key, value in PRESETS[name].items() if key != "patch_size"}
    model = Facebook(patch_size=(PRESETS[name]["patch_size"],) * 2, norm_pix_loss=True, **sizes)
    for module in model.modules():
        if fused and type(module) is reference.Attention:
            module.__class__ = FusedAttention
    return model


class ParameterDerived(TorchDispatchMode):
    """Follows what is computed from parameters and buffers alone, such as their low-precision copies."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tensors = [*model.parameters(), *model.buffers()]
        self.storages = {_storage(tensor) for tensor in self.tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if inputs and all(_storage(t) in self.storages for t in inputs):
            self.tensors += [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.storages |= {_storage(t) for t in self.tensors[-2:]}
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Counts(NamedTuple):
    """Of one step of a batch, bytes."""

    saved: int
    """Distinct storages kept for the backward; parameters, what derives from them alone, and the images are none."""
    forward: int
    backward: int


def count(name: str, who: str, batch: int) -> Counts:
    """``who``: "facebookresearch" or "fastmae", then a comma and the backend of attention."""
    family, attention = who.split(", ")
    with FakeTensorMode():
        if family == "fastmae":
            model = create_model(name, norm_pix_loss=True, seed=0, attention=attention)
            images = torch.empty(batch, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            masking = _masking(batch, model.num_patches)
            forward = lambda: model(images, masking=masking, full_pred=False).loss  # noqa: E731
        else:
            model = build_facebook(name, fused=attention == "sdpa")
            images = torch.empty(batch, 3, SIDE, SIDE)
            forward = lambda: model(images, RATIO)[0]  # noqa: E731
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved.setdefault(_storage(tensor), tensor)
            return tensor

        with EagerTraffic(FORMULAS, opens=_is_plain_attention) as traffic, ParameterDerived(model) as derived:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
                loss = forward()
            moved_forward = traffic.bytes
            loss.backward()
        kept = [t for key, t in saved.items() if key not in derived.storages | {_storage(images)}]
        size = sum(t.untyped_storage().nbytes() for t in kept)
        return Counts(size, moved_forward, traffic.bytes - moved_forward)


def _masking(n: int, length: int) -> Masking:
    kept = int(length * (1 - RATIO))
    ids = (torch.empty(n, size, dtype=torch.int64) for size in (kept, length - kept, length))
    return Masking(*ids, torch.empty(n, length))


def _is_plain_attention(func: torch._ops.OpOverload) -> bool:
    """It is PyTorch operators one after another; the other ops are kernels, whose bytes are those of the budgets."""
    return is_ours(func) and "plain_attention" in func.name()


# Bytes of the ops that do not read all of an argument, or that write something in between. The rest read their inputs
# and write their outputs. ``i`` are the inputs by the names of the op's schema, ``o`` its outputs.


def _formula(count_bytes):
    def formula(func, args, kwargs, out):
        names = [argument.name for argument in func._schema.arguments]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return count_bytes(inputs, [t for t in tree_leaves(out) if isinstance(t, Tensor)])

    return formula


def _all(*tensors: Tensor | None) -> int:
    return sum(nbytes(t) for t in tensors if t is not None)


def _as(tensor: Tensor, like: Tensor) -> int:
    """Bytes of tensor's elements in the dtype of another."""
    return tensor.numel() * like.element_size()


def _weight(i: dict) -> int:
    """The low-precision copy where there is one, else the weight and the copy made of it."""
    return _all(i["weight"] if i.get("weight_cast") is None else i["weight_cast"])


def _norm_linear(i, o):
    x, out = i["x"], o[0] if i.get("branch") is None else o[1]
    normed = _as(x, out)
    return _all(x, i.get("branch"), *o) + 2 * normed + _weight(i)


def _norm_linear_backward(i, o):
    grad, x = i["grad_out"], i["x_new"]
    products_read = (3 if o[4].numel() else 2) * nbytes(grad)
    # The gradient of the normed rows, and these rows again: written, and read by the next pass or product.
    between = 4 * _as(x, grad)
    return products_read + between + _all(i["grad_x_new"], x, i["mean"], i["rstd"], i["weight"], *o)


def _gelu_linear(i, o):
    return _all(i["h"], *o) + 2 * _as(i["h"], o[0]) + _weight(i)


def _gelu_linear_backward(i, o):
    grad, h = i["grad"], i["h"]
    return (3 if o[3].numel() else 2) * nbytes(grad) + 4 * _as(h, grad) + _all(h, i["weight"], *o)


def _attention_backward(i, o):
    grad, *_, heads, dim = i["grad"], *i["grad"].shape
    # Of each image a part of the bias's gradient in float32, which the kernel writes and a sum reads.
    between = 0 if i["bias_dtype"] is None else 2 * len(grad) * 3 * heads * dim * 4
    return _all(grad, i["lse"], i.get("qkv"), i.get("q"), i.get("kv"), *o) + between


def _masked_tokens(i):
    grad = i["grad"]
    rows = grad.shape[1] - i["num_prefix"] - i["num_visible"]
    return grad.shape[0] * rows * grad.shape[2] * grad.element_size()


_BYTES = {
    "gather_patches": lambda i, o: _all(i["ids"], *o) + _as(o[0], i["images"]),
    "gather_tokens": lambda i, o: _all(i["ids"], *o, *o),
    "masked_patch_mse": lambda i, o: _all(i["pred"], i["ids_mask"], *o) + _as(i["pred"], i["images"]),
    "masked_patch_mse_backward": lambda i, o: (
        _all(i["grad"], i["pred"], i["ids_mask"], *o) + _as(i["pred"], i["images"])
    ),
    "restore_tokens_backward_visible": lambda i, o: _all(i["ids_restore"], *o) + _as(o[0], i["grad"]),
    "restore_tokens_backward_mask_token": lambda i, o: _all(i["ids_restore"], *o) + _masked_tokens(i),
    "norm_linear": _norm_linear,
    "add_norm_linear": _norm_linear,
    "norm_linear_backward": _norm_linear_backward,
    "gelu_linear": _gelu_linear,
    "gelu_linear_backward": _gelu_linear_backward,
    "triton_attention_qkvpacked_backward": _attention_backward,
    "triton_attention_kvpacked_backward": _attention_backward,
    "linear": lambda i, o: _all(i["x"], *o) + _weight(i),
    "linear_backward": lambda i, o: (3 if o[2].numel() else 2) * nbytes(i["grad"]) + _all(i["x"], i["weight"], *o),
}
FORMULAS = {getattr(torch.ops.fastmae, name).default: _formula(formula) for name, formula in _BYTES.items()}


COMPETITORS = (
    "facebookresearch, plain", "facebookresearch, sdpa", "fastmae, plain", "fastmae, sdpa", "fastmae, triton"
)  # fmt: skip


def per_image(name: str, who: str) -> dict[str, float]:
    """What one image more costs, in megabytes (10^6 bytes)."""
    small, large = (count(name, who, batch) for batch in (SMALL, LARGE))
    return {
        key: round((getattr(large, key) - getattr(small, key)) / (LARGE - SMALL) / 1e6, 3) for key in Counts._fields
    }


def main() -> None:
    from fastmae.ops import _dispatch

    if not _dispatch.is_interpreted():
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return
    results = {
        "torch": torch.__version__.split("+")[0],
        "models": {label: {who: per_image(name, who) for who in COMPETITORS} for label, name in MODELS.items()},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
