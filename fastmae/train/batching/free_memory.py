"""The memory that a batch has to fit: what is free on the device of each process, and what else is going to take it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastmae.data import Dataset
from fastmae.ops._attention_choice import choose_backend
from fastmae.train.batching.auto_batch import Machine
from fastmae.train.checkpoint import Ranks
from fastmae.train.config import PretrainConfig
from fastmae.train.parallel import DTYPES, Parallelism
from fastmae.train.scaling.sizes import Sizes

_SAMPLED = 1000


def find_machine(
    config: PretrainConfig, sizes: Sizes, parallelism: Parallelism, ranks: Ranks, dataset: Dataset, loader: str
) -> Machine:
    """What the batch of a process has to fit; every rank calls it, before its model is on the device.

    Args:
        sizes: of the model.
        loader: "dali" or "torch".
    """
    cuda = parallelism.device.type == "cuda"
    return Machine(
        "cuda" if cuda else "cpu",
        least_free_bytes(parallelism.device, ranks),
        ranks.size,
        parallelism.mode,
        parallelism.mesh.shape[-1] if parallelism.sharded else 1,
        "plain" if keeps_scores(config, sizes, parallelism.device.type) else "fused",
        decoded_bytes(dataset) if cuda and loader == "dali" else 0,
    )


def keeps_scores(config: PretrainConfig, sizes: Sizes, device_type: str) -> bool:
    """Whether attention keeps the matrix of scores for its backward, in the encoder or in the decoder."""
    backend, dtype = config.model.attention, DTYPES[config.train.precision]
    if backend != "auto":
        return backend == "plain"
    shapes = (
        (sizes.num_kept(config.model.mask_ratio), sizes.embed_dim // sizes.num_heads),
        (sizes.num_patches, sizes.decoder_embed_dim // sizes.decoder_num_heads),
    )
    return any(choose_backend(device_type, dtype, 1 + tokens, dim).backend == "plain" for tokens, dim in shapes)


def decoded_bytes(dataset: Dataset) -> int:
    """Of an image before it is resized, on average over an evenly spread sample; all of it, not of its crop."""
    ids = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLED).astype(np.int64))
    rows = dataset.rows(ids)
    rows = rows[rows["bad"] == 0]
    if not len(rows):
        return 0
    return int((rows["height"].astype(float) * rows["width"]).mean() * dataset.channels)


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU what no process has taken, of the CPU what :func:`host_free_bytes` says."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free_bytes()


def host_free_bytes(meminfo: Path = Path("/proc/meminfo"), control_group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the host and this process's control group, a container's, can still give; None where Linux does not say."""
    known = (_available(meminfo), _group_free(control_group))
    return min((free for free in known if free is not None), default=None)


def least_free_bytes(
    device: torch.device, ranks: Ranks, measure: Callable[[torch.device], int | None] = free_bytes
) -> int | None:
    """Of the device that has least, so that all ranks decide alike; every one of them calls it.

    On the CPU the ranks of a host share what it has.

    Args:
        device: of this rank.
        measure: its free bytes.

    Returns:
        None where a rank cannot know.
    """
    answers = ranks.gather("asking for free memory", lambda: (socket.gethostname(), measure(device)))
    hosts, free = [host for host, _ in answers], [free for _, free in answers]
    if None in free:
        return None
    return min(free) if device.type == "cuda" else min(own // hosts.count(host) for host, own in answers)


def _available(path: Path) -> int | None:
    """Linux's own estimate of what can be taken without swapping."""
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _group_free(path: Path) -> int | None:
    """Up to the limit of a container; what it holds of files can be given back."""
    limit, current = _read(path / "memory.max").strip(), _read(path / "memory.current").strip()
    if not (limit.isdigit() and current.isdigit()):
        return None
    files = [line.split()[1] for line in _read(path / "memory.stat").splitlines() if line.startswith("inactive_file ")]
    return max(0, int(limit) - int(current) + sum(map(int, files)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
