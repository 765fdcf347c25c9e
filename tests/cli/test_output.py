"""Output that nobody reads ends no run, several processes print an error once, and a repeated signal kills none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from distributed import start_process
from pretrain_flags import FLAGS
from rich.console import Console
from training import write_images

from fastmae.cli import main
from fastmae.cli.output import forgiving_output, print_error
from fastmae.train.checkpoint import list_checkpoints


def piped(pipe: Path, argv: list[str]) -> None:
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.argv = ["fastmae", *argv]
    os._exit(main())


def test_ctrl_c_of_a_run_that_is_piped_saves_and_leaves(tmp_path):
    """As with ``| tee``, which gets the signal as well and is gone before the run says anything."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    images = str(write_images(tmp_path / "images"))
    process = start_process(piped, pipe, [*FLAGS, "--data.path", images, "--train.steps", "100000", "--out", str(run)])
    with pipe.open() as printed:
        assert any(line.startswith("step") for line in printed)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 75
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "SIGINT")
    assert list_checkpoints(run / "checkpoints")[0].name == f"step-{status['step']}"


def test_a_repeated_sigterm_is_one_request_from_before_pytorch_until_the_process_ends(tmp_path):
    run = tmp_path / "run"
    flags = [*FLAGS, "--data.path", str(write_images(tmp_path / "images")), "--out", str(run)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    patient = "import signal, sys; from fastmae.train.liveness import StopRequest; from fastmae.__main__ import run; "
    patient += "StopRequest.repeats[signal.SIGTERM] = 1e9; sys.exit(run())"  # machines may be slow
    with subprocess.Popen([sys.executable, "-c", patient, *flags], env=environment) as process:
        try:
            proc = Path(f"/proc/{process.pid}")
            while not int(proc.joinpath("status").read_text().split("SigCgt:")[1].split()[0], 16) >> 14 & 1:
                time.sleep(0.002)
            assert "libtorch" not in proc.joinpath("maps").read_text()
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            assert process.returncode == 75
        finally:
            process.kill()
    assert json.loads((run / "status.json").read_text()) == {"status": "preempted", "step": 0, "reason": "SIGTERM"}


def test_a_process_without_stdout_and_stderr_runs():
    command = f"exec {sys.executable} -m fastmae --version >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


def test_rank_0_prints_an_error_and_another_rank_only_what_it_ends_of_first(capsys, monkeypatch):
    print_error("a mistake")
    assert capsys.readouterr().err == "fastmae: error: a mistake\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    print_error("no disk")
    assert capsys.readouterr().err == "fastmae: error: no disk\n"
    monkeypatch.setenv("RANK", "1")
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()  # torchrun's, when rank 0 has ended
    print_error("no disk", patience=30.0)
    assert capsys.readouterr().err == ""
    print_error("bad cable", patience=0.05)
    assert capsys.readouterr().err == f"fastmae: error: rank 1 ({socket.gethostname()}): bad cable\n"


def test_help_is_printed_by_rank_0_alone(capsys, monkeypatch):
    for rank, printed in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match="0"):
            main(["plan", "--help"])
        assert ("--gpus" in capsys.readouterr().out) == printed


def test_what_has_no_place_to_go_is_dropped(monkeypatch, caplog):
    """Rich by itself ends a process whose pipe is broken."""
    reader, writer = os.pipe()
    os.close(reader)
    caplog.set_level("INFO", "fastmae")
    with os.fdopen(writer, "w") as pipe, Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", full)
        with forgiving_output():
            for _ in range(3):
                Console().print("something")
                print("something", file=sys.stderr, flush=True)
            assert not sys.stdout.isatty()
        monkeypatch.undo()
        for stream in (pipe, full):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    assert len(caplog.messages) == 2
    assert "nobody reads what is printed any more: [Errno 32] Broken pipe" in caplog.messages
