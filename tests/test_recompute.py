"""Activation checkpointing: what the backward computes again is what the forward computed, to the bit."""

from __future__ import annotations

import pytest
import torch

from fastmae.layers import Linear
from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import random_masking

pytestmark = pytest.mark.ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_gradients_are_those_without(recompute, dtype):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
    model = MaskedAutoencoderViT(32, 8, **sizes, decoder_depth=2, attention="plain", seed=0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    masking = random_masking(2, model.num_patches, 0.75, seed=0)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(images, masking=masking, full_pred=False).loss
        loss.backward()
        assert all(m.weight_cast is None for m in model.modules() if isinstance(m, Linear))
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = gradients()
    for block in [*model.blocks, *model.decoder_blocks]:
        block.recompute = recompute
    for found, value in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)
