"""Images decoded on the host, and what takes the place of those that do not decode.

A decoder thread holds the interpreter lock while it runs Python, so that all threads together make no more images per
second than the Python per image allows. Everything that can be looked up for a whole batch is in its plan. What is left
per image is to read it; one call decodes, crops, resizes and mirrors several, without the lock.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from fastmae.data.augment import jitter_into
from fastmae.data.batch import LateBad, Plan, Planner, Source
from fastmae.data.decode import UndecodableImage, compiled, interleaved, render_crops, render_photographs
from fastmae.data.formats import Format
from fastmae.data.threads import Threads

_AT_ONCE, _BYTES_AT_ONCE = 16, 16 << 20
"""Most images that a thread takes at once, and bytes of files after which it takes no more."""
logger = logging.getLogger(__name__)


def serial_threads(count: int, name: str) -> Threads:
    """Threads in which PyTorch computes without a team of OpenMP threads.

    Otherwise each of them would start its own team for anything larger than 32,768 elements: twice the processor time
    alone, and tens of times slower beside a training loop on the same cores.
    """
    # The number of OpenMP threads belongs to the thread that sets it. PyTorch also gives it to threads that come later,
    # so it is restored here; and it sets the number of a thread at first use, hence the call before.
    usual, started = torch.get_num_threads(), threading.Barrier(count + 1)

    def initialize() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    threads = Threads(count, name, initialize)
    started.wait()
    torch.set_num_threads(usual)
    return threads


class HostDecoder:
    """Decodes with torchvision and resizes with PyTorch, in threads. What cannot be decoded it replaces.

    Args:
        planner: what the batches are made of.
        num_threads: decoding threads.
        known_bad: what ``late_bad`` was in the run that is resumed.
        limit_bad: raise when more files are bad than the data set allows.
        cache_bytes: each image is decoded once and kept, if all of them together take no more.

    Attributes:
        kind: ``"torch"``, or ``"dali"`` for :class:`fastmae.data.dali.DaliDecoder`.
        device: where the images are made.
        pool: the decoding threads.
        reading: the sample that each thread is reading or decoding, by thread.
    """

    kind = "torch"
    device = torch.device("cpu")

    def __init__(
        self,
        planner: Planner,
        num_threads: int,
        known_bad: Iterable[LateBad] = (),
        *,
        limit_bad: bool = True,
        cache_bytes: int = 0,
    ):
        self.planner, self.dataset, self.num_threads = planner, planner.dataset, num_threads
        self.pool = serial_threads(num_threads, "fastmae-decode")
        self.reading: dict[int, int] = {}
        self._late = {late.sample_id: late for late in (LateBad(*item) for item in known_bad)}
        self._limit_bad, self._lock = limit_bad, threading.Lock()
        small = cache_bytes and self.dataset.decoded_bytes(cache_bytes) <= cache_bytes
        self._images: dict[int, Tensor] | None = {} if small else None
        ordinary = self.dataset.channels == 3 and self.dataset.value_range is None and not small
        self._photographs = (Format.JPEG, Format.WEBP) if ordinary else ()
        self._render_crops, self._render_photographs = compiled(render_crops), compiled(render_photographs)

    def describe(self) -> str:
        """For a log: how images are decoded."""
        return "torch loader"

    def close(self) -> None:
        """Free what the decoder holds; no thread is decoding any more."""

    def decode(self, plan: Plan, images: Tensor) -> None:
        """Make the images of a plan: (N, H, W, C) on ``device``, written. Several threads call this."""
        self.for_each(lambda numbers: self._decode_some(plan, numbers, images), len(plan))

    def _decode_some(self, plan: Plan, numbers: Iterable[int], images: Tensor) -> None:
        encoded: dict[int, Tensor] = {}
        size = 0
        for j in numbers:
            data = self._photograph(plan.sources[j])
            if data is None:
                self.render(plan, j, images)
                continue
            encoded[j] = data
            size += len(data)
            if size > _BYTES_AT_ONCE:
                self._decode_photographs(plan, encoded, images)
                encoded, size = {}, 0
        self._decode_photographs(plan, encoded, images)

    def _photograph(self, source: Source) -> Tensor | None:
        """The encoded bytes of an ordinary photograph; None for all others, which ``render`` decodes."""
        if source.orientation != 1 or source.format not in self._photographs or source.sample_id in self._late:
            return None
        try:
            encoded = self.read(source)
        except UndecodableImage:
            return None
        return torch.from_numpy(encoded if encoded.flags.writeable else encoded.copy())

    def _decode_photographs(self, plan: Plan, encoded: dict[int, Tensor], images: Tensor) -> None:
        numbers, files = [*encoded], [*encoded.values()]
        sources, flips = [plan.sources[j] for j in numbers], plan.flips[numbers].tolist()
        headers = [(source.format == Format.WEBP, source.height, source.width) for source in sources]
        try:
            self._render_photographs(files, headers, [source.box for source in sources], flips, images, numbers)
        except (RuntimeError, torch.jit.Error):  # of one that does not decode, not saying which
            for j in encoded:
                self.render(plan, j, images)
        else:
            self._jitter(plan, encoded, images)

    def finish(self, plan: Plan, crops: dict[int, Tensor], images: Tensor) -> None:
        """Resize the decoded crops (height, width, C) of some samples, mirror them and change their colours."""
        numbers, boxes = [*crops], [(0, 0, *crop.shape[:2]) for crop in crops.values()]
        self._render_crops([*crops.values()], boxes, plan.flips[numbers].tolist(), images, numbers)
        self._jitter(plan, crops, images)

    def render(self, plan: Plan, j: int, images: Tensor) -> None:
        """Make ``images[j]`` of a plan; replace it if it is bad.

        Which one takes its place depends on the files alone: one known to be bad is not tried again, and would fail
        again.
        """
        source, excluded = plan.sources[j], set()
        while True:
            late = self._late.get(source.sample_id)
            if late is None:
                try:
                    image = self.image(source)
                    break
                except UndecodableImage as error:
                    late = LateBad(source.sample_id, str(error), 0)
            # Also one that another thread found in a later batch, so that its position is the first one in any case.
            self._record(late._replace(position=int(plan.positions[j])))
            excluded.add(source.sample_id)
            source = self.planner.replace(plan, j, excluded)
        self._render_crops([image], [source.box], plan.flips[j : j + 1].tolist(), images, [j])
        self._jitter(plan, [j], images)

    def _jitter(self, plan: Plan, numbers: Iterable[int], images: Tensor) -> None:
        if plan.jitter is not None:
            for j in numbers:
                jitter_into(images[j].numpy(), plan.jitter[j])

    def image(self, source: Source) -> Tensor:
        """The upright pixels of a source: (height, width, C) of the data set's dtype, contiguous."""
        image = None if self._images is None else self._images.get(source.sample_id)
        if image is None:
            pixels = self.dataset.decode_bytes(self.read(source), source.orientation)
            upright = (source.height, source.width)[:: -1 if source.orientation >= 5 else 1]
            if pixels.shape[:2] != upright:
                raise UndecodableImage(f"decodes to {pixels.shape[:2]}, its header said {upright}")
            image = interleaved(pixels)
            if self._images is not None:
                self._images[source.sample_id] = image
        return image

    def read(self, source: Source) -> np.ndarray:
        """The encoded bytes of a source: uint8 (bytes,)."""
        self.reading[threading.get_ident()] = source.sample_id
        return self.dataset.storage.read(source.file, source.offset, source.size, source.sample_id)

    @property
    def late_bad(self) -> list[LateBad]:
        with self._lock:
            return [late for _, late in sorted(self._late.items())]

    def _record(self, late: LateBad) -> None:
        """Remember a sample that does not decode.

        Raises:
            DataError: more samples are bad than the data set allows, if this decoder is to judge that.
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

    def for_each(self, action: Callable[[range], object], count: int) -> None:
        """Run ``action(numbers)`` for a few of ``0..count-1`` at a time, on the decoding threads. Each takes the next
        ones when it is done with some, so that large images hold up no others."""
        size = max(1, min(_AT_ONCE, count // (2 * self.num_threads)))
        parts = deque(range(start, min(start + size, count)) for start in range(0, count, size))

        def work() -> None:
            try:
                while True:
                    try:
                        numbers = parts.popleft()
                    except IndexError:
                        return
                    action(numbers)
            except BaseException:
                parts.clear()
                raise
            finally:
                self.reading.pop(threading.get_ident(), None)

        tasks = [self.pool.submit(work) for _ in range(min(len(parts), self.num_threads))]
        for task in tasks:
            task.result()
