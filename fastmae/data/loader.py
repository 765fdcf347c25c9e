"""A loader that needs nothing but torch and torchvision."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import NamedTuple, Self

import numpy as np
import torch

from fastmae.data.augment import jitter_into
from fastmae.data.batch import Batch, LateBad, Plan, Planner
from fastmae.data.dataset import BadFile
from fastmae.data.decode import UndecodableImage, resize_crop_into
from fastmae.data.errors import DataError
from fastmae.data.threads import Threads, join
from fastmae.data.upload import Upload

PREFETCH = 2
"""Batches made ahead; more does not help where the loader is slower, and costs memory where it is faster."""
_MOST_THREADS = 16
_MEMORY_SHARE = 8
"""Batches made ahead take at most this part of the memory, or only one is made."""
logger = logging.getLogger(__name__)


class LoaderOptions(NamedTuple):
    """What a loader uses of the machine.

    Attributes:
        num_threads: threads that read, decode and resize.
        prefetch: finished batches that wait for the consumer at most.
        cores: processor cores that this process may use.
        batch_bytes: bytes of a batch's images.
    """

    num_threads: int
    prefetch: int
    cores: int
    batch_bytes: int

    def describe(self) -> str:
        """For a log: what was chosen, out of what."""
        threads = f"{self.num_threads} decoding thread{'s' * (self.num_threads != 1)} on {self.cores} cores"
        batches = f"{self.prefetch} batch{'es' * (self.prefetch != 1)} ahead"
        return f"{threads}, {batches} of {self.batch_bytes / 1e6:.1f} MB each"


def choose_options(
    device: torch.device,
    batch_bytes: int,
    *,
    world_size: int = 1,
    num_threads: int | None = None,
    prefetch: int | None = None,
) -> LoaderOptions:
    """Options for one of ``world_size`` processes, with whatever the caller decided.

    Args:
        device: where the model is; if that is the CPU, half the cores are left to it.
        batch_bytes: bytes of a batch's images.
        world_size: processes in the run; as many of them as there are GPUs share this machine.
        num_threads, prefetch: not chosen, if given.

    Raises:
        ValueError: ``num_threads`` or ``prefetch`` below 1.
    """
    for name, value in (("num_threads", num_threads), ("prefetch", prefetch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    cores = available_cores()
    neighbours = min(world_size, max(torch.cuda.device_count(), 1)) if device.type == "cuda" else 1
    share = cores // neighbours if device.type != "cpu" else cores // 2
    threads = num_threads or max(1, min(_MOST_THREADS, share))
    affordable = PREFETCH * batch_bytes <= physical_bytes() // neighbours // _MEMORY_SHARE
    return LoaderOptions(threads, prefetch or (PREFETCH if affordable else 1), cores, batch_bytes)


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Loader(ABC):
    """An endless iterator of batches, made ahead in background threads.

    Which positions a batch holds is a pure function (:func:`fastmae.data.sampler.batch_positions`). Batches are equal
    bit for bit whatever the number of threads, and wherever in the run the loader was started.

    Attributes:
        kind: ``"torch"`` or ``"dali"``.
        options: what it uses of the machine.
    """

    kind: str
    num_producers = 1

    def __init__(
        self,
        planner: Planner,
        *,
        device: torch.device,
        options: LoaderOptions,
        timeout: float = 600.0,
        known_bad: Iterable[LateBad] = (),
        limit_bad: bool = True,
    ):
        self.planner, self.options, self.timeout = planner, options, timeout
        self.dataset, self.batch_size = planner.dataset, planner.batch_size
        if planner.augment.color_jitter and self.dataset.channels != 3:
            raise ValueError(f"color_jitter: hue and saturation need 3 channels, got {self.dataset.channels}")
        if planner.augment.color_jitter and self.dataset.value_range is not None:
            raise ValueError("color_jitter: expected 8-bit images, got a value range, with which they are floats")
        self._on_gpu = device.type == "cuda"
        if self._on_gpu and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._limit_bad = limit_bad
        self._late = {late.sample_id: late for late in (LateBad(*item) for item in known_bad)}
        self._reading: dict[int, int] = {}
        self._lock = threading.Lock()
        self._pool = Threads(options.num_threads, "fastmae-decode")
        # Threads start on the first GPU: without this, every rank would open a context there.
        initializer = (lambda: torch.cuda.set_device(device)) if self._on_gpu else None
        self._producers = Threads(self.num_producers, "fastmae-batch", initializer)
        self._pending: deque[Future[Batch]] = deque()
        self._next_step = 0
        self._error: BaseException | None = None
        self._upload = Upload(device) if self._on_gpu else None
        self._finalizer = weakref.finalize(self, _shut_down, self._producers, self._pool, self._upload)

    @abstractmethod
    def produce(self, step: int) -> Batch:
        """Make the batch of a step; called in a background thread, in order if there is one producer."""

    @property
    def num_threads(self) -> int:
        """Decoding threads."""
        return self.options.num_threads

    def describe(self) -> str:
        """For a log: how images are decoded, and what is used of the machine."""
        return f"{self.kind} loader: {self.options.describe()}"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch, on the device.

        With a GPU the copy of the one after it begins here, if that one is made: it runs while the caller computes.
        Nothing else depends on it. A batch that was copied and not taken has not been handed out.

        Raises:
            DataError: a file cannot be read, too many do not decode, or no batch came within ``timeout`` seconds.
        """
        if self._error is not None:
            raise self._error
        if not self._finalizer.alive:
            raise ValueError("the loader is closed")
        while len(self._pending) < self.options.prefetch:
            self._submit()
        if self._upload is None:
            batch = self._wait()
            self._advance()
            return batch
        if not self._upload.pending:
            self._upload.start(self._wait())
            self._advance()
        batch, following = self._upload.finish(), self._pending[0]
        if following.done() and following.exception() is None:  # an error is raised when it is this batch's turn
            self._upload.start(following.result())
            self._advance()
        return batch

    def _wait(self) -> Batch:
        """The first pending batch, which stays pending: interrupting the waiting must not lose it."""
        future = self._pending[0]
        try:
            return future.result(self.timeout)
        except Exception as error:
            # Going on would leave out this batch, so the same comes again.
            self._error = error if future.done() else self._late_batch()
            raise self._error from None if self._error is error else error

    def _advance(self) -> None:
        self._pending.popleft()
        self._submit()

    def _submit(self) -> None:
        self._pending.append(self._producers.submit(_produce, weakref.ref(self), self._next_step))
        self._next_step += 1

    def _late_batch(self) -> DataError:
        reading = sorted(set(self._reading.copy().values()))
        paths = "".join(f"\n  {self.dataset.path(i)}" for i in reading[:5]) or " none"
        return DataError(
            f"{self.dataset.root}: no batch came within {self.timeout:g} s. Files being read or decoded:{paths}\n"
            "The file system may hang. If it is only slow: a longer --data.timeout."
        )

    def close(self) -> None:
        """Stop the background threads; what hangs in a file is left behind. Closing twice does no harm."""
        self._finalizer()
        self._pending.clear()
        if not join([self._producers, self._pool]):
            logger.warning("%s: a thread still waits for a file; it is left behind", self.dataset.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def late_bad(self) -> list[LateBad]:
        """Files that turned out not to decode, ``known_bad`` and since, in the order of their sample ids.

        They are for reports and for the limit on bad files. Batches do not depend on them, so that a loader started
        anywhere in the run gives what one that ran all along does.
        """
        with self._lock:
            return [late for _, late in sorted(self._late.items())]

    @property
    def bad_files(self) -> list[BadFile]:
        """``late_bad`` by path."""
        return [BadFile(self.dataset.path(late.sample_id), late.reason) for late in self.late_bad]

    def plan(self, step: int) -> Plan:
        """What the batch of a step is made of, but for files that the index does not know to be bad."""
        return self.planner.plan(step)

    def image(self, sample_id: int) -> np.ndarray:
        """A sample's upright pixels, (height, width, C) of the data set's dtype."""
        with _Noted(self._reading, sample_id):
            pixels = self.dataset.decode(sample_id)
        if pixels.shape[:2] != self.dataset.shape(sample_id):
            raise UndecodableImage(f"decodes to {pixels.shape[:2]}, its header said {self.dataset.shape(sample_id)}")
        return pixels

    def read(self, sample_id: int) -> np.ndarray:
        """A sample's encoded bytes, uint8 (bytes,)."""
        with _Noted(self._reading, sample_id):
            return self.dataset.read(sample_id)

    def render(self, plan: Plan, j: int, out: np.ndarray) -> None:
        """Decode sample ``j`` of a plan on the host into ``out`` (H, W, C); replace it if it is bad."""
        plan, pixels = self.decodable(plan, j)
        self.finish_image(plan, j, pixels, plan.boxes[j], out)

    def decodable(self, plan: Plan, j: int) -> tuple[Plan, np.ndarray]:
        """The plan with a sample ``j`` that decodes as a whole, and its pixels.

        Which one that is depends on the files alone: one known to be bad is not tried again, and would fail again.
        """
        tried: set[int] = set()
        while True:
            source_id, position = int(plan.source_ids[j]), int(plan.positions[j])
            late = self._late.get(source_id)
            if late is None:
                try:
                    return plan, self.image(source_id)
                except UndecodableImage as error:
                    late = LateBad(source_id, str(error), position)
            # Also one that another thread found in a later batch, so that its position is the first one in any case.
            self.record_bad(late._replace(position=position))
            tried.add(source_id)
            keys = int(plan.sample_ids[j]), int(plan.epochs[j])
            plan = self.planner.with_source(plan, j, self.planner.replacement(*keys, tried))

    def finish_image(self, plan: Plan, j: int, pixels: np.ndarray, box: np.ndarray, out: np.ndarray) -> None:
        """Resize a crop of some pixels into ``out``, mirror it and change its colours as the plan says."""
        resize_crop_into(out, pixels, box, plan.flips[j])
        if plan.jitter is not None:
            jitter_into(out, plan.jitter[j])

    def record_bad(self, late: LateBad) -> None:
        """Remember a sample that does not decode.

        Raises:
            DataError: more samples are bad than the data set allows, if this loader is to judge that.
        """
        with self._lock:
            known = self._late.get(late.sample_id)
            if known is None or late.position < known.position:
                self._late[late.sample_id] = late
        if known is None:
            path = self.dataset.path(late.sample_id)
            logger.warning("%s: %s; another sample takes its place", path, late.reason)
        if self._limit_bad:
            self.dataset.check_bad_fraction({late.sample_id: late.reason for late in self.late_bad})

    def empty_images(self, plan: Plan) -> torch.Tensor:
        """Memory for a batch's images: (N, H, W, C) of the data set's dtype, pinned if it goes to a GPU."""
        shape = len(plan.positions), *plan.img_size, self.dataset.channels
        return torch.empty(shape, dtype=getattr(torch, self.dataset.dtype.name), pin_memory=self._on_gpu)

    def finish(self, plan: Plan, images: torch.Tensor) -> Batch:
        """A batch from images (N, H, W, C)."""
        ids, epochs = torch.from_numpy(plan.sample_ids), torch.from_numpy(plan.epochs)
        if self._on_gpu:
            ids, epochs = ids.pin_memory(), epochs.pin_memory()
        return Batch(images.permute(0, 3, 1, 2), ids, epochs)

    def for_each(self, action, count: int) -> None:
        """Run ``action(j)`` for ``j`` in ``0..count-1`` on the decoding threads, a few to a task."""
        chunk = max(1, min(16, count // (4 * self.options.num_threads)))
        starts = range(0, count, chunk)
        tasks = [self._pool.submit(_run_range, action, start, min(start + chunk, count)) for start in starts]
        for task in tasks:
            task.result()


class _Noted:
    """What the current thread is at, so that a message can tell when it never returns."""

    def __init__(self, notes: dict[int, int], sample_id: int):
        self.notes, self.sample_id = notes, sample_id

    def __enter__(self) -> None:
        self.notes[threading.get_ident()] = self.sample_id

    def __exit__(self, *exception: object) -> None:
        self.notes.pop(threading.get_ident(), None)


def _run_range(action, start: int, stop: int) -> None:
    for j in range(start, stop):
        action(j)


def _produce(reference: weakref.ref[Loader], step: int) -> Batch:
    # Queued work must not keep a loader alive that nobody holds any more.
    loader = reference()
    if loader is None:
        raise RuntimeError("the loader is gone")
    return loader.produce(step)


def _shut_down(producers: Threads, pool: Threads, upload: Upload | None) -> None:
    for threads in (producers, pool):
        threads.shutdown(wait=False)
    if upload is not None:
        upload.close()


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
