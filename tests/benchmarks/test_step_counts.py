"""What a training step keeps for its backward and moves through memory, counted on tensors without values."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import count_step
import torch
from traffic_eager import EagerTraffic

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import _dispatch, random_masking
from fastmae.ops.attention import choose_backend

pytestmark = pytest.mark.ops
fused = pytest.mark.skipif(
    not _dispatch.is_interpreted(), reason="only where kernels run, if interpreted, is the step that of a GPU"
)
once = pytest.mark.skipif(_dispatch.is_interpreted(), reason="the same in both processes")

BASE, LARGE = count_step.MODELS.values()
# Megabytes an image.
LIMIT = {BASE: 40, LARGE: 60}
ON_CUDA = choose_backend("cuda", torch.bfloat16, 197)[0]
FUSED_BACKENDS = ["sdpa", "triton"]


@once
@pytest.mark.parametrize(("name", "saved", "moved"), [(BASE, 49.7, 447), (LARGE, 77.7, 697)])
def test_the_count_of_facebookresearch_is_the_known_one(name, saved, moved):
    found = count_step.per_image(name, "facebookresearch, sdpa")
    assert found["saved"] == pytest.approx(saved, abs=0.06)
    assert found["forward"] + found["backward"] == pytest.approx(moved, abs=1)


@fused
@pytest.mark.parametrize("name", LIMIT)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_saved_activations_stay_within_the_limit(name, backend):
    batch = 2
    saved = count_step.count(name, f"fastmae, {backend}", batch).saved / batch / 1e6
    assert saved < LIMIT[name]


def test_what_is_automatic_on_cuda_is_among_the_counted():
    assert ON_CUDA in FUSED_BACKENDS


@fused
@pytest.mark.parametrize("name", LIMIT)
def test_less_is_moved_than_by_facebookresearch(name):
    ours, theirs = (count_step.per_image(name, f"{who}, sdpa") for who in ("fastmae", "facebookresearch"))
    for direction in ("forward", "backward"):
        assert ours[direction] < 0.8 * theirs[direction]


@pytest.mark.parametrize("backend", ["plain", *FUSED_BACKENDS])
def test_no_matrix_product_is_computed_twice(backend):
    """Two products in the backward for each of the forward, but one for the pixels' projection: pixels need no
    gradient. Scores that fused attention makes again are its own affair and not seen here."""
    if backend == "triton" and not _dispatch.is_interpreted():
        pytest.skip("a kernel")
    size, patch, dim, n = 32, 8, 64, 2
    model = MaskedAutoencoderViT(
        size, patch, embed_dim=dim, depth=3, num_heads=2, decoder_embed_dim=32, decoder_depth=3, decoder_num_heads=2,
        attention=backend, seed=0,
    )  # fmt: skip
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    masking = random_masking(n, model.num_patches, 0.75, seed=0)
    with EagerTraffic() as traffic:
        loss = model(images, masking=masking, full_pred=False).loss
        forward = traffic.flops
        loss.backward()
    pixels = 2 * n * masking.ids_keep.shape[1] * (3 * patch**2) * dim
    assert pixels < forward
    assert traffic.flops - forward == 2 * forward - pixels


RESULTS = json.loads(count_step.RESULT.read_text())


@fused
@pytest.mark.parametrize("who", count_step.COMPETITORS)
def test_counts_are_the_published_ones(who):
    if torch.__version__.split("+")[0] != RESULTS["torch"]:
        pytest.skip(f"counted with torch {RESULTS['torch']}")
    assert count_step.per_image(BASE, who) == RESULTS["models"]["ViT-B/16"][who]
