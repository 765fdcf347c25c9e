"""A run folder takes one job at a time, from whatever process, and is where files can be renamed and locked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from distributed import start_process

from fastmae.cli import main
from fastmae.train import run_folder
from fastmae.train.run_folder import RunFolder


def hold(path: Path) -> None:
    with RunFolder(path) as run:
        (run.path / "held").touch()
        time.sleep(60)


def test_a_job_is_refused_while_another_process_has_the_folder_and_not_once_it_was_killed(tmp_path, capsys):
    holder = start_process(hold, tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    flags = ["--recipe", "photographs", "--train.device", "cpu"]
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume", *flags]) == 2
    message = f"fastmae: error: --out {tmp_path}/run: in use by process {holder.pid} on {os.uname().nodename}"
    assert capsys.readouterr().err.strip() == message
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    RunFolder(tmp_path / "run", resume=True).close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path / "run"):
        pass
    (record,) = caplog.records
    assert f"{tmp_path}/run: THE FILE SYSTEM HAS NO LOCKS" in record.getMessage()

    def fail(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize("flag", ["--out", "--train.init-from"])
def test_object_stores_are_refused_by_flag(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--train.device", "cpu", flag, "s3://bucket/some/path"]) == 2
    message = f"{flag}: expected a path of a mounted file system, got s3://bucket/some/path: object stores are"
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_are_on_the_disk_before_they_take_the_place_of_others(tmp_path, monkeypatch):
    """Else a machine that goes down leaves an empty config.json or metrics.jsonl behind. Half a row is cut as well."""
    synced = []
    monkeypatch.setattr(run_folder, "sync", lambda path: synced.append((path.name, path.read_text())))
    with RunFolder(tmp_path / "run") as run:
        run.write_json("config.json", {"a": 1})
        run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
        run.cut_metrics(1)
        assert synced == [(".config.json.tmp", '{\n "a": 1\n}\n'), (".metrics.jsonl.tmp", '{"step": 1}\n')]
        assert run.read_json("config.json") == {"a": 1}
        assert run.read_metrics() == [{"step": 1}]


def test_a_folder_in_which_nothing_began_is_removed(tmp_path):
    RunFolder(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    RunFolder(tmp_path / "mine").close()
    assert list((tmp_path / "mine").iterdir()) == []
