"""What a compiled step keeps for the backward is what an eager one keeps, on CUDA's path in Triton's interpreter."""

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


def kept(checkpointing: str, batch: int) -> int:
    """Bytes that autograd holds after the forward of a model of compiled blocks, but for parameters and images."""
    torch._dynamo.reset()
    model, images, masking = build(SIZES, 0.75, checkpointing, "triton", batch)
    for block in [*model.blocks, *model.decoder_blocks]:
        # The compiler's own split into forward and backward, without its code.
        block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition", dynamic=False)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), images)}
    found: dict[int, torch.Tensor] = {}
    pack = lambda t: found.setdefault(t.untyped_storage()._cdata, t) is None or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images, masking=masking, full_pred=False)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in known)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_compiled_step_keeps_what_is_planned(checkpointing):
    planned = kept_per_image(SIZES, 0.75, compute_bytes=4, activation_checkpointing=checkpointing)
    assert kept(checkpointing, 3) - kept(checkpointing, 2) == planned.activations
