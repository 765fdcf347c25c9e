"""Features of images: the frozen encoder on whole, centrally cropped images."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.data import DataError, Dataset, open_dataset
from fastmae.data.decode import UndecodableImage, center_box, resize_crop_into
from fastmae.data.host import serial_threads
from fastmae.data.loader import choose_options
from fastmae.data.threads import Threads

_AHEAD = 2
"""Batches that are decoded while the model works on one."""


class ImageFeatures(NamedTuple):
    """Features of the images of a data set that could be read."""

    ids: np.ndarray
    """int64 (n,), their numbers in the data set."""
    paths: list[str]
    """Of a shard's member, the shard's path, ``::`` and the name."""
    features: np.ndarray
    """float32 (n, D)."""


class Features(NamedTuple):
    """What the encoder makes of n images to probe it with, on the model's device."""

    class_token: Tensor
    """float32 (n, D): what facebookresearch/mae's linear probe takes (``main_linprobe.py --cls_token``); (n, 0) of an
    encoder without one."""
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


def encode_images(
    model: nn.Module,
    dataset: Dataset,
    sample_ids: np.ndarray,
    reduce: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    num_threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = 600.0,
    crop_ratio: float = 1.0,
    on_batch: Callable[[], None] = lambda: None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode images with nothing masked, and reduce the tokens of each batch to what is kept.

    An image is the largest centred crop of the model's aspect ratio, resized (bicubic, antialiased). All batches have
    one shape, and all ranks run as many, so that a sharded model, whose forward all ranks have to join, can be used.

    Args:
        model: a ``MaskedAutoencoderViT`` or ``VisionTransformer``; afterwards as it was before (:func:`evaluating`).
        dataset: where the images are.
        sample_ids: int64 (n,), which of them.
        reduce: maps float32 tokens (N, 1 + L, D), behind the encoder's last norm, to (N, ...) on any device.
        dtype: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16`` to run the model under autocast.
        batch_size: images per forward.
        num_threads: that decode; None chooses.
        rank, world_size: this process encodes ``sample_ids[rank::world_size]``, which are the n rows returned.
        timeout: seconds to wait for a batch, whose missing images then count as unreadable.
        crop_ratio: side of the crop relative to the largest; 0.875 is the usual 224 of 256 pixels.
        on_batch: called after each forward, to show progress.
        encode: called instead of ``model.encode``.

    Returns:
        The reduced tokens (n, ...), and bool (n,) on the model's device: False where an image could not be read or
        decoded; its row means nothing.

    Raises:
        ValueError: no images, another number of channels than the model's, or ``batch_size`` not positive.
    """
    own, most = sample_ids[rank::world_size], -(-len(sample_ids) // world_size)
    if most == 0 or batch_size < 1:
        raise ValueError(f"sample_ids and batch_size: expected at least 1, got {most} and {batch_size}")
    if dataset.channels != model.in_chans:
        raise ValueError(f"dataset: expected images of {model.in_chans} channels, got {dataset.channels}")
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio: expected above 0 and at most 1, got {crop_ratio}")
    device, batch_size, low_precision = model.mean.device, min(batch_size, most), dtype != torch.float32
    threads = num_threads or choose_options(device, 0, world_size=world_size).num_threads
    batches = partial(_batches, dataset, own, model.img_size, batch_size, -(-most // batch_size), device.type == "cuda")
    found, readable = [], []
    with (
        evaluating(model),
        model.cast_weights(dtype) if low_precision else nullcontext(),
        serial_threads(threads, "fastmae-features") as pool,
    ):
        for images, good in batches(pool, timeout, crop_ratio):
            with torch.autocast(device.type, dtype, low_precision):
                tokens = (encode or model.encode)(model.normalized(images.to(device, non_blocking=True)))
            found.append(reduce(tokens.float()))
            readable.append(good)
            on_batch()
    return torch.cat(found)[: len(own)], torch.cat(readable)[: len(own)].to(device)


def pool_tokens(model: nn.Module, tokens: Tensor, pool: str) -> Tensor:
    """One feature (N, D) per image from tokens (N, 1 + L, D): "cls", the class token, or "avg", the mean of the others.

    Of a classifier that pools the same way it is what the head takes. Raises ValueError for the class token of an
    encoder without one.
    """
    if pool == "cls":
        if not model.num_prefix_tokens:
            raise ValueError("pool: expected avg, since the encoder has no class token")
        return tokens[:, 0]
    mean = tokens[:, model.num_prefix_tokens :].mean(1)
    return model.fc_norm(mean) if hasattr(model, "fc_norm") else mean


def pooled_features(model: nn.Module, dataset: Dataset, sample_ids: np.ndarray, **options: Any) -> Features:
    """Both pooled features of images; options and errors are those of :func:`encode_images`."""

    pools = ("avg", "cls") if model.num_prefix_tokens else ("avg",)

    def pool_all(tokens: Tensor) -> Tensor:
        return torch.cat([pool_tokens(model, tokens, pool) for pool in pools], 1)

    found, readable = encode_images(model, dataset, sample_ids, pool_all, **options)
    width = found.shape[1] // len(pools)
    return Features(found[:, width:], found[:, :width], readable)


def extract_features(
    model: nn.Module,
    images: Path | str | Dataset | Any,
    *,
    pool: Literal["cls", "avg"] | None = None,
    crop_ratio: float = 0.875,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> ImageFeatures:
    """Features of all images of a data set, by a frozen encoder, computed on the model's device.

    Args:
        model: what ``fastmae.load``, ``create_model`` or ``create_classifier`` return.
        images: what :func:`fastmae.data.open_dataset` takes, such as a folder, or what it returns.
        pool: the class token, or the mean of the patch tokens. None: what the head takes of a classifier; the mean for
            a masked autoencoder.
        crop_ratio: side of the centred crop relative to the largest; 0.875 is 224 of 256 pixels, 1 for small images.
        rank, world_size: several processes share the images; this one encodes every ``world_size``-th from ``rank`` on.
        options: ``dtype``, ``batch_size``, ``num_threads``, ``timeout`` and ``on_batch`` of :func:`encode_images`.

    Returns:
        Images that can be read, in the order of the data set.

    Raises:
        ValueError: an argument out of range.
        DataError: no such path, or nothing usable in it.
    """
    pool = pool or getattr(model, "pool", "avg")
    if pool not in ("cls", "avg"):
        raise ValueError(f'pool: expected "cls" or "avg", got {pool!r}')
    dataset = images
    if not isinstance(images, Dataset):
        dataset = open_dataset(images, channels=model.in_chans, max_bad_fraction=1.0)
    ids = np.arange(len(dataset))
    options |= {"crop_ratio": crop_ratio, "rank": rank, "world_size": world_size}
    found, readable = encode_images(model, dataset, ids, lambda t: pool_tokens(model, t, pool).cpu(), **options)
    good = readable.cpu().numpy()
    ids = ids[rank::world_size][good]
    return ImageFeatures(ids, [dataset.path(i) for i in ids.tolist()], found.numpy()[good])


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


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; the copy waits for nothing that the device has to do."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _batches(
    dataset: Dataset,
    sample_ids: np.ndarray,
    img_size: tuple[int, int],
    batch_size: int,
    count: int,
    pinned: bool,
    pool: Threads,
    timeout: float,
    crop_ratio: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches of images (N, C, H, W), and which were readable, bool (N,); grey where the ids have ended."""
    pending: deque[tuple[Tensor, list[Future]]] = deque()
    for start in range(0, (count + _AHEAD) * batch_size, batch_size):
        if start < count * batch_size:
            dtype, grey = (torch.uint8, 128) if dataset.value_range is None else (torch.float32, 0.5)
            shape = batch_size, *img_size, dataset.channels
            images = torch.full(shape, grey, dtype=dtype, pin_memory=pinned)
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
