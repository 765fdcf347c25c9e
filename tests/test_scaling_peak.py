"""The most memory that a step needs at any moment, on CUDA's path. Takes a minute in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest -m slow tests/test_scaling_peak.py
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from living import Living
from test_scaling_memory import RECOMPUTE, build
from traffic_eager import EagerTraffic

from fastmae.ops import _dispatch
from fastmae.train.scaling.kept import kept_per_image
from fastmae.train.scaling.sizes import Sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _dispatch.is_interpreted(), reason="only where kernels run is the step that of a GPU"),
]


@pytest.mark.parametrize("checkpointing", RECOMPUTE)
def test_the_peak_of_the_backward_is_about_the_planned_one(checkpointing):
    sizes = Sizes((60, 60), (4, 4), 1, 32, 3, 2, 16, 3, 1)
    peaks = []
    for batch in (2, 4):
        model, images, masking = build(sizes, 0.75, checkpointing, "triton", batch)
        # The second looks into the ops, the first sees what is made there.
        with Living(every_op=True) as living, EagerTraffic():
            model(images, masking=masking, full_pred=False).loss.backward()
        peaks.append(living.peak)
    kept = kept_per_image(sizes, 0.75, compute_bytes=4, activation_checkpointing=checkpointing)
    outside = sizes.image_bytes + masking.ids_keep[0].nbytes + masking.mask[0].nbytes
    assert (peaks[1] - peaks[0]) / 2 == pytest.approx(kept.activations + kept.transient + outside, rel=0.1)
