"""Memory that a plan names, against what a GPU's allocator counts."""

from __future__ import annotations

import pytest
import torch

from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.scaling.hardware import Cluster
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.memory import states
from fastmae.train.scaling.sizes import architecture_sizes

RECOMPUTE = {"none": "nothing", "selective": "attention", "full": "block"}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", RECOMPUTE)
def test_memory_is_about_the_planned_one(checkpointing):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = create_model("mae_vit_base_patch16", norm_pix_loss=True, seed=0).cuda()
    for block in [*model.blocks, *model.decoder_blocks]:
        block.recompute = RECOMPUTE[checkpointing]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    sizes, peaks, inputs = architecture_sizes(model.architecture), [], []
    for batch in (64, 64, 192):  # the first makes the optimiser's state
        images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device="cuda")
        masking = random_masking(batch, model.num_patches, 0.75, seed=0, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, masking=masking, full_pred=False).loss
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        optimizer.step()
        held = torch.cuda.memory_allocated() - before
        inputs.append(images.nbytes + sum(t.nbytes for t in masking))
        optimizer.zero_grad(set_to_none=True)
    planned, kept = states(sizes, "none", Cluster(1, 1)), kept_per_image(sizes, activation_checkpointing=checkpointing)
    assert held - inputs[-1] == pytest.approx(planned.weights + planned.gradients + planned.optimizer, rel=0.03)
    image = (peaks[2] - peaks[1] - inputs[2] + inputs[1]) / 128
    assert image == pytest.approx(kept.activations + kept.transient, rel=0.12)
