"""Whole runs on images that are not files of this machine: an object store, a data set in memory."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from loading import write_source
from object_store import serve
from pretrain_flags import no_evaluation
from test_run import TINY

import fastmae
from fastmae import data
from fastmae.cli import main
from fastmae.data import create_loader, errors


class Encoded:
    """Images by number."""

    fingerprint = "1"

    def __init__(self, folder: Path):
        self.files = [path.read_bytes() for path in sorted(folder.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> bytes:
        return self.files[i]


class Interrupting:
    """A loader that gives the process SIGINT with its third batch, as a notebook's stop button would."""

    def __init__(self, *arguments, **options):
        self._loader, self._count = create_loader(*arguments, **options), 0

    def __next__(self):
        self._count += 1
        if self._count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return next(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def weights(run: fastmae.Run) -> list[torch.Tensor]:
    assert run.status["status"] == "finished"
    return list(run.model().state_dict().values())


def test_a_run_that_is_interrupted_and_resumed_equals_one_on_local_shards(tmp_path, monkeypatch):
    """From a server that fails now and then, and from a data set in memory with the same images."""
    monkeypatch.setattr(errors, "PAUSES", (0.0,) * 3)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shards, options = write_source("shards", tmp_path / "data"), TINY | {"train_num_threads": 1}
    with no_evaluation(), serve(tmp_path / "data") as store:
        expected = weights(fastmae.pretrain(data=shards, out=tmp_path / "local", **options))
        sources = {"remote": f"{store.url}/shards", "memory": Encoded(tmp_path / "data" / "images")}
        for name, source in sources.items():
            store.faults.extend([503, None, "reset", None, None, "short"])
            with patch.object(data, "create_loader", Interrupting):
                run = fastmae.pretrain(data=source, out=tmp_path / name, **options)
            assert run.status["status"] == "preempted"
            assert 2 <= run.status["step"] <= 4
            run = fastmae.pretrain(data=source, out=tmp_path / name, resume=True)
            assert all(torch.equal(a, b) for a, b in zip(weights(run), expected, strict=True))
        assert not any(child.name != "local" for child in tmp_path.iterdir() if child.name.startswith("http"))


def test_a_run_on_a_python_object_is_resumed_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = Encoded(write_source("folder", tmp_path / "data"))
    with no_evaluation():
        fastmae.pretrain(data=source, out=tmp_path / "run", **(TINY | {"steps": 2}))
        assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume", "--train.steps", "4"]) == 2
        error = capsys.readouterr().err
        assert re.search(r"python://Encoded-\w+: .*fastmae.pretrain\(data=\.\.\., resume=True\)", error)
        assert fastmae.pretrain(data=source, out=tmp_path / "run", resume=True, steps=4).status["step"] == 4
    with pytest.raises(data.DataError, match="expected a map-style data set"):
        fastmae.pretrain(data=iter([1]), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_needs_a_file_system_is_refused_for_a_store(tmp_path, capsys):
    shards = write_source("shards", tmp_path / "data")
    assert main(["data", "shard", str(shards), "s3://bucket/out"]) == 2
    assert "OUT: expected a folder of a mounted file system, got s3://bucket/out" in capsys.readouterr().err
