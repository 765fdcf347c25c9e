"""``logs/rank-N.log`` has what a process did and died of, and the console what it had before."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from training import make_trainer, write_images

from fastmae.train.run_folder import RunFolder
from fastmae.train.telemetry.rank_log import RankLog

RESULT = logging.getLogger("fastmae.somewhere")


def text(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


def test_a_log_begins_and_ends_and_is_continued(tmp_path):
    for _ in range(2):
        with RankLog(tmp_path, 3, 8, torch.device("cpu")):
            RESULT.info("step 5")
            RESULT.debug("unseen")
    RESULT.info("too late")
    lines = text(tmp_path, 3).splitlines()
    assert len(lines) == 6
    assert "begins: rank 3 of 8, process " in lines[0]
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[1].endswith(" step 5")
    assert lines[2].endswith(" ends")
    assert lines[3].partition("begins")[2] == lines[0].partition("begins")[2]


def test_an_error_leaves_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path):
        print(1 / 0)
    assert "ends by an error:\nTraceback" in text(tmp_path)
    assert text(tmp_path).endswith("ZeroDivisionError: division by zero\n")


def test_warnings_go_to_the_log_and_where_they_went_before(tmp_path, capsys):
    with pytest.warns(UserWarning, match="odd shape"), RankLog(tmp_path):
        warnings.warn("odd shape", stacklevel=1)
    assert "UserWarning" in text(tmp_path)
    assert "odd shape" in text(tmp_path)


def test_a_warning_that_every_rank_has_is_shown_by_one(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    for rank in range(2):
        with RankLog(tmp_path, rank, 2):
            warnings.warn(f"of rank {rank}", stacklevel=1)
    assert shown == ["of rank 0"]
    assert "UserWarning" in text(tmp_path, 1)
    assert "of rank 1" in text(tmp_path, 1)


def test_logged_warnings_of_others_go_to_the_log_and_their_information_does_not(tmp_path, caplog):
    with RankLog(tmp_path):
        logging.getLogger("some.library").warning("disk is slow")
        logging.getLogger("some.library").info("hello")
        logging.getLogger("torch").warning("recompiled")
    assert "WARNING disk is slow" in text(tmp_path)
    assert text(tmp_path).count("WARNING recompiled") == 1
    assert "hello" not in text(tmp_path)
    assert "disk is slow" in caplog.text


PROGRAM = """
import ctypes, logging, sys, warnings
from pathlib import Path
from fastmae.train.telemetry.rank_log import RankLog

def work():
    logging.getLogger("fastmae").info("information")
    logging.getLogger("fastmae.data").warning("a warning")
    logging.getLogger("other").warning("of another")
    warnings.warn("and a third")
    verbose = logging.getLogger("verbose")
    verbose.addHandler(logging.StreamHandler())
    verbose.warning("of one with a handler")

if sys.argv[1] == "without":
    work()
else:
    with RankLog(Path(sys.argv[2])):
        work()
        ctypes.string_at(0)
"""


def program(kind: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, kind, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_the_console_shows_what_it_shows_without_a_log_and_a_crash_leaves_its_stack(tmp_path):
    without, logged = (program(kind, tmp_path) for kind in ("without", "with"))
    assert (logged.stdout, logged.stderr) == (without.stdout, without.stderr)
    for words in ("a warning", "of another", "and a third", "of one with a handler"):
        assert logged.stderr.count(words) == 1
        assert text(tmp_path).count(words) == 1
    assert "information" in text(tmp_path)
    assert logged.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in text(tmp_path)
    assert "string_at" in text(tmp_path)
    assert " ends" not in text(tmp_path)


def test_a_log_that_cannot_be_written_is_said_and_nothing_else(tmp_path, capsys):
    (tmp_path / "logs").write_text("in the way")
    with RankLog(tmp_path, 2):
        RESULT.warning("unheard")
    assert capsys.readouterr().err.startswith("WARNING: no log file for rank 2: ")


def test_a_disk_that_fills_up_ends_the_log_and_not_the_run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").symlink_to("/dev/full")
    with RankLog(tmp_path):
        RESULT.warning("unheard")


def test_intervals_have_lines(tmp_path):
    trainer = make_trainer(tmp_path / "run", write_images(tmp_path / "images"))
    with trainer.run, RankLog(trainer.run.path):
        trainer.fit()
    steps = [line for line in text(tmp_path / "run").splitlines() if " step " in line]
    assert [line.split(" step ")[1].split(":")[0] for line in steps] == ["4", "8", "12"]
    assert all("ms a step" in line and "ms for images" in line and "GiB of host memory" in line for line in steps)


def test_the_log_of_a_run_that_did_not_begin_is_in_nobodys_way(tmp_path):
    with RunFolder(tmp_path / "run") as run, RankLog(run.path):
        assert text(run.path)
    assert not (tmp_path / "run").exists()
    with RankLog(tmp_path, 1):  # of another process, left behind
        pass
    with RunFolder(tmp_path):
        pass
    assert not (tmp_path / "logs").exists()


def test_logs_of_somebody_else_are_not_touched(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/slurm-7.out").write_text("queued")
    with pytest.raises(ValueError, match="not empty"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path, resume=True) as run, RankLog(run.path):
        pass
    assert (tmp_path / "logs/slurm-7.out").read_text() == "queued"
