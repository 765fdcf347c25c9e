"""Compiled blocks keep what eager ones keep, and compute the same again: on CUDA's path in Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from test_scaling_memory import build

from fastmae.ops import _dispatch
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.sizes import Sizes

pytestmark = [
    pytest.mark.ops,
    pytest.mark.skipif(not _dispatch.is_interpreted(), reason="only where kernels run is the step that of a GPU"),
]
SIZES = Sizes((32, 32), (8, 8), 3, 64, 2, 2, 32, 2, 2)


def step(checkpointing: str, batch: int, compiled: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd holds after the forward, but for parameters and images; gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)  # of the images
    model, images, masking = build(SIZES, 0.75, checkpointing, "triton", batch)
    if compiled:
        for block in [*model.blocks, *model.decoder_blocks]:
            # The compiler's own split into forward and backward, without its code, which rounds in its own ways.
            block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition", dynamic=False)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), images)}
    found: dict[int, torch.Tensor] = {}
    pack = lambda t: found.setdefault(t.untyped_storage()._cdata, t) is None or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(images, masking=masking, full_pred=False).loss
    kept = sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in known)
    loss.backward()
    return kept, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointing", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_compiled_blocks_keep_what_is_planned_and_give_the_same_gradients(checkpointing):
    (few, _), (many, gradients) = (step(checkpointing, batch, compiled=True) for batch in (2, 3))
    planned = kept_per_image(SIZES, 0.75, compute_bytes=4, activation_checkpointing=checkpointing)
    assert many - few == planned.activations
    _, expected = step("none", 3, compiled=False)
    assert all(torch.equal(found, other) for found, other in zip(gradients, expected, strict=True))
