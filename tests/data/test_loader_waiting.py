"""Loaders that wait, are waited for, or wait for ever: nothing hangs, and no more is made ahead than was asked for."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import KINDS, OPTIONS, assert_equal, needs_dali, take

from fastmae.data import DataError, create_loader
from fastmae.data import host as host_module
from fastmae.data import loader as loader_module
from fastmae.data import threads as threads_module
from fastmae.data.loader import PRODUCERS, choose_options
from fastmae.data.threads import Threads


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_hangs_is_named_and_left_behind(dataset, kind, monkeypatch, caplog):
    monkeypatch.setattr(threads_module, "PATIENCE", 0.2)
    take(dataset, kind, 1)  # has imported the decoder
    answer, read = threading.Event(), dataset.storage.read
    monkeypatch.setattr(dataset.storage, "read", lambda *where: (where[-1] == 7 and answer.wait(60), read(*where))[1])
    with (
        create_loader(dataset, loader=kind, batch_size=11, img_size=(8, 8), seed=0, timeout=2) as loader,
        pytest.raises(DataError, match=rf"no batch came within 2 s.*:\n  {dataset.path(7)}\n"),
    ):
        next(loader)
    assert "left behind" in caplog.text
    answer.set()


@pytest.mark.parametrize("kind", KINDS)
def test_interrupting_the_waiting_loses_no_batch(dataset, kind, monkeypatch):
    result = Future.result

    def interrupted(self, timeout=None):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return result(self, timeout)

    with create_loader(dataset, loader=kind, **OPTIONS) as loader:
        first = next(loader)
        with monkeypatch.context() as patched:
            patched.setattr(Future, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(loader)
        second = next(loader)
    assert_equal([first, second], take(dataset, kind, 2))


@pytest.mark.parametrize(("kind", "prefetch"), [("torch", 1), ("torch", 3), pytest.param("dali", 3, marks=needs_dali)])
def test_the_loader_works_ahead_while_the_consumer_does_not_ask(dataset, kind, prefetch, monkeypatch):
    finished, produce = [], loader_module.Loader.produce
    monkeypatch.setattr(
        loader_module.Loader, "produce", lambda self, step: (produce(self, step), finished.append(step))[0]
    )
    with create_loader(dataset, loader=kind, prefetch=prefetch, **OPTIONS) as loader:
        for consumed in (1, 2, 3):
            next(loader)
            deadline = time.monotonic() + 20
            while len(finished) < consumed + prefetch and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)  # time to go too far
            assert sorted(finished) == list(range(consumed + prefetch))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded(dataset, kind, monkeypatch):
    """Counted: batches whose memory is alive at once, over many steps; and what the process holds."""
    alive: set[int] = set()
    most = number = 0

    def counted(plan, images):
        nonlocal most, number
        number += 1
        alive.add(number)
        weakref.finalize(images.untyped_storage(), alive.discard, number)
        most = max(most, len(alive))
        decode(plan, images)

    options = {"batch_size": 4, "img_size": (224, 224), "seed": 0, "prefetch": 2, "cache_bytes": 0}
    with create_loader(dataset, loader=kind, **options) as loader:
        decode = loader._decoder.decode
        monkeypatch.setattr(loader._decoder, "decode", counted)
        for _ in range(30):
            next(loader)
        gc.collect()
        before = resident_bytes()
        for _ in range(150):
            next(loader)
        gc.collect()
        grown = resident_bytes() - before
    assert number >= 180
    assert most <= 2 + 1 + PRODUCERS  # waiting, handed out, and being made
    assert grown < 30e6, "150 batches are 90 MB"


def test_a_thread_holds_few_files_if_they_are_large(dataset, monkeypatch):
    held, decode = [], host_module.HostDecoder._decode_photographs
    monkeypatch.setattr(
        host_module.HostDecoder,
        "_decode_photographs",
        lambda self, plan, encoded, images: (held.append(len(encoded)), decode(self, plan, encoded, images)),
    )
    options = {"batch_size": 22, "num_threads": 1, "cache_bytes": 0}
    small = take(dataset, "torch", 2, **options)
    assert max(held) > 2
    monkeypatch.setattr(host_module, "_BYTES_AT_ONCE", 0)
    held.clear()
    assert_equal(take(dataset, "torch", 2, **options), small)
    assert max(held) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The threads


def test_results_and_errors_come_back_and_stopping_wakes_whoever_waits():
    several = Threads(3, "fastmae-test")
    assert list(several.map(lambda x: x * x, range(50))) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        several.submit(lambda: 1 / 0).result(20)
    several.shutdown()

    hold, pool, woken = threading.Event(), Threads(1, "fastmae-test"), []
    running, queued = pool.submit(hold.wait), pool.submit(int)
    waiter = threading.Thread(target=lambda: woken.append(running.exception(20)))
    waiter.start()
    while not running.running():
        time.sleep(0.001)
    pool.shutdown(wait=False)
    waiter.join(20)
    assert "stopped" in str(woken[0])
    hold.set()
    pool.shutdown(wait=True)
    assert queued.cancelled()
    assert pool.alive == []
    with pytest.raises(Exception, match="stopped"):
        pool.submit(int)


def test_only_decoding_threads_lose_their_openmp_teams(dataset):
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with create_loader(dataset, loader="torch", num_threads=2, **OPTIONS) as loader:
            next(loader)
            pool, found = loader._decoder.pool, threading.Barrier(2)
            counts = [pool.submit(lambda: (found.wait(20), torch.get_num_threads())[1]) for _ in range(2)]
            assert [count.result(20) for count in counts] == [1, 1]
            later = Threads(1, "fastmae-test")
            assert (torch.get_num_threads(), later.submit(torch.get_num_threads).result(20)) == (3, 3)
            later.shutdown()
    finally:
        torch.set_num_threads(usual)


# What is taken of the machine


def test_options_follow_the_machine(monkeypatch):
    monkeypatch.setattr(loader_module, "available_cores", lambda: 24)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_options(cpu, 1).num_threads == 12
    assert choose_options(cuda, 1).num_threads == 16
    assert choose_options(cuda, 1, world_size=2).num_threads == 12
    assert choose_options(cuda, 1, world_size=64).num_threads == 3
    assert choose_options(cuda, 1, num_threads=5, prefetch=4)[:2] == (5, 4)
    monkeypatch.setattr(loader_module, "physical_bytes", lambda: 64 << 30)
    assert choose_options(cuda, 1 << 29, world_size=8).prefetch == 2
    assert choose_options(cuda, 1 << 30, world_size=8).prefetch == 1
    assert choose_options(cuda, 1 << 30, world_size=8, prefetch=3).prefetch == 3
    text = choose_options(cuda, 38_535_168, num_threads=1).describe()
    assert text == "1 decoding thread on 24 cores, 2 batches ahead of 38.5 MB each"


@needs_dali
def test_hints_for_the_gpu_decoder_are_the_largest_image_and_known_to_dali(dataset):
    from nvidia.dali.backend import GetSchema

    from fastmae.data.dali import decoder_hints

    hints, rows = decoder_hints(dataset, 0.5), dataset.rows(np.arange(len(dataset)))
    assert hints["preallocate_height_hint"] == rows["height"].max()
    assert hints["preallocate_width_hint"] == rows["width"].max()
    assert hints["hw_decoder_load"] == 0.5
    schema = GetSchema("decoders__ImageSlice")
    assert all(schema.HasArgument(name) for name in hints)
