"""Activations that a plan counts, against what stays in memory between a forward and its backward on CUDA's path."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("triton")

import torch
from living import Living
from traffic_eager import EagerTraffic

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import _dispatch, random_masking
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.sizes import Sizes
from fastmae.train.scaling.work import flops_per_batch, flops_per_image

pytestmark = [
    pytest.mark.ops,
    pytest.mark.skipif(not _dispatch.is_interpreted(), reason="only where kernels run is the step that of a GPU"),
]
RECOMPUTE = {"none": "nothing", "selective": "attention", "full": "block"}
DEEP = Sizes((32, 32), (8, 8), 3, 64, 3, 2, 32, 3, 2)
ODD = Sizes((24, 40), (4, 8), 2, 48, 2, 3, 32, 2, 2)
SHALLOW = Sizes((32, 32), (8, 8), 1, 64, 2, 4, 32, 1, 2, mlp_ratio=2.5)


def build(sizes: Sizes, mask_ratio: float, checkpointing: str, attention: str, batch: int):
    """Model, images and masking."""
    model = MaskedAutoencoderViT(
        sizes.img_size, sizes.patch_size, sizes.in_chans, sizes.embed_dim, sizes.depth, sizes.num_heads,
        sizes.decoder_embed_dim, sizes.decoder_depth, sizes.decoder_num_heads, sizes.mlp_ratio,
        attention=attention, seed=0,
    )  # fmt: skip
    for block in [*model.blocks, *model.decoder_blocks]:
        block.recompute = RECOMPUTE[checkpointing]
    images = torch.randint(0, 256, (batch, sizes.in_chans, *sizes.img_size), dtype=torch.uint8)
    return model, images, random_masking(batch, model.num_patches, mask_ratio, seed=0)


def step(sizes: Sizes, mask_ratio: float, checkpointing: str, attention: str, batch: int) -> tuple[int, int]:
    """Bytes alive after the forward, and operations of the step."""
    model, images, masking = build(sizes, mask_ratio, checkpointing, attention, batch)
    with Living() as living:
        loss = model(images, masking=masking, full_pred=False).loss
        gc.collect()
        alive = living.bytes((*model.parameters(), *model.buffers(), images, loss, *masking))
    flops = 0
    if attention == "plain":  # whose products are seen
        with EagerTraffic() as traffic:
            model(images, masking=masking, full_pred=False).loss.backward()
        flops = traffic.flops
    # The indices came from outside: of masked patches, and of where each patch went.
    return alive + sum(ids.nbytes for ids in (masking.ids_mask, masking.ids_restore)), flops


@pytest.mark.parametrize(
    ("sizes", "checkpointing", "attention", "mask_ratio"),
    [
        (DEEP, "none", "plain", 0.75),
        (DEEP, "selective", "plain", 0.75),
        (DEEP, "full", "plain", 0.75),
        (ODD, "none", "triton", 0.5),
        (ODD, "selective", "triton", 0.5),
        (SHALLOW, "full", "triton", 0.5),
        (SHALLOW, "selective", "plain", 0.5),
    ],
)
def test_activations_and_operations_are_the_planned_ones(sizes, checkpointing, attention, mask_ratio):
    (few, few_flops), (many, many_flops) = (step(sizes, mask_ratio, checkpointing, attention, n) for n in (1, 2))
    kept = kept_per_image(
        sizes,
        mask_ratio,
        compute_bytes=4,
        attention="plain" if attention == "plain" else "fused",
        activation_checkpointing=checkpointing,
    )
    assert many - few == kept.activations
    if attention == "plain":
        flops = flops_per_image(sizes, mask_ratio, checkpointing)
        assert many_flops - few_flops == flops.executed
        # Computed again for the batch: the mask tokens' projection.
        again = 1 if checkpointing == "none" else 4 / 3
        assert 2 * few_flops - many_flops == pytest.approx(again * flops_per_batch(sizes))
