"""What a training step keeps for its backward and moves through memory, counted on tensors without values."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import counted
import torch
from traffic import EagerTraffic

from fastmae.model import MaskedAutoencoderViT
from fastmae.ops import _dispatch, random_masking
from fastmae.ops.attention import choose_backend

RESULTS = json.loads(counted.STEP.read_text())
ON_CUDA = f"fastmae, {choose_backend('cuda', torch.bfloat16, 197)[0]}"


@pytest.mark.parametrize(
    ("model", "saved", "moved", "limit"), [("ViT-B/16", 49.7, 447, 40), ("ViT-L/16", 77.7, 697, 60)]
)
def test_less_is_kept_and_moved_than_by_facebookresearch(model, saved, moved, limit):
    """Megabytes per image, as published."""
    found = RESULTS["models"][model]
    theirs = found["facebookresearch, sdpa"]
    assert theirs["saved"] == pytest.approx(saved, abs=0.06)
    assert theirs["forward"] + theirs["backward"] == pytest.approx(moved, abs=1)
    for who in {"fastmae, sdpa", "fastmae, triton", ON_CUDA}:
        assert found[who]["saved"] < limit
        assert all(found[who][direction] < 0.8 * theirs[direction] for direction in ("forward", "backward"))
    assert found["fastmae with mask tokens in the encoder, sdpa"]["saved"] > 2 * found["fastmae, sdpa"]["saved"]


@pytest.mark.ops
@pytest.mark.skipif(
    not _dispatch.is_interpreted(), reason="only where kernels run, if interpreted, is the step a GPU's"
)
@pytest.mark.parametrize("who", ["facebookresearch, sdpa", "fastmae, triton"])
def test_the_published_counts_are_those_of_the_code(who):
    if torch.__version__.split("+")[0] != RESULTS["torch"]:
        pytest.skip(f"counted with torch {RESULTS['torch']}")
    assert counted.per_image("mae_vit_base_patch16", who) == RESULTS["models"]["ViT-B/16"][who]


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_no_matrix_product_is_computed_twice(backend, route):
    """Two products in the backward for each of the forward, but one for the pixels' projection: pixels need no
    gradient. Scores that fused attention makes again are its own affair and not seen here."""
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
