"""Checkpoints of many ranks: read by any number of others, bit for bit; what fails on one fails on all, by name.

Starting processes takes longer than what they do here, so each of these functions checks many things in one start.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import load, save_checkpoint
from distributed import run_ranks, start_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastmae.train.checkpoint import (
    CheckpointError,
    CheckpointManager,
    Ranks,
    consolidate,
    list_checkpoints,
    open_checkpoint,
    open_latest,
    save,
)
from fastmae.train.checkpoint import load as loading
from fastmae.train.checkpoint.format import SHARD
from fastmae.train.checkpoint.load import read_together
from fastmae.train.checkpoint.state import collect

LIMIT = 1.0
"""Seconds that ranks wait for each other, where a test makes them wait longer."""

SHAPES = (7, 5, 4, 3)
"""Widths that four ranks cannot divide evenly: the last of them holds nothing of some tensors."""


def make(mesh: DeviceMesh | None, wrap: str):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(SHAPES)]
    model = nn.Sequential(*layers, nn.LayerNorm(SHAPES[-1]))
    if wrap == "fsdp":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def train(model, optimizer, steps, rank):
    for step in steps:
        images = torch.randn(4, SHAPES[0], generator=torch.Generator().manual_seed(10 * step + rank))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model, optimizer):
    """Every tensor of the state, gathered and in host memory."""
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in collect(model, optimizer).items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differences(one, other):
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [name for name in one if not torch.equal(one[name], other[name])]


def error_of(function):
    try:
        function()
    except CheckpointError as error:
        return str(error)
    return None


def four_ranks(rank: int, folder: Path) -> dict:
    """Groups of two, three and four of them save and load. Returns the state as it was saved, and what became of it."""
    found: dict = {}
    meshes = {n: DeviceMesh("cpu", torch.arange(n)) for n in (2, 3, 4)}
    square = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("replicate", "shard"))
    groups = {n: dist.new_group(list(range(n))) for n in (2, 3, 4)}

    if rank < 2:  # FSDP on two: saved, continued, and continued again from what was saved
        ranks = Ranks(groups[2])
        model, optimizer = make(meshes[2], "fsdp")
        train(model, optimizer, range(3), rank)
        path = save_checkpoint(folder, 3, collect(model, optimizer), {"step": 3}, ranks=ranks)
        saved = whole(model, optimizer)
        train(model, optimizer, range(3, 5), rank)
        again, other = make(meshes[2], "fsdp")
        load(path, again, other, ranks)
        found["2"] = whole(again, other)
        train(again, other, range(3, 5), rank)
        assert differences(whole(again, other), whole(model, optimizer)) == []
        tensors = collect(again, other)  # DCP fills them in place
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), process_group=groups[2])
        found["dcp"] = whole(again, other)
        found["saved"] = saved
    dist.barrier()

    for n in (3, 4):
        if rank < n:
            ranks = Ranks(groups[n])
            model, optimizer = make(meshes[n], "fsdp")
            load(folder / "step-3", model, optimizer, ranks)
            found[str(n)] = whole(model, optimizer)
            big = torch.zeros(save.SMALL, dtype=torch.uint8)
            tensors = {**collect(model, optimizer), "table": big, "table 2": big}
            save_checkpoint(folder, n * 10, tensors, {}, ranks=ranks)

    opened, safe_open = [], loading.safe_open
    loading.safe_open = lambda file, **options: opened.append(file.name) or safe_open(file, **options)
    save.SMALL = 60  # so that the larger tensors are divided among the ranks

    def load_counted(case: str, step: int, wrap: str, mesh: DeviceMesh | None = None, save_as: int | None = None):
        opened.clear()
        model, optimizer = make(mesh, wrap)
        load(folder / f"step-{step}", model, optimizer)  # with a group made for the call
        found[case], found[f"opened by {case}"] = whole(model, optimizer), sorted(set(opened))
        if save_as:
            save_checkpoint(folder, save_as, collect(model, optimizer), {})

    load_counted("fsdp", 40, "fsdp", meshes[4])
    load_counted("2x2", 40, "fsdp", square, save_as=22)
    load_counted("ddp of 2x2", 22, "none", save_as=23)
    load_counted("ddp of ddp", 23, "none")
    return found


def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path):
    results = run_ranks(four_ranks, 4, tmp_path, timeout=120)
    saved = results[0]["saved"]
    assert {saved[name].item() for name in saved if name.endswith(".step")} == {3.0}
    of_all = ("4", "fsdp", "2x2", "ddp of 2x2", "ddp of ddp")
    for rank, result in enumerate(results):
        for case in of_all + ("3",) * (rank < 3) + ("2", "dcp") * (rank < 2):
            assert differences(result[case], saved) == [], (rank, case)
        own = [SHARD.format(rank + 1)]
        assert result["opened by fsdp"] == own  # what all ranks hold is in the first, and only the first rank reads it
        assert (result["opened by 2x2"] == []) == (rank >= 2)  # the second replica is sent what the first has read
        assert result["opened by ddp of 2x2"] == ([SHARD.format(1), SHARD.format(2)] if rank == 0 else [])
        assert result["opened by ddp of ddp"] == own
    for step, number in {3: 2, 30: 3, 40: 4, 22: 2, 23: 4}.items():  # and a process alone
        path = tmp_path / f"step-{step}"
        assert sorted(p.name for p in path.glob("*.safetensors")) == [SHARD.format(i + 1) for i in range(number)], step
        model, optimizer = make(None, "none")
        load(path, model, optimizer)
        assert differences(whole(model, optimizer), saved) == [], step
        out = consolidate(open_checkpoint(path), tmp_path / f"{step}.safetensors", optimizer=True)
        tensors = {name: t for name, t in load_file(out).items() if name in saved}
        assert differences(tensors, saved) == [], step
    with_tables = open_checkpoint(tmp_path / "step-40").tensors
    assert {file for name in ("table", "table 2") for file, _ in with_tables[name].chunks()} == {SHARD.format(1)}


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-2] ^= 4
    shard.write_bytes(data)


DAMAGES = {"missing": Path.unlink, "flipped": flip}


def two_ranks(rank: int, folder: Path) -> dict:
    """What goes wrong, one case after the other; no case may hang or end differently on the ranks."""
    result: dict = {}
    ranks = Ranks.create(20.0)
    mesh = DeviceMesh("cpu", torch.arange(2))
    model, optimizer = make(mesh, "fsdp")
    train(model, optimizer, range(1), rank)
    save_checkpoint(folder, 1, collect(model, optimizer), {}, ranks=ranks)
    train(model, optimizer, range(1, 2), rank)
    good = save_checkpoint(folder, 2, collect(model, optimizer), {}, ranks=ranks)

    for kind in DAMAGES:
        bad = folder / "step-3"
        if rank == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            DAMAGES[kind](bad / SHARD.format(2))
        dist.barrier()
        text = error_of(lambda path=bad: load(path, model, optimizer, ranks))
        latest = open_latest(folder.parent, ranks=ranks).path
        result[kind] = (text, latest.name)
        dist.barrier()
    if rank == 0:
        shutil.rmtree(bad)
    dist.barrier()

    # Verified, and gone when it is to be read, by the second rank: the first learns of it and does not wait.
    state = {"a": torch.zeros(9), "b": torch.zeros(9)}
    save.SMALL, small = 1, save.SMALL
    path = save_checkpoint(folder, 3, state, {}, ranks=ranks)
    save.SMALL = small
    opened = open_checkpoint(path, ranks=ranks)
    dist.barrier()
    if rank == 1:
        (path / SHARD.format(2)).unlink()
    result["gone"] = error_of(lambda: read_together(opened, state, ranks))
    result["unlike"] = error_of(lambda: read_together(opened, {"a": torch.zeros(9 - rank)}, ranks))
    if rank == 0:
        shutil.rmtree(path)
    dist.barrier()

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # its disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    result["full"] = error_of(lambda: save_checkpoint(folder, 4, collect(model, optimizer), {}, ranks=ranks))
    dist.barrier()  # rank 0 has cleared up
    result["left"] = sorted(p.name for p in folder.iterdir())
    with CheckpointManager(folder, ranks, background=True) as saver:
        saver.save(5, collect(model, optimizer), {})
        while not (text := error_of(lambda: ranks.any(saver.saving) or saver.wait())):
            time.sleep(0.001)
        result["full in the background"] = text
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        saver.save(6, collect(model, optimizer), {})
        expected = whole(model, optimizer)
        train(model, optimizer, range(2, 4), rank)  # its collectives run beside those of the save
    load(folder / "step-6", model, optimizer, ranks)
    result["in the background"] = differences(whole(model, optimizer), expected)
    checkpoint = open_checkpoint(
        save_checkpoint(folder, 8, {"a": torch.full((2,), float(rank))}, {}, ranks=ranks), ranks=ranks
    )
    result["plain"] = checkpoint.read("a").tolist()
    apart = folder if rank == 0 else folder.parent / "another disk"
    apart.mkdir(exist_ok=True)
    save.SMALL = 1
    result["apart"] = error_of(lambda: save_checkpoint(apart, 9, {"a": torch.ones(9), "b": torch.ones(9)}, {}))
    save.SMALL = small
    result["noticed"] = notice(rank, folder)
    with Ranks.create(timeout=LIMIT) as impatient:
        # Rank 0 may take longer here, in a group that is closed and made again.
        result["patient"] = [impatient.first_in_hours("indexing", lambda: time.sleep(1.5 * LIMIT) or "index")]
        result["patient"] += [impatient.first_in_hours("counting", lambda: "count")]
        if rank == 0:  # the other does not come
            result["alone"] = error_of(lambda: impatient.gather("saving", lambda: None))
        dist.barrier()
    return result


def notice(rank: int, folder: Path) -> int:
    """How often ranks look until a save is seen to be done, of which the last rank learns late."""
    written = save.write

    def write_late(*args):
        path = written(*args)
        time.sleep(rank * LIMIT / 2)
        return path

    save.write = write_late
    with Ranks.create() as ranks, CheckpointManager(folder, ranks, background=True) as saver:
        saver.save(10, {"w": torch.zeros(4)}, {})
        looks = 1
        while not saver.holds(10):
            if not ranks.any(saver.saving):
                saver.wait()
            looks += 1
            time.sleep(0.02)
    save.write = written
    return looks


def test_what_goes_wrong_is_the_same_on_all_ranks_and_keeps_earlier_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first, second = run_ranks(two_ranks, 2, folder, timeout=60)
    assert "saving: a rank has ended or does not answer" in first.pop("alone")
    assert first["patient"] == ["index", "count"]
    assert first["noticed"] > 1  # and below, at the same step on both
    second["apart"] = second["apart"].replace("another disk", "checkpoints")
    assert first == second
    second_shard = SHARD.format(2)
    for kind, message in (("missing", "missing, but listed"), ("flipped", "contents differ")):
        text, latest = first[kind]
        assert f"{second_shard}: {message}" in text
        assert latest == "step-2"
    assert f"{second_shard}: unreadable" in first["gone"]
    assert "rank 1: " in first["unlike"]
    assert "a is float32 (9,), expected float32 (8,)" in first["unlike"]
    for case in ("full", "full in the background"):
        assert "rank 1: " in first[case]
        assert "File too large" in first[case]
        assert second_shard in first[case]
        assert "earlier checkpoints are untouched" in first[case]
    assert first["left"] == ["step-1", "step-2"]
    assert first["in the background"] == []
    assert first["plain"] == [0.0, 0.0]
    assert f"{second_shard}: " in first["apart"]
    assert "expected a folder on a file system that all ranks share" in first["apart"]


def dying_rank(rank: int, folder: Path) -> None:
    """Rank 1 is killed when its file of the second save is on the disk; rank 0 writes down what it is told."""
    unharmed = save.write_tensors

    def killed(path, *arguments):
        unharmed(path, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    save.SMALL = 1  # so that both ranks write
    state = {"a": torch.zeros(4), "b": torch.zeros(4)}
    save_checkpoint(folder, 1, state, {})
    if rank == 1:
        save.write_tensors = killed
    text = error_of(lambda: save_checkpoint(folder, 2, state, {}))
    (folder / "message.txt").write_text(str(text))


def test_a_rank_killed_during_a_save_leaves_no_checkpoint_and_no_one_waiting(tmp_path):
    folder, logs = tmp_path / "checkpoints", tmp_path / "logs"
    folder.mkdir()
    logs.mkdir()
    with start_ranks(dying_rank, 2, folder, folder=logs, timeout=60) as processes:
        for process in processes:
            process.join(40)
        assert processes[1].exitcode == -signal.SIGKILL
    text = (folder / "message.txt").read_text()
    assert "writing a checkpoint: a rank has ended or does not answer" in text
    assert [path.name for path in list_checkpoints(folder)] == ["step-1"]
    assert open_latest(tmp_path).read("a").tolist() == [0.0] * 4


def two_on_a_gpu(rank: int, folder: Path) -> tuple[bool, set[str], list[str]]:
    """Two processes of one GPU, whose tensors go through its memory."""
    torch.manual_seed(0)
    saved = {"on": torch.rand(1000, device="cuda"), "off": torch.rand(3), "step": torch.tensor(7.0, device="cuda")}
    path = save_checkpoint(folder, 1, saved, {})
    opened, safe_open = [], loading.safe_open
    loading.safe_open = lambda file, **options: opened.append(file.name) or safe_open(file, **options)
    targets = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    with Ranks.create() as ranks:
        read_together(open_checkpoint(path, ranks=ranks), targets, ranks)
    return (
        all(torch.equal(targets[name], saved[name]) for name in saved),
        {t.device.type for t in targets.values()},
        opened,
    )


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_sent_too(tmp_path):
    first, second = run_ranks(two_on_a_gpu, 2, tmp_path)
    assert first[:2] == second[:2] == (True, {"cpu", "cuda"})
    assert set(first[2]) == {SHARD.format(1)}
    assert second[2] == []
