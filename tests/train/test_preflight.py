"""Before the first step every rank says the same: that all is well, or what is wrong and where."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from checkpoints import save_checkpoint
from distributed import run_ranks
from training import MODEL, TRAIN

from fastmae.cli import main
from fastmae.model import create_model
from fastmae.train import preflight as module
from fastmae.train.checkpoint import Ranks
from fastmae.train.checkpoint.state import collect
from fastmae.train.config import DataConfig, PretrainConfig
from fastmae.train.optim import create_optimizer, parameter_groups
from fastmae.train.parallel import Parallelism, initialize, shutdown
from fastmae.train.preflight import PreflightError, check_folder, differences, preflight, required_bytes

CONFIG = PretrainConfig(model=MODEL, train=TRAIN, data=DataConfig(path=Path("images")))
Usage = namedtuple("Usage", "total used free")


class Images:
    """What is asked of a data set."""

    def __init__(self, length: int = 11, hash: str = "ab12") -> None:
        self.length, self.hash = length, hash

    def __len__(self) -> int:
        return self.length


def ask(rank: int, run: Path, *, config=CONFIG, images=None, ranks=None) -> str | None:
    """What a rank is told, None if all is well."""
    parallelism = Parallelism("ddp" if dist.is_initialized() else "none", rank=rank)
    model = create_model(**CONFIG.model_arguments())
    try:
        with ranks or Ranks.create() as own:
            preflight(config, parallelism, own, run=run, dataset=images or Images(), model=model)
    except PreflightError as error:
        return str(error)
    return None


def job(rank: int, folder: Path) -> dict:
    """Every case in one pair of processes: what rank 1 does differently, and what this rank was told."""
    parallelism = initialize("ddp", timeout=30)
    odd, told = rank == 1, {}
    run = folder / "run"
    told["all well"] = ask(rank, run)
    elsewhere = replace(CONFIG, out=Path(f"run-{rank}"), data=DataConfig(path=Path(f"images-{rank}")))
    told["paths"] = ask(rank, run, config=elsewhere)
    with patch.object(torch, "__version__", "2.9.0" if odd else torch.__version__):
        told["version"] = ask(rank, run)
    told["data"] = ask(rank, run, images=Images(10, "cd34") if odd else None)
    told["config"] = ask(rank, run, config=replace(CONFIG, train=replace(TRAIN, base_lr=0.5)) if odd else CONFIG)
    with patch.object(shutil, "disk_usage", (lambda path: Usage(9, 9, 5)) if odd else shutil.disk_usage):
        told["disk"] = ask(rank, run)
    told["not shared"] = ask(rank, folder / "local" if odd else run)
    with patch.object(torch, "full", (lambda *args, **kwargs: torch.zeros(1024)) if odd else torch.full):
        told["sum"] = ask(rank, run)
    first, second = Ranks.create(), Ranks.create()
    module.PATIENCE = module.TIMEOUT = 0.5
    told["late"] = None if odd else ask(rank, run, ranks=first)
    module.PATIENCE = 60.0
    with patch.object(module, "_add_up", (lambda parallelism: None) if odd else module._add_up):
        told["hang"] = ask(rank, run, ranks=second)
    begun = time.monotonic()
    shutdown(parallelism)  # with an all-reduce in it that never ends
    assert time.monotonic() - begun < 10
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str | None]:
    """Of each case what rank 0 was told, rank 1 having been told the same."""
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    first, second = run_ranks(job, 2, folder, init_group=False)
    assert {**second, "late": first["late"]} == first
    assert list((folder / "run" / "checkpoints").iterdir()) == []
    return first


HOST = re.escape(socket.gethostname())


@pytest.mark.parametrize("case", ["all well", "paths"])
def test_ranks_that_agree_go_on_also_from_folders_of_different_names(told, case):
    assert told[case] is None


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("version", rf"preflight: torch is 2\.9\.0 on rank 1 \({HOST}\), but \S+ on the other 1"),
        ("data", rf"data set is 10 images, hash cd34 on rank 1 \({HOST}\), but 11 images, hash ab12 on the other 1"),
        ("config", rf"--train\.base-lr is 0\.5 on rank 1 \({HOST}\), but 0\.03 on the other 1"),
        ("disk", rf"rank 1 \({HOST}\): .*checkpoints: 5e-09 GB free, expected \S+ GB for checkpoints"),
        ("not shared", rf"rank 1 \({HOST}\): .*local/checkpoints: the file that rank 0 wrote is not there"),
        ("sum", rf"rank 0 \({HOST}\): all-reduce \(gloo\): 1 to 1 instead of 3; rank 1 \({HOST}\): all-reduce \(gl"),
        ("hang", rf"rank 0 \({HOST}\): all-reduce: not done after 0\.5 s$"),
        ("late", r"not all ranks came in 0\.5 s .*[Rr]anks? \[?1"),
    ],
)
def test_every_rank_is_told_what_is_wrong_and_where_in_one_line(told, case, message):
    assert re.search(message, told[case])
    assert "\n" not in told[case]


def test_one_among_many_is_odd_and_a_long_list_is_cut():
    facts = [{"torch": "2"}] * 12
    hosts = [f"node{rank // 4}" for rank in range(12)]
    assert differences(facts, hosts) == []
    facts[9] = {"torch": "3"}
    assert differences(facts, hosts) == ["torch is 3 on rank 9 (node2), but 2 on the other 11"]
    facts[4:8] = [{}] * 4
    (text,) = differences(facts, hosts)
    assert text.endswith("unknown on rank 6 (node1) and 2 more, but 2 on the other 7")


def test_the_space_is_that_of_a_checkpoint_on_disk(tmp_path):
    """Of weights and optimiser; what else is in the file is small, and does not grow with the model."""
    model = create_model(**CONFIG.model_arguments())
    optimizer = create_optimizer(parameter_groups(model, 0.05), TRAIN)
    model(torch.rand(1, 3, *CONFIG.img_size)).loss.backward()
    optimizer.step()

    tensors = collect(model, optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    empty = required_bytes(model, tmp_path, TRAIN)
    path = save_checkpoint(tmp_path, 1, tensors, {})
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    checkpoint = empty - required_bytes(model, tmp_path, TRAIN)  # one of the four is there
    assert empty == 4 * checkpoint + weights
    assert checkpoint <= written < checkpoint + 300 * len(tensors)
    assert required_bytes(model, tmp_path, replace(TRAIN, keep_every_steps=1)) == empty  # that one stays
    last = replace(TRAIN, keep_checkpoints=1)
    assert required_bytes(model, tmp_path, last) == required_bytes(model.to("meta"), tmp_path, last)
    assert required_bytes(model, tmp_path, last) == checkpoint + weights


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    mark = tmp_path / "mark"
    mark.touch()
    assert check_folder(mark, 1, 0) is None
    with patch.object(Path, "write_bytes", side_effect=PermissionError(13, "Permission denied")):
        assert "expected a folder that can be written, got [Errno 13]" in check_folder(mark, 1, 0)
    assert list(tmp_path.iterdir()) == [mark]


def test_a_collective_that_fails_is_an_answer():
    def fail() -> None:
        raise RuntimeError("NCCL error:\nno route")

    assert module._limited(fail) == "all-reduce: NCCL error: no route"


def test_a_full_disk_ends_the_command_with_one_line_and_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 5))
    flags = ["--model.depth", "1", "--model.embed-dim", "32", "--model.num-heads", "2", "--train.device", "cpu"]
    assert main(["pretrain", "--out", str(tmp_path / "run"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmae: error: preflight: rank 0")
    assert "--train.keep-checkpoints keeps fewer" in line
    assert not (tmp_path / "run").exists()
