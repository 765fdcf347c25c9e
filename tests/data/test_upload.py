"""Copies of batches to a GPU: the order of what is queued, and loaders that hand out the same batches with them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from loading import KINDS, OPTIONS, assert_equal, take, write_source
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.data import Batch, DataError, create_loader, open_dataset
from fastmae.data.loader import Upload

HERE = torch.device("cpu", 0)
"""Another device than the loaders' "cpu", for what compares them, on which copies have values."""


class Cuda(TorchDispatchMode):
    """Stands in for ``torch.cuda``, and notes what is queued on which stream."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.log: list[tuple] = []
        self.main = self.now = Stream(self, "main")
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.note("records"))

    def Stream(self, device):
        return Stream(self, "copies")

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        self.now, before = stream, self.now
        yield
        self.now = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.empty_like, torch.ops.aten.copy_):
            self.now.note(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def note(self, what, *values):
        self.cuda.log.append((self.name, what, *values))

    def wait_stream(self, other):
        self.note("waits for", other.name)

    def record_event(self):
        self.note("event")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.note("waits for", event)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_a_copy_has_a_stream_of_its_own_and_memory_of_the_consumers(cuda):
    images = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    batch, upload = Batch(images, torch.arange(2), torch.arange(2)), Upload(HERE, cuda)
    with cuda:
        upload.start(batch)
        arrived = upload.finish()
    assert cuda.log == [
        *[("main", "empty_like")] * 3, ("copies", "waits for", "main"), *[("copies", "copy_")] * 3, ("copies", "event"),
        ("main", "waits for", "event of copies"), *[("main", "records")] * 3,
    ]  # fmt: skip
    assert_equal([arrived], [batch])
    assert arrived.images.stride() == images.stride()
    assert arrived.images.data_ptr() != images.data_ptr()


def test_what_is_there_is_not_copied_and_what_is_dropped_is_waited_for(cuda):
    batch, upload = Batch(*(torch.zeros(2) for _ in range(3))), Upload(torch.device("cpu"), cuda)
    with cuda:
        upload.start(batch)
        upload.close()
        upload.close()
    waits = [("copies", "waits for", "main"), ("copies", "event"), ("main", "waits for", "event of copies")]
    assert cuda.log == [*waits, *[("main", "records")] * 3]
    assert not upload.pending


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_copy_a_batch_ahead_and_raise_an_error_for_its_own_batch(tmp_path, cuda, kind):
    dataset = open_dataset(write_source("folder", tmp_path / "images"), cache_dir=tmp_path / "cache")
    expected = take(dataset, kind, 4)
    with create_loader(dataset, loader=kind, **OPTIONS, prefetch=2) as loader:
        loader._upload = upload = Upload(HERE, cuda)
        produce = loader.produce

        def fails_at_the_fifth(step):
            if step == 4:
                raise DataError("the fifth")
            return produce(step)

        loader.produce = fails_at_the_fifth
        found = [next(loader)]
        while len(found) < len(expected):
            for future in loader._pending:
                future.exception()
            found.append(next(loader))
            assert upload.pending == (len(found) < 4)
        assert_equal(found, expected)
        for _ in range(2):
            with pytest.raises(DataError, match="the fifth"):
                next(loader)
