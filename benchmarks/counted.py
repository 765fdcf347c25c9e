"""Counts, instead of timing: bytes that ops and training steps move, and what the compiled kernels need. No GPU.

    python benchmarks/counted.py traffic    # each op, next to eager and compiled PyTorch
    python benchmarks/counted.py step       # a training step, next to facebookresearch's
    python benchmarks/counted.py code       # registers, shared memory, spills and access widths; a few minutes

Each writes its file in ``benchmarks/results/counted``; ``report.py`` puts bytes into docs/counted.md. The numbers are
the same on every machine; they belong to the versions of PyTorch and Triton that the files name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from facebook import Changes, FacebookMAE  # noqa: E402
from traffic import SECTOR, EagerTraffic, Moved, compiled_traffic, counted_traffic, is_ours, nbytes  # noqa: E402
from traffic_cases import OPS, VIT_B, VIT_H, VIT_L, Op, Sizes  # noqa: E402

from fastmae.model import create_model  # noqa: E402
from fastmae.ops import Masking, _dispatch  # noqa: E402

TRAFFIC, STEP, CODE = (ROOT / f"benchmarks/results/counted/{name}.json" for name in ("traffic", "step", "code"))

# --- The traffic of each op -------------------------------------------------------------------------------------------

# What depends on the encoder's width: the rest of ViT-L is that of ViT-B.
ENCODER = ("gather_tokens", "norm_linear", "gelu_linear", "attention, encoder")
# An image's share is the difference between these two batches: what is read once per launch drops out.
SMALL, LARGE = 2, 4


def count_ours(op: Op, sizes: Sizes) -> dict[str, int]:
    """Totals of a batch, counted in Triton's interpreter, and the small PyTorch operators around the kernels."""
    call = op.call(sizes)
    with counted_traffic() as traffic, EagerTraffic() as around:
        call()
    moved = [*traffic.reads.items(), *traffic.writes.items()]
    products = sum(around.launches_by_op[name] for name in ("aten.mm.default", "aten.addmm.default"))
    return {
        "budget": sum(op.reads(sizes).values()) + sum(op.writes(sizes).values()),
        "bytes": sum(m.unique if name in op.tables else m.accessed for name, m in moved),
        "from cache": sum(m.accessed - m.unique for name, m in moved if name in op.tables),
        "sector bytes": SECTOR * sum((m for _, m in moved), Moved()).sectors,
        "kernels": traffic.launches,
        "operators around": around.launches - products,
    }


def count_eager(op: Op, sizes: Sizes) -> dict[str, int]:
    call = op.call(sizes, plain=True)
    with EagerTraffic() as traffic:
        call()
    return {"bytes": traffic.bytes, "launches": traffic.launches}


def count_compiled(op: Op, sizes: Sizes) -> dict[str, int]:
    _, plain, inputs = op.pair(sizes)
    scheduled = compiled_traffic(plain, *inputs)[op.backward]
    return {"bytes": scheduled.bytes, "launches": scheduled.launches}


COUNTERS = {"fastmae": count_ours, "eager": count_eager, "compiled": count_compiled}


def op_traffic(name: str, sizes: Sizes, who: str) -> dict[str, float]:
    """Bytes per image, bytes once per launch, and launches."""
    torch.manual_seed(0)
    small, large = (COUNTERS[who](OPS[name], sizes._replace(N=n)) for n in (SMALL, LARGE))
    found: dict[str, float] = {}
    for key in small:
        if key in ("kernels", "launches", "operators around"):
            found[key] = large[key]
        else:
            found[key] = (large[key] - small[key]) / (LARGE - SMALL)
            if key in ("budget", "bytes"):
                found[f"{key} once"] = large[key] - LARGE * found[key]
    return found


def traffic() -> dict:
    models = {}
    for model, sizes in {"ViT-B/16": VIT_B, "ViT-L/16": VIT_L, "ViT-H/14": VIT_H}.items():
        names = [name for name in OPS if model != "ViT-L/16" or name.startswith(ENCODER)]
        models[model] = {name: {who: op_traffic(name, sizes, who) for who in COUNTERS} for name in names}
    return {"torch": torch.__version__.split("+")[0], "models": models}


# --- A training step --------------------------------------------------------------------------------------------------

COMPETITORS = (
    "facebookresearch, plain", "facebookresearch, sdpa", "fastmae, plain", "fastmae, sdpa", "fastmae, triton",
    "fastmae with mask tokens in the encoder, sdpa",
)  # fmt: skip
SIDE, RATIO = 224, 0.75


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


def step_bytes(name: str, who: str, batch: int) -> dict[str, int]:
    """Of one step: what is saved for the backward, and what forward and backward move.

    Nothing is computed: the step runs on fake tensors, which have shapes and no values. Saved are distinct storages
    except parameters, what derives from them alone, and the images.

    ``who``: one of ``COMPETITORS``; after the comma the backend of attention.
    """
    family, attention = who.split(", ")
    with FakeTensorMode():
        tokens = family.endswith("mask tokens in the encoder")
        model = create_model(name, norm_pix_loss=True, seed=0, attention=attention, encoder_mask_tokens=tokens)
        if family.startswith("fastmae"):
            images = torch.empty(batch, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            kept = int(model.num_patches * (1 - RATIO))
            sizes = kept, model.num_patches - kept, model.num_patches
            ids = (torch.empty(batch, size, dtype=torch.int64) for size in sizes)
            masking = Masking(*ids, torch.empty(batch, model.num_patches))
            forward = lambda: model(images, masking=masking, full_pred=False).loss  # noqa: E731
        else:
            model = FacebookMAE(model, Changes(attention))
            images = torch.empty(batch, 3, SIDE, SIDE)
            forward = lambda: model(images, images, mask_ratio=RATIO)  # noqa: E731
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved.setdefault(_storage(tensor), tensor)
            return tensor

        with EagerTraffic(FORMULAS, opens=_is_plain_attention) as counted, ParameterDerived(model) as derived:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
                loss = forward()
            moved = counted.bytes
            loss.backward()
        mine = [t for key, t in saved.items() if key not in derived.storages | {_storage(images)}]
        size = sum(t.untyped_storage().nbytes() for t in mine)
        return {"saved": size, "forward": moved, "backward": counted.bytes - moved}


def _is_plain_attention(func: torch._ops.OpOverload) -> bool:
    """It is PyTorch operators one after another; the other ops are kernels, whose bytes are those of the budgets."""
    return is_ours(func) and "plain_attention" in func.name()


# Bytes of the ops that do not read all of an argument, or that write something in between. The rest read their inputs
# and write their outputs. ``i`` are the inputs by the names of the op's schema (None if not given), ``o`` its outputs.


def _formula(count_bytes):
    def formula(func, args, kwargs, out):
        names = [argument.name for argument in func._schema.arguments]
        inputs = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
        return count_bytes(inputs, [t for t in tree_leaves(out) if isinstance(t, Tensor)])

    return formula


def _all(*tensors: Tensor | None) -> int:
    return sum(nbytes(t) for t in tensors if t is not None)


def _as(tensor: Tensor, like: Tensor) -> int:
    """Bytes of tensor's elements in the dtype of another."""
    return tensor.numel() * like.element_size()


def _weight(i) -> int:
    """The low-precision copy where there is one, else the weight and the copy made of it."""
    return _all(i["weight"] if i["weight_cast"] is None else i["weight_cast"])


def _products(grad, grad_bias) -> int:
    """The products of a linear layer's backward read the gradient twice, and its bias's sum once more."""
    return (3 if grad_bias.numel() else 2) * nbytes(grad)


def _norm_linear_backward(i, o):
    # The gradient of the normed rows, and these rows again: written, and read by the next pass or product.
    between = 4 * _as(i["x_new"], i["grad_out"])
    read = _all(i["grad_x_new"], i["x_new"], i["mean"], i["rstd"], i["weight"])
    return _products(i["grad_out"], o[4]) + between + read + _all(*o)


def _gelu_linear_backward(i, o):
    return _products(i["grad"], o[3]) + 4 * _as(i["h"], i["grad"]) + _all(i["h"], i["weight"], *o)


def _attention_backward(i, o):
    grad, *_, heads, dim = i["grad"], *i["grad"].shape
    # Of each image a part of the bias's gradient in float32, which the kernel writes and a sum reads.
    between = 0 if i["bias_dtype"] is None else 2 * len(grad) * 3 * heads * dim * 4
    return _all(grad, i["lse"], i.get("qkv"), i.get("q"), i.get("kv"), *o) + between


def _mask_token(i, o):
    n, rows, dim = i["grad"].shape
    masked = n * (rows - i["num_prefix"] - i["num_visible"]) * dim
    return _all(i["ids_restore"], *o) + masked * i["grad"].element_size()


def _masked_pixels(i, o):
    return _all(i.get("grad"), i["pred"], i["ids_mask"], *o) + _as(i["pred"], i["images"])


_BYTES = {
    "gather_patches": lambda i, o: _all(i["ids"], *o) + _as(o[0], i["images"]),
    "gather_tokens": lambda i, o: _all(i["ids"], *o, *o),
    "masked_patch_mse": _masked_pixels,
    "masked_patch_mse_backward": _masked_pixels,
    "restore_tokens_backward_visible": lambda i, o: _all(i["ids_restore"], *o) + _as(o[0], i["grad"]),
    "restore_tokens_backward_mask_token": _mask_token,
    "norm_linear": lambda i, o: _all(i["x"], *o) + 2 * _as(i["x"], o[0]) + _weight(i),
    "add_norm_linear": lambda i, o: _all(i["x"], i["branch"], *o) + 2 * _as(i["x"], o[1]) + _weight(i),
    "norm_linear_backward": _norm_linear_backward,
    "gelu_linear": lambda i, o: _all(i["h"], *o) + 2 * _as(i["h"], o[0]) + _weight(i),
    "gelu_linear_backward": _gelu_linear_backward,
    "triton_attention_qkvpacked_backward": _attention_backward,
    "triton_attention_kvpacked_backward": _attention_backward,
    "linear": lambda i, o: _all(i["x"], *o) + _weight(i),
    "linear_backward": lambda i, o: _products(i["grad"], o[2]) + _all(i["x"], i["weight"], *o),
}
FORMULAS = {getattr(torch.ops.fastmae, name).default: _formula(formula) for name, formula in _BYTES.items()}


def per_image(name: str, who: str) -> dict[str, float]:
    """What one image more costs, in megabytes (10^6 bytes)."""
    small, large = step_bytes(name, who, 4), step_bytes(name, who, 8)
    return {key: round((large[key] - small[key]) / 4 / 1e6, 3) for key in small}


def step() -> dict:
    models = {"ViT-B/16": "mae_vit_base_patch16", "ViT-L/16": "mae_vit_large_patch16"}
    found = {label: {who: per_image(name, who) for who in COMPETITORS} for label, name in models.items()}
    return {"torch": torch.__version__.split("+")[0], "models": found}


# --- The compiled code of each kernel ---------------------------------------------------------------------------------


def code_numbers(code) -> dict[str, object]:
    """What is published of a compiled kernel; widths in bits by number of instructions, as text for JSON's sake."""
    loads, stores = ({str(bits): n for bits, n in sorted(accesses.items())} for accesses in (code.loads, code.stores))
    resources = {key: getattr(code, key) for key in ("registers", "shared", "stack", "spills")}
    return resources | {"loads": loads, "stores": stores}


def code() -> dict:
    import triton
    from code_cases import LINES, compiled
    from cross_compile import TARGETS

    lines = {name: {target: code_numbers(compiled(name, target)) for target in TARGETS} for name in LINES}
    return {"triton": triton.__version__, "lines": lines}


def main() -> None:
    jobs = {"traffic": (traffic, TRAFFIC), "step": (step, STEP), "code": (code, CODE)}
    if len(sys.argv) != 2 or sys.argv[1] not in jobs:
        sys.exit(f"usage: python benchmarks/counted.py {'|'.join(jobs)}")
    if sys.argv[1] != "code" and not _dispatch.is_interpreted():
        # fastmae's kernels as Triton's interpreted ones: CPU tensors take the path that CUDA tensors take.
        subprocess.run([sys.executable, *sys.argv], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        return
    count, path = jobs[sys.argv[1]]
    path.write_text(json.dumps(count(), indent=1) + "\n")


if __name__ == "__main__":
    main()
