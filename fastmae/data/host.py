"""Images decoded on the host, and what takes the place of those that do not decode.

A decoder thread holds the interpreter lock while it runs Python, so that all threads together make no more images per
second than the Python per image allows. Everything that can be looked up for a whole batch is in its plan. What is left
per image are a handful of calls that release the lock: open, read, decode, resize, mirror.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastmae.data.augment import jitter_into
from fastmae.data.batch import LateBad, Plan, Planner, Source
from fastmae.data.decode import UndecodableImage, crop_of, interleaved, resize_into
from fastmae.data.formats import Format
from fastmae.data.threads import Threads

_AT_ONCE, _BYTES_AT_ONCE = 8, 16 << 20
"""Most images that a thread takes at once, and most bytes of them."""
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
        kind: ``"torch"``.
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

    def describe(self) -> str:
        return "torch loader"

    def close(self) -> None:
        pass

    def decode(self, plan: Plan, images: Tensor) -> None:
        """Make the images of a plan: (N, H, W, C), written."""
        outs = split(images)

        def decode_some(numbers: range) -> None:
            crops = self._crops(plan.sources[numbers.start : numbers.stop])
            self.finish(plan, numbers, crops, outs)

        largest = max(source.height * source.width for source in plan.sources) * 3
        self.for_each(decode_some, len(plan), _BYTES_AT_ONCE // largest)

    def finish(
        self,
        plan: Plan,
        numbers: Sequence[int],
        crops: Sequence[Tensor | None],
        outs: Sequence[Tensor] | Mapping[int, Tensor],
    ) -> None:
        """Resize some samples' crops (1, C, height, width) into ``outs[j]``; mirror them and change their colours as
        planned. Samples without a crop are decoded one by one."""
        for j, crop in zip(numbers, crops, strict=True):
            if crop is None:
                self.render(plan, j, outs[j])
            else:
                resize_into(outs[j], crop)
        for j in numbers:
            if plan.mirrored[j]:
                outs[j].copy_(outs[j].flip(plan.mirrored[j]))
            if plan.jitter is not None:
                jitter_into(outs[j][0].permute(1, 2, 0).numpy(), plan.jitter[j])

    def render(self, plan: Plan, j: int, out: Tensor) -> None:
        """Decode sample ``j`` of a plan and resize its crop into ``out`` (1, C, H, W); replace it if it is bad.

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
        resize_into(out, crop_of(image, image.shape, source.box))

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

    def _crops(self, sources: Sequence[Source]) -> list[Tensor | None]:
        """The crops of ordinary photographs; None for all others, and for those that do not decode.

        One stage after the other for all of them: behind a decoder the interpreter's code and data have left the
        processor's caches, and the same Python takes several times as long.
        """
        if self._images is not None:
            return [None] * len(sources)
        encoded = [self._photograph(source) for source in sources]
        images = [
            None if data is None else self._decoded(data, source) for data, source in zip(encoded, sources, strict=True)
        ]
        return [
            None if image is None else crop_of(image, (source.height, source.width, 3), source.box)
            for image, source in zip(images, sources, strict=True)
        ]

    def _photograph(self, source: Source) -> Tensor | None:
        if source.orientation != 1 or source.format not in self._decoders:
            return None
        try:
            encoded = self.read(source)
        except UndecodableImage:
            return None
        return torch.from_numpy(encoded if encoded.flags.writeable else encoded.copy())

    def _decoded(self, encoded: Tensor, source: Source) -> Tensor | None:
        try:
            image = self._decoders[source.format](encoded, self._rgb)
        except RuntimeError:
            return None
        return image if image.shape == (3, source.height, source.width) else None

    @cached_property
    def _decoders(self) -> dict[int, Callable[..., Tensor]]:
        if self.dataset.channels != 3 or self.dataset.value_range is not None:
            return {}
        from torchvision.io import ImageReadMode

        self._rgb = ImageReadMode.RGB.value
        # Their images are (3, height, width), interleaved. torchvision's public functions take 7 us more.
        image = torch.ops.image
        return {Format.JPEG: image.decode_jpeg.default, Format.WEBP: image.decode_webp.default}

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

    def for_each(self, action: Callable[[range], object], count: int, most: int = _AT_ONCE) -> None:
        """Run ``action(numbers)`` for at most ``most`` of ``0..count-1`` at a time, on the decoding threads. Each takes
        the next ones when it is done with some, so that large images hold up no others."""
        size = max(1, min(_AT_ONCE, most, count // (2 * self.num_threads)))
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


def split(images: Tensor) -> Sequence[Tensor]:
    """The images of a batch (N, H, W, C), as (1, C, H, W) each."""
    return images.permute(0, 3, 1, 2).split(1)
