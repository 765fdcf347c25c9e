"""The machines that a plan is made for. Every number can be replaced; what is not on a data sheet is an assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fastmae.train.scaling.sizes import expect


@dataclass(frozen=True)
class Hardware:
    """A GPU, its links, its node and the storage behind it. Defaults: H100 SXM, 8 in a node, a 400 Gb/s network port
    for each GPU. One direction of every link counts."""

    name: str = "H100 SXM"
    """For the title."""
    matmul_tflops: float = 989.4
    """Peak of dense matrix products in bf16 and fp16, TFLOP/s (data sheet)."""
    fp32_tflops: float = 66.9
    """The same in fp32, which PyTorch computes without TF32 unless told otherwise (data sheet)."""
    matmul_fraction: float = 0.65
    """Share of the peak that the step's matrix products reach on average. Assumed."""
    hbm_gb: float = 80.0
    """Device memory, GB of 10^9 bytes (data sheet)."""
    hbm_usable_fraction: float = 0.85
    """Share of the memory that is planned for: the rest is for what an estimate misses, and for fragmentation.
    Assumed."""
    reserved_gb: float = 2.0
    """Of that, for communication buffers and library workspaces, GB. Assumed."""
    hbm_tb_per_s: float = 3.35
    """Bandwidth of the device memory, TB/s (data sheet)."""
    hbm_fraction: float = 0.85
    """Share of it that passes over activations and weights reach. Assumed."""
    nvlink_gb_per_s: float = 450.0
    """From one GPU to the others of its node, GB/s (data sheet)."""
    network_gb_per_s: float = 50.0
    """From one GPU out of its node, GB/s (400 Gb/s)."""
    link_fraction: float = 0.8
    """Share of both that collectives reach with large messages. Assumed."""
    node_latency_us: float = 20.0
    """Of a collective inside a node, however small, microseconds. Assumed."""
    network_latency_us: float = 10.0
    """More for each doubling of the number of nodes, microseconds. Assumed."""
    pcie_gb_per_s: float = 25.0
    """From a GPU to the memory of its host, GB/s. Assumed."""
    storage_write_gb_per_s: float = 2.0
    """That one node writes to storage, GB/s. Assumed."""

    def check(self) -> None:
        """Raise ``ValueError`` naming the field that cannot be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            may_be_zero = field.name.endswith("_us") or field.name == "reserved_gb"
            fits = math.isfinite(value) and (value > 0 or (may_be_zero and value == 0))
            expect(fits, f"hardware.{field.name}", "a positive number", value)
            if field.name.endswith("fraction"):
                expect(value <= 1, f"hardware.{field.name}", "at most 1", value)

    def peak_rate(self, compute_bytes: int = 2) -> float:
        """Operations a second of matrix products, by the data sheet."""
        return 1e12 * (self.matmul_tflops if compute_bytes < 4 else self.fp32_tflops)

    def matmul_rate(self, compute_bytes: int = 2) -> float:
        """Operations a second that the step's products reach."""
        return self.peak_rate(compute_bytes) * self.matmul_fraction

    @property
    def hbm_rate(self) -> float:
        """Bytes a second that passes over device memory reach."""
        return self.hbm_tb_per_s * 1e12 * self.hbm_fraction

    @property
    def usable_bytes(self) -> float:
        """Of device memory, for tensors."""
        return self.hbm_gb * 1e9 * self.hbm_usable_fraction - self.reserved_gb * 1e9


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes."""

    gpus: int = 8
    gpus_per_node: int = 8

    def __post_init__(self):
        expect(self.gpus >= 1, "gpus", "at least 1", self.gpus)
        expect(self.gpus_per_node >= 1, "gpus_per_node", "at least 1", self.gpus_per_node)
        whole = self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0
        expect(whole, "gpus", f"whole nodes of {self.gpus_per_node}, or part of one", self.gpus)

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def gpus_in_node(self) -> int:
        """That take part."""
        return min(self.gpus, self.gpus_per_node)
