"""A run whose output nobody reads any more goes on, and leaves on a signal as it would otherwise."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from test_parallel_pretrain import FLAGS
from training import write_images

from fastmae.cli.output import forgiving_output
from fastmae.pretraining import WordWrapConsole
from fastmae.train.checkpoint import list_checkpoints


def test_ctrl_c_of_a_run_that_is_piped_saves_and_leaves(tmp_path):
    """As with ``| tee``, which gets the signal as well and is gone before the run says anything."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--data.path", str(write_images(tmp_path / "images")), "--train.steps", "100000"]
    command = [sys.executable, "-m", "fastmae", *flags, "--out", str(run)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **output) as process:
        try:
            assert any(line.startswith("step") for line in process.stdout)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 75
        finally:
            process.kill()
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "SIGINT")
    assert list_checkpoints(run / "checkpoints")[0].name == f"step-{status['step']}"


def test_a_terminal_breaks_lines_between_words_and_paths_stay_whole():
    path = f"/folder/{'a' * 30}/file-name.png"
    for terminal, lines in (
        (True, ["  one two", "  three:", f"  {path}", ""]),
        (False, [f"  one two three: {path}", ""]),
    ):
        console = WordWrapConsole(file=io.StringIO(), force_terminal=terminal, color_system=None, width=14)
        console.print(f"  one two three: {path}\n")
        assert console.file.getvalue().splitlines() == lines


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
