"""Activation checkpointing: what the backward computes again is what the forward computed, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmae.model import MaskedAutoencoderViT
from fastmae.model.blocks import Linear
from fastmae.ops import random_masking


def create(decoder_depth: int = 2) -> MaskedAutoencoderViT:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
    return MaskedAutoencoderViT(32, 8, **sizes, decoder_depth=decoder_depth, attention="plain", seed=0)


def make_images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def gradients(model: MaskedAutoencoderViT, dtype: torch.dtype, passes: int = 1) -> list[Tensor]:
    """The losses, and gradients summed over the passes; the copies of the weights are gone before the last backward."""
    model.zero_grad()
    losses = []
    for number in range(passes):
        masking = random_masking(2, model.num_patches, 0.75, seed=number)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses.append(model(make_images(), masking=masking, full_pred=False).loss)
        assert all(m.weight_cast is None for m in model.modules() if isinstance(m, Linear))
        losses[-1].backward()
        assert all(m.weight_cast is None and m.wanted for m in model.modules() if isinstance(m, Linear))
    return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters() if p.requires_grad)]


def recomputing(model: MaskedAutoencoderViT, recompute: str) -> MaskedAutoencoderViT:
    model.set_activation_checkpointing(recompute)
    return model


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Selective and full, both dtypes, a last decoder block that is the first one too, and one that is not.
@pytest.mark.parametrize(
    ("recompute", "dtype", "decoder_depth"),
    [
        pytest.param("full", torch.bfloat16, 1, marks=pytest.mark.ops),
        pytest.param("selective", torch.float32, 1, marks=pytest.mark.ops),
        ("full", torch.float32, 3),
        ("selective", torch.bfloat16, 3),
    ],
)
def test_gradients_are_those_without(recompute, dtype, decoder_depth, route):
    expected = gradients(create(decoder_depth), dtype, passes=2)
    assert_equal(gradients(recomputing(create(decoder_depth), recompute), dtype, passes=2), expected)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_copies_of_weights_that_serve_several_passes_are_held(recompute, inside, fused):
    """As in the training loop: one set of copies for an accumulated step, the backward outside or inside of it."""
    model = create()
    expected = gradients(model, torch.bfloat16)
    masking = random_masking(2, model.num_patches, 0.75, seed=0)
    recomputing(model, recompute).zero_grad()
    with model.cast_weights(torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(make_images(), masking=masking, full_pred=False).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert_equal([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)], expected)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_backward_may_come_twice(recompute, route):
    model = recomputing(create(), recompute)
    loss = model(make_images(), masking=random_masking(2, model.num_patches, 0.75, seed=0), full_pred=False).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, parameters), once)


def test_nothing_is_kept_for_a_backward_that_will_not_come():
    model, images = recomputing(create(), "selective"), make_images()
    with torch.no_grad():
        assert model(images).loss.grad_fn is None
        assert torch.equal(model.encode(images), recomputing(model, "none").encode(images))
