"""The images of a run, and how fast a CPU core makes them ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastmae.train.scaling.sizes import expect

LoaderName = Literal["dali", "torch"]
Source = Literal["folder", "shards", "shards-256"]

IMAGES_PER_CPU_SECOND: dict[tuple[LoaderName, Source], float] = {
    ("dali", "folder"): 855,
    ("dali", "shards"): 905,
    ("dali", "shards-256"): 2142,
    ("torch", "folder"): 758,
    ("torch", "shards"): 792,
    ("torch", "shards-256"): 1852,
}
"""Measured: ImageNet's JPEGs (0.20 megapixels on average) read, decoded on the CPU and resized to 224 pixels on one
core of an AMD EPYC. From benchmarks/results/cpu-amd-epyc/data.json; docs/data.md has the table."""
MEASURED_IN = "benchmarks/results/cpu-amd-epyc/data.json"
IMAGE_KB: dict[Source, float] = {"folder": 110, "shards": 110, "shards-256": 27}
"""Of ImageNet's files; at a short side of 256 pixels a quarter of it (benchmarks/results/counted/shards.json)."""


@dataclass(frozen=True)
class Data:
    """The images. Defaults: ImageNet-1k."""

    images: int = 1_281_167
    """In the data set."""
    loader: LoaderName = "dali"
    """What decodes them, on the CPU."""
    source: Source = "folder"
    """What they are read from: a folder of files, tar shards of them, or shards re-encoded at a short side of 256."""
    image_kb: float | None = None
    """Of a stored image on average, kB of 10^3 bytes. None: ImageNet's, 110, or 27 in shards-256."""
    images_per_core: float | None = None
    """Images a second that one CPU core decodes, crops and resizes. None: what was measured with ImageNet's on one core
    of an AMD EPYC for this loader and source; fastmae bench measures it for yours."""
    masks_per_image: int = 1
    """Masks for each decoded image."""

    @property
    def bytes_per_image(self) -> float:
        """Of a stored image."""
        return 1e3 * (IMAGE_KB[self.source] if self.image_kb is None else self.image_kb)

    @property
    def core_rate(self) -> float:
        """Images a second and core."""
        return IMAGES_PER_CPU_SECOND[self.loader, self.source] if self.images_per_core is None else self.images_per_core

    def check(self) -> None:
        """Raise ``ValueError`` naming the field that cannot be."""
        expect(self.loader in ("dali", "torch"), "data.loader", "dali or torch", self.loader)
        expect(self.source in IMAGE_KB, "data.source", "folder, shards or shards-256", self.source)
        for name in ("images", "image_kb", "images_per_core", "masks_per_image"):
            value = getattr(self, name)
            expect(value is None or value > 0, f"data.{name}", "a positive number", value)


class DataNeeds(NamedTuple):
    """That the GPUs may never wait."""

    images_per_s: float
    """Decoded, all together; an image with several masks is decoded once."""
    images_per_s_per_node: float
    cores_per_node: float
    storage_bytes_per_s: float
    """All together, if nothing is cached."""


def data_needs(data: Data, images_per_s: float, nodes: int) -> DataNeeds:
    """Of a run that takes so many masked images a second."""
    decoded = images_per_s / data.masks_per_image
    return DataNeeds(decoded, decoded / nodes, decoded / nodes / data.core_rate, decoded * data.bytes_per_image)
