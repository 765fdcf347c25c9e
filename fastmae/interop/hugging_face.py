"""``transformers.ViTMAEForPreTraining`` on fastmae's ops, one model at a time, in place and undoable.

Modules of that one model are given a subclass of their class (``module.__class__``), whose ``forward`` runs on the ops.
Parameters, buffers, hooks and names stay where they are, so the state dict, ``save_pretrained`` and optimizers do not
notice. A subclass that can be imported by name, rather than a ``forward`` bound to the instance, is what pickle and
``copy.deepcopy`` carry over, what FSDP2 derives its own class from, and what ``torch.compile`` guards on.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmae.model.initialization import initialize_parameters, sincos_positions

if TYPE_CHECKING:
    from transformers import ViTMAEForPreTraining

_TABLES = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")


def accelerate(
    model: ViTMAEForPreTraining, *, init: bool = False, seed: int | None = None, full_logits: bool = True
) -> ViTMAEForPreTraining:
    """Let a ``transformers.ViTMAEForPreTraining`` run on fastmae's ops: same parameters, same outputs.

    Only visible patches are embedded, attention is :func:`fastmae.ops.attention`, the decoder's input is restored in
    one pass, and the loss reads the pixels without a target; where kernels run, layers are made of ``norm_linear`` and
    ``gelu_linear``. Dropout, ``hidden_act``, ``layer_norm_eps``, hooks, adapters and gradient checkpointing keep their
    effect. Only this model changes, and :func:`fastmae.interop.decelerate` undoes it. Do this before DDP,
    ``fully_shard`` and ``torch.compile``.

    What the ops do not cover takes Hugging Face's own path. The whole model, for that call: with
    ``interpolate_pos_encoding=True``, a mask ratio that masks nothing or everything, or ``pixel_values`` that require a
    gradient. Attention alone: with an ``attention_mask``, dropout to apply, or ``attn_implementation="eager"`` (the one
    that returns weights). A layer whose modules are hooked or replaced: what is hooked or replaced is called.
    The loss is float32 even where the whole model is bfloat16.

    Args:
        model: transformers 5.0 or newer; square images.
        init: draw all weights anew as the paper does (appendix A.1: Xavier-uniform matrices, zero biases, tokens normal
            with a standard deviation of 0.02, sine-cosine position tables), as ``fastmae.create_model`` does from the
            same seed. transformers 5 leaves the frozen position tables of a model that is built from a config at
            zero, so that every masked patch gets the same prediction.
        seed: keys the draw; None takes a seed from torch's default generator. Only with ``init``.
        full_logits: False is the training path: ``logits`` (N, M, P) of the masked patches only, in the order of
            ``ids_restore.argsort(1)[:, K:]``; same loss, same gradients, less work.

    Returns:
        The same model.

    Raises:
        ValueError: another class of model, transformers older than 5.0, images that are not square, or position tables
            that are all zeros.
    """
    ours = _implementation(model)
    config = model.config
    sizes = (config.image_size, config.patch_size)
    if any(len(set(size)) > 1 if isinstance(size, list | tuple) else False for size in sizes):
        raise ValueError(
            f"model: expected a config with square image_size and patch_size, as ViTMAE's own patchify requires, got "
            f"image_size={sizes[0]}, patch_size={sizes[1]}"
        )
    if seed is not None and not init:
        raise ValueError(f"seed: expected None without init=True, got {seed}")
    if not full_logits and config.decoder_num_hidden_layers < 1:
        raise ValueError("full_logits: False needs config.decoder_num_hidden_layers >= 1, got 0")
    if init:
        _initialize(model, int(torch.randint(1 << 62, (), device="cpu")) if seed is None else seed)
    _check_tables(model)
    for module in model.modules():
        module.__class__ = ours.CLASSES.get(type(module), type(module))
    model._fastmae_full_logits = full_logits
    return model


def decelerate(model: ViTMAEForPreTraining) -> ViTMAEForPreTraining:
    """Undo :func:`accelerate`: the same model runs on Hugging Face's code again. Weights are left as they are.

    Raises:
        ValueError: the model is not an accelerated one (or was wrapped or sharded since).
    """
    ours = _implementation(model)
    if type(model) is not ours.ViTMAEForPreTraining:
        raise ValueError(f"model: expected one that fastmae.accelerate returned, got {_name(model)}")
    theirs = {ours_class: theirs_class for theirs_class, ours_class in ours.CLASSES.items()}
    for module in model.modules():
        module.__class__ = theirs.get(type(module), type(module))
    del model._fastmae_full_logits
    return model


def _name(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _implementation(model: object):
    """The module with our classes, once it is clear that the model is of the class that they stand in for."""
    expected = "model: expected a transformers.ViTMAEForPreTraining, not yet wrapped, sharded or compiled"
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{expected}; transformers is not installed, got {_name(model)}") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(f"model: expected transformers 5.0 or newer, got version {transformers.__version__}")
    try:
        ours = import_module("fastmae.interop.vit_mae")
    except (AttributeError, ImportError) as error:
        raise ValueError(
            f"model: transformers {transformers.__version__} arranges ViTMAE in a way that this version of fastmae "
            f"does not know ({error})"
        ) from error
    if type(model) not in (transformers.ViTMAEForPreTraining, ours.ViTMAEForPreTraining):
        raise ValueError(f"{expected}, got {_name(model)}")
    return ours


def _check_tables(model: nn.Module) -> None:
    for name in _TABLES:
        table = model.get_parameter(name)
        if not table.requires_grad and not table.is_meta and not table.any():
            raise ValueError(
                f"model: {name} is frozen and all zeros, so patches cannot be told apart and every masked patch gets "
                "the same prediction (transformers 5 leaves a model that is built from a config like this). Load "
                "weights first, with from_pretrained or load_state_dict, or call fastmae.accelerate(model, init=True)"
            )


@torch.no_grad()
def _initialize(model: nn.Module, seed: int) -> None:
    """The draw of ``fastmae.create_model``, parameter by parameter, under the names that it is keyed by."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("init: expected a model with memory, got parameters on the meta device")
    drawn, packed = [], []
    for name, parts in _facebook_names(model).items():
        if len(parts) > 1:
            # Drawn as the one matrix that they are in the paper's code: its fan-out is that of all three.
            whole = nn.Parameter(torch.empty(sum(map(len, parts)), *parts[0].shape[1:]))
            packed.append((whole, parts))
            parts = [whole]
        drawn.append((name, parts[0]))
    initialize_parameters(SimpleNamespace(named_parameters=lambda: drawn), seed)
    for whole, parts in packed:
        for part, rows in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.copy_(rows)
    side = int((model.get_parameter(_TABLES[0]).shape[1] - 1) ** 0.5)
    for name in _TABLES:
        table = model.get_parameter(name)
        table.copy_(sincos_positions(table.shape[-1], (side, side)))


# In order, on names that end in a dot.
_RENAMED = (
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("vit.embeddings.", ""),
    ("vit.encoder.layer.", "blocks."), ("vit.layers.", "blocks."), ("vit.layernorm.", "norm."),
    ("classifier.", "head."),
    ("decoder.decoder_layers.", "decoder_blocks."), ("decoder.", ""),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."), (".attention.o_proj.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."),
    *((f".attention.attention.{name}.", ".attn.qkv.") for name in ("query", "key", "value")),
    *((f".attention.{name}_proj.", ".attn.qkv.") for name in "qkv"),
)  # fmt: skip


def _facebook_names(model: nn.Module) -> dict[str, list[Tensor]]:
    """Trained parameters under facebookresearch/mae's names; queries, keys and values, in that order, share one."""
    named: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name not in _TABLES:
            named.setdefault(facebook_name(name), []).append(parameter)
    return named


def facebook_name(name: str) -> str:
    """A parameter's name in facebookresearch/mae; that of queries, keys and values is the same. Not of tables."""
    for theirs, facebook in _RENAMED:
        name = name.replace(theirs, facebook)
    return name
