"""Memory that a plan names, against what a GPU's allocator counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmae.model import create_model
from fastmae.ops import random_masking
from fastmae.train.batching.auto_batch import Machine, settle_batch_size
from fastmae.train.batching.free_memory import free_bytes
from fastmae.train.optim import create_optimizer
from fastmae.train.parallel import Parallelism, parallelize
from fastmae.train.recipes import RECIPES
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "checkpointing", "compile"),
    [
        ("imagenet-vit-l", "none", False),
        ("imagenet-vit-l", "selective", False),
        ("imagenet-vit-b", "full", False),
        ("imagenet-vit-b", "none", True),
        ("imagenet-vit-b", "selective", True),
    ],
)
def test_the_batch_that_is_chosen_fits_and_takes_about_what_was_estimated(recipe, checkpointing, compile):
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    device, config = torch.device("cuda", torch.cuda.current_device()), RECIPES[recipe]
    # So many images that the memory and not the global batch decides; a share with many divisors fills it well.
    train = replace(
        config.train, batch_size="auto", global_batch_size=5040, activation_checkpointing=checkpointing, compile=compile
    )
    config, before = replace(config, train=train), torch.cuda.memory_allocated()
    chosen = settle_batch_size(config, Machine("cuda", free_bytes(device)))
    train, batch = chosen.config.train, chosen.config.train.batch_size
    model = create_model(**config.model_arguments())
    options = {name: getattr(train, name) for name in ("seed", "precision", "activation_checkpointing", "compile")}
    forward, optimizer = parallelize(model, Parallelism(device=device), **options), create_optimizer(model, train)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
    masking = random_masking(batch, model.num_patches, 0.75, seed=0, device=device)
    for _ in range(2):  # the first makes the optimiser's state, and compiles
        torch.cuda.reset_peak_memory_stats()
        with model.cast_weights(torch.bfloat16):
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(images, masking=masking, full_pred=False).loss
            loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    planned = chosen.memory.total - chosen.memory.reserved - chosen.memory.images
    assert peak - images.nbytes == pytest.approx(planned, rel=0.15)
