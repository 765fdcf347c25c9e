"""All ranks open one index and check, before the first step, that they see the same data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastmae.data.batch import DataError
from fastmae.data.dataset import Dataset
from fastmae.data.index import MANIFEST

logger = logging.getLogger(__name__)


def open_once(open_: Callable[..., Dataset], first: Callable[[Callable[[], Any]], Any]) -> Dataset:
    """Open a data set on rank 0, which lists it and publishes its index; the other ranks open that, and list nothing.

    Args:
        open_: ``open_dataset`` of a path; takes ``index``.
        first: calls a function on rank 0 and returns its result on every rank.
    """
    led: list[Dataset] = []

    def lead() -> tuple[Any, str]:
        led.append(open_())
        return led[0].index.folder, led[0].hash

    folder, digest = first(lead)
    if led:
        return led[0]
    if folder is not None and (folder / MANIFEST).is_file():
        dataset = open_(index=folder)
        if dataset.hash == digest:
            return dataset
    where = f"{folder}, which rank 0 has published, is not here" if folder else "rank 0 could not keep its index"
    dataset = open_()
    if not dataset.embedded:
        logger.warning("%s: this rank has listed the data itself; give a --data.index that all ranks share", where)
    return dataset


def check_agreement(dataset: Dataset, group: dist.ProcessGroup | None = None) -> None:
    """Compare the data set's length and hash among the ranks; a collective that every rank has to call.

    Ranks whose folders differ (a copy that is not finished, another cache of full decodes) would train on different
    samples under the same numbers, and nothing else would tell.

    Args:
        dataset: this rank's.
        group: the ranks to compare; None for all. Without ``torch.distributed`` initialised nothing is done.

    Raises:
        DataError: on every rank, naming those that differ from the majority.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    digest = bytes.fromhex(dataset.hash)
    own = torch.tensor([len(dataset), *digest], dtype=torch.int64, device=device)
    every = torch.empty(dist.get_world_size(group) * len(own), dtype=torch.int64, device=device)
    # PyTorch 2.14 renames it, and warns of the old name on every rank.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every, own, group=group)
    seen = [(length, bytes(rest).hex()) for length, *rest in every.view(-1, len(own)).tolist()]
    usual = max(seen, key=seen.count)
    odd = [rank for rank, found in enumerate(seen) if found != usual]
    if odd:
        some = "; ".join(f"rank {rank} has {seen[rank][0]:,} images, hash {seen[rank][1]}" for rank in odd[:4])
        more = f"; and {len(odd) - 4} more ranks" if len(odd) > 4 else ""
        raise DataError(
            f"{dataset.root}: the ranks see different data. {len(seen) - len(odd)} of {len(seen)} "
            f"have {usual[0]:,} images, hash {usual[1]}; {some}{more}. Expected the same files everywhere"
        )
