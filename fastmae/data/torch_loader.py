"""A loader that needs nothing but torch and torchvision."""

from __future__ import annotations

import numpy as np

from fastmae.data.batch import Batch
from fastmae.data.loader import Loader
from fastmae.data.plan import Planner


class TorchLoader(Loader):
    """Decodes with torchvision and resizes with torch, both of which release the interpreter lock, in threads."""

    kind = "torch"
    # Two batches are in the making at once, so that no thread waits for the slowest image of a batch.
    num_producers = 2

    def __init__(self, planner: Planner, *, cache_bytes: int, **options):
        super().__init__(planner, **options)
        small = self.dataset.decoded_bytes(cache_bytes) <= cache_bytes
        self._images: dict[int, np.ndarray] | None = {} if small else None

    def image(self, sample_id: int) -> np.ndarray:
        if self._images is None:
            return super().image(sample_id)
        pixels = self._images.get(sample_id)
        if pixels is None:
            pixels = self._images[sample_id] = np.ascontiguousarray(super().image(sample_id))
        return pixels

    def produce(self, step: int) -> Batch:
        plan = self.plan(step)
        images = self.empty_images(plan)
        out = images.numpy()
        self.for_each(lambda j: self.render(plan, j, out[j]), len(out))
        return self.finish(plan, images)
