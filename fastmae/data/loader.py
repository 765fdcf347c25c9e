"""The loader: batches made ahead in background threads, by one of two decoders."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple, Self

import torch

from fastmae.data.batch import Batch, LateBad, Planner
from fastmae.data.dataset import BadFile
from fastmae.data.errors import DataError
from fastmae.data.host import HostDecoder
from fastmae.data.processes import available_cores
from fastmae.data.threads import Threads, join

PREFETCH = 2
"""Batches made ahead. More does not help where the loader is slower, and costs memory where it is faster."""
PRODUCERS = 2
"""Batches in the making at once, so that no thread waits for the slowest image of a batch."""
_MOST_THREADS = 16
_MEMORY_SHARE = 8
"""Batches made ahead take at most this part of the memory, or only one is made."""
logger = logging.getLogger(__name__)


class LoaderOptions(NamedTuple):
    """What a loader uses of the machine.

    Attributes:
        num_threads: threads that read, decode and resize.
        prefetch: most finished batches that wait for the consumer.
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


class Loader:
    """An endless iterator of batches, made ahead in background threads.

    Which positions a batch holds is a pure function (:func:`fastmae.data.sampler.batch_positions`). Batches are equal
    bit for bit whatever the number of threads, and wherever in the run the loader was started.

    Args:
        planner: what the batches are made of.
        decoder: makes the images.
        device: where batches are handed out.
        options: what to use of the machine.
        timeout: seconds without a batch after which ``next`` raises.
    """

    def __init__(
        self,
        planner: Planner,
        decoder: HostDecoder,
        *,
        device: torch.device,
        options: LoaderOptions,
        timeout: float = 600.0,
    ):
        self.planner, self.options, self.timeout, self.device = planner, options, timeout, device
        self.dataset, self.batch_size, self.kind = planner.dataset, planner.batch_size, decoder.kind
        self._decoder = decoder
        on_gpu = device.type == "cuda"
        self._upload = Upload(device) if on_gpu else None
        self._producers = Threads(PRODUCERS, "fastmae-batch", (lambda: _use_gpu(device)) if on_gpu else None)
        self._pending: deque[Future[Batch]] = deque()
        self._next_step = 0
        self._error: BaseException | None = None
        self._finalizer = weakref.finalize(self, _shut_down, self._producers, decoder.pool, self._upload)

    def describe(self) -> str:
        """For a log: how images are decoded, and what is used of the machine."""
        return f"{self._decoder.describe()}: {self.options.describe()}"

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
        """The first pending batch, which stays pending: interrupting the wait must not lose it."""
        future = self._pending[0]
        try:
            return future.result(self.timeout)
        except Exception as error:
            # The next call raises it again: to go on would skip this batch.
            self._error = error if future.done() else self._late_batch()
            raise self._error from None if self._error is error else error

    def _advance(self) -> None:
        self._pending.popleft()
        self._submit()

    def _submit(self) -> None:
        self._pending.append(self._producers.submit(_produce, weakref.ref(self), self._next_step))
        self._next_step += 1

    def _late_batch(self) -> DataError:
        reading = sorted(set(self._decoder.reading.copy().values()))
        paths = "".join(f"\n  {self.dataset.path(i)}" for i in reading[:5]) or " none"
        return DataError(
            f"{self.dataset.root}: no batch came within {self.timeout:g} s. Files being read or decoded:{paths}\n"
            "The file system may hang. If it is only slow: a longer --data.timeout."
        )

    def produce(self, step: int) -> Batch:
        """Make the batch of a step, here and now."""
        plan, on_gpu = self.planner.plan(step), self.device.type == "cuda"
        shape, dtype = (len(plan), *plan.img_size, self.dataset.channels), getattr(torch, self.dataset.dtype.name)
        pinned = on_gpu and self._decoder.device.type == "cpu"
        images = torch.empty(shape, dtype=dtype, device=self._decoder.device, pin_memory=pinned)
        self._decoder.decode(plan, images)
        keys = torch.from_numpy(plan.sample_ids), torch.from_numpy(plan.epochs)
        return Batch(images.permute(0, 3, 1, 2), *(key.pin_memory() if on_gpu else key for key in keys))

    def close(self) -> None:
        """Stop the background threads; one that waits for a file is left behind. Closing twice does no harm."""
        self._finalizer()
        self._pending.clear()
        if join([self._producers, self._decoder.pool]):
            self._decoder.close()
        else:
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
        return self._decoder.late_bad

    @property
    def bad_files(self) -> list[BadFile]:
        """``late_bad`` by path."""
        return [BadFile(self.dataset.path(late.sample_id), late.reason) for late in self.late_bad]


def _use_gpu(device: torch.device) -> None:
    # Threads start on the first GPU, where every rank would open a context.
    torch.cuda.set_device(device)
    # Batches get memory of a stream of this thread, which is reused only after whoever read it (Upload.finish).
    torch.cuda.set_stream(torch.cuda.Stream(device))


def _produce(reference: weakref.ref[Loader], step: int) -> Batch:
    # A queued step must not keep a loader alive that nobody holds any more.
    loader = reference()
    if loader is None:
        raise RuntimeError("the loader is gone")
    return loader.produce(step)


def _shut_down(producers: Threads, pool: Threads, upload: Upload | None) -> None:
    for threads in (producers, pool):
        threads.shutdown(wait=False)
    if upload is not None:
        upload.close()


class Upload:
    """Copies one batch ahead to a GPU, on a stream of its own, beside the training step and not in front of it.

    Memory is allocated and freed on the consumer's stream and hence reused in its order, however far the host is ahead
    of the device. Three things keep that right: the copy waits for what the consumer's stream has queued so far (it may
    still use this memory), the consumer's stream waits for the copy's event, and it does so too for a batch that nobody
    takes. The host never waits. What is on the device already, such as images that DALI decodes there, is not copied.

    Args:
        device: a CUDA device.
        cuda: ``torch.cuda``; tests pass a stand-in.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._batch: Batch | None = None
        self._copied: Any = None

    @property
    def pending(self) -> bool:
        """Whether a batch is on its way."""
        return self._batch is not None

    def start(self, batch: Batch) -> None:
        """Begin to copy a batch, whose tensors are pinned or on the device; none may be pending."""
        copies = [t if t.device == self._device else torch.empty_like(t, device=self._device) for t in batch]
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            for copy, tensor in zip(copies, batch, strict=True):
                if copy is not tensor:
                    copy.copy_(tensor, non_blocking=True)
            self._copied = self._stream.record_event()
        self._batch = Batch(*copies)

    def finish(self) -> Batch:
        """The pending batch: what is queued on the current stream from now on finds it there."""
        batch, self._batch = self._batch, None
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(self._copied)
        for tensor in batch:
            # A no-op for memory of this stream. A decoder's images have memory of another one, which must not take it
            # back while this one still reads; so has a copy that was started while another stream was current.
            tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Drop the pending batch, if there is one."""
        if self.pending:
            self.finish()
