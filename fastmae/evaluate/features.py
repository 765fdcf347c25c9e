"""Features of labelled images: the frozen encoder on whole, centrally cropped images."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.data import DataError, Dataset
from fastmae.data.decode import UndecodableImage, center_box, resize_crop_into
from fastmae.data.host import serial_threads
from fastmae.data.loader import choose_options
from fastmae.data.threads import Threads

_AHEAD = 2
"""Batches that are decoded while the model works on one."""


class Features(NamedTuple):
    """What the encoder makes of n images, on the model's device."""

    class_token: Tensor
    """float32 (n, D): what facebookresearch/mae's linear probe takes (``main_linprobe.py --cls_token``)."""
    pooled: Tensor
    """float32 (n, D): the mean of the patch tokens, which it calls global pooling."""
    readable: Tensor
    """bool (n,): False where an image could not be read or decoded; its features mean nothing."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Look at a model in the middle of its training, and leave no trace.

    Inside, it is in evaluation mode and takes images of ``img_size``, no gradients are recorded, and what is compiled
    runs as it is written: another shape would be compiled for its own sake. Afterwards its mode and input size are as
    before, and shards that were gathered are given back. Draws no random numbers.
    """
    was_training, size = model.training, getattr(model, "input_size", None)
    model.eval()
    if size is not None:  # a classifier has one size only
        model.set_input_size()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        # With FSDP2 the root's weights stay gathered until a backward that does not come here.
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        if size is not None:
            model.set_input_size(size)
        model.train(was_training)


def extract_features(
    model: nn.Module,
    dataset: Dataset,
    sample_ids: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    num_threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = 600.0,
    on_batch: Callable[[], None] = lambda: None,
    crop_ratio: float = 1.0,
) -> Features:
    """The encoder's features of some images, after its last norm, nothing masked.

    An image is the largest centred crop of the model's aspect ratio, resized (bicubic, antialiased). All batches have
    one shape, and all ranks run as many, so that a sharded model, whose forward all ranks have to join, can be used.

    Args:
        model: a ``MaskedAutoencoderViT``; afterwards as it was before (:func:`evaluating`).
        dataset: where the images are.
        sample_ids: int64 (n,), which of them.
        dtype: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast.
        batch_size: images a forward.
        num_threads: that decode; None chooses.
        rank, world_size: this process's features are those of ``sample_ids[rank::world_size]``, and so are the n rows
            of what is returned. :func:`join_ranks` puts them together.
        timeout: seconds to wait for a batch, whose missing images then count as unreadable.
        on_batch: called after each forward, to show progress.
        crop_ratio: side of the crop relative to the largest; 0.875 is the usual 224 of 256 pixels.

    Raises:
        ValueError: no images, another number of channels than the model's, or ``batch_size`` not positive.
    """
    own = sample_ids[rank::world_size]
    options = {"dtype": dtype, "batch_size": batch_size, "num_threads": num_threads, "timeout": timeout}
    options |= {"most": -(-len(sample_ids) // world_size), "world_size": world_size, "crop_ratio": crop_ratio}
    classes, pooled, readable = [], [], []
    for tokens, good in encode_images(model, dataset, own, **options):
        classes.append(tokens[:, 0])
        pooled.append(tokens[:, 1:].mean(1))
        readable.append(good)
        on_batch()
    device = model.mean.device
    joined = [torch.cat(parts)[: len(own)] for parts in (classes, pooled, readable)]
    return Features(joined[0], joined[1], joined[2].to(device))


def encode_images(
    model: nn.Module,
    dataset: Dataset,
    sample_ids: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    num_threads: int | None = None,
    most: int | None = None,
    world_size: int = 1,
    timeout: float = 600.0,
    crop_ratio: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of some images, after the encoder's last norm, batch by batch; arguments as for :func:`extract_features`.

    Args:
        most: images of the rank that has most: every rank runs as many forwards. None: those of ``sample_ids``.

    Yields:
        float32 (N, 1 + L, D) on the model's device, and bool (N,): which images were readable. The last batches are
        filled up with grey images.

    Raises:
        ValueError: as :func:`extract_features`.
    """
    most = len(sample_ids) if most is None else most
    if most == 0 or batch_size < 1:
        raise ValueError(f"sample_ids and batch_size: expected at least 1, got {most} and {batch_size}")
    if dataset.channels != model.in_chans:
        raise ValueError(f"dataset: expected images of {model.in_chans} channels, got {dataset.channels}")
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio: expected above 0 and at most 1, got {crop_ratio}")
    device, batch_size = model.mean.device, min(batch_size, most)
    threads = num_threads or choose_options(device, 0, world_size=world_size).num_threads
    batches = partial(_batches, dataset, sample_ids, model.img_size, batch_size, -(-most // batch_size))
    with evaluating(model), serial_threads(threads, "fastmae-features") as pool:
        for images, good in batches(pool, timeout, crop_ratio):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                yield model.encode(model.normalized(images.to(device))).float(), good


def join_ranks(parts: list[Features]) -> Features:
    """The features of all images, in the order of ``sample_ids``, from those of each rank."""
    total = sum(len(part.readable) for part in parts)
    joined = []
    for tensors in zip(*parts, strict=True):
        whole = tensors[0].new_empty(total, *tensors[0].shape[1:])
        for rank, tensor in enumerate(tensors):
            whole[rank :: len(parts)] = tensor.to(whole.device)
        joined.append(whole)
    return Features(*joined)


def _batches(
    dataset: Dataset,
    sample_ids: np.ndarray,
    img_size: tuple[int, int],
    batch_size: int,
    count: int,
    pool: Threads,
    timeout: float,
    crop_ratio: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches of images (N, C, H, W), and which were readable, bool (N,); grey where the ids have ended."""
    pending: deque[tuple[Tensor, list[Future]]] = deque()
    for start in range(0, (count + _AHEAD) * batch_size, batch_size):
        if start < count * batch_size:
            dtype, grey = (torch.uint8, 128) if dataset.value_range is None else (torch.float32, 0.5)
            images = torch.full((batch_size, *img_size, dataset.channels), grey, dtype=dtype)
            ids = sample_ids[start : start + batch_size].tolist()
            rows = zip(images.numpy(), ids, strict=False)
            tasks = [pool.submit(_decode_into, out, dataset, i, crop_ratio) for out, i in rows]
            pending.append((images, tasks))
        if start >= _AHEAD * batch_size:
            images, tasks = pending.popleft()
            good = torch.zeros(batch_size, dtype=torch.bool)
            deadline = time.monotonic() + timeout
            for row, task in enumerate(tasks):
                good[row] = _succeeds(task, deadline)
            yield images.permute(0, 3, 1, 2), good


def _succeeds(task: Future, deadline: float) -> bool:
    try:
        return task.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return False


def _decode_into(out: np.ndarray, dataset: Dataset, sample_id: int, crop_ratio: float) -> bool:
    try:
        pixels = dataset.decode(sample_id)
    except (UndecodableImage, DataError, OSError):
        return False
    resize_crop_into(out, pixels, center_box(*pixels.shape[:2], out.shape[:2], crop_ratio))
    return True
