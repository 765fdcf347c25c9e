"""The Slurm script's decisions, with executables in Slurm's and torchrun's place that do as little as they can."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from distributed import start_process
from pretrain_flags import FLAGS, no_evaluation
from torch.distributed.run import get_args_parser
from training import write_images

from fastmae.cli import main
from fastmae.train.launcher import read_slurm
from fastmae.train.liveness import StopRequest
from fastmae.train.run_folder import RunFolder, read_json

ROOT = Path(__file__).parents[2]
SCRIPT, PAGE = ROOT / "examples" / "slurm" / "pretrain.sbatch", ROOT / "docs" / "running.md"
LONG = 30

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[ "$1 $2" = "show hostnames" ] && printf 'node1\\nnode2\\n'
exit 0
"""
TORCHRUN = """#!/bin/bash
leave() {
    echo "torchrun got SIGUSR1" >> "$CALLS"
    cp "$STATUS" "$RUN/status.json"
    exit 1
}
trap leave USR1
mkdir -p "$RUN"
if [ -n "$WAITS" ]; then
    echo waiting >> "$CALLS"
    for _ in $(seq 600); do sleep 0.05; done
fi
[ -n "$CHECKPOINT" ] && mkdir -p "$RUN/checkpoints/step-$CHECKPOINT"
[ -n "$STATUS" ] && cp "$STATUS" "$RUN/status.json"
exit "$CODE"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


class Job:
    """The script as Slurm runs it: ``calls`` are those of the executables."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self._calls = folder, folder / "run", folder / "calls"
        binaries = folder / "bin"
        binaries.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        self._path = f"{binaries}{os.pathsep}{os.environ['PATH']}"

    def status(self, status: str, step: int) -> Path:
        """A file that says how a run ended, as a run writes it."""
        with RunFolder(self.folder / f"{status}-{step}", resume=True) as run:
            return run.write_json("status.json", {"status": status, "step": step, "reason": 'all "step": 9 done'})

    def start(
        self,
        *flags: str,
        restarts: int = 0,
        status: Path | None = None,
        code: int = 1,
        notice: bool = False,
        checkpoint: int | None = None,
    ) -> tuple[int, str]:
        """Run the script to its end: exit code and output. ``notice`` is SIGUSR1 while its launcher runs, as Slurm
        sends it before the time is over."""
        own = {"PATH": self._path, "CALLS": self._calls, "RUN": self.run, "CODE": code, "WAITS": "1" * notice}
        own |= {"STATUS": status or "", "CHECKPOINT": checkpoint or "", "SLURM_JOB_ID": 12345, "SLURM_JOB_NUM_NODES": 2}
        own |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": 4}
        own |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        process = subprocess.Popen(
            ["bash", str(SCRIPT), str(self.run), *flags],
            env=environment | {name: str(value) for name, value in own.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if notice:
            deadline = time.monotonic() + LONG
            while "waiting" not in self.calls and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=LONG)[0]
        return process.returncode, output

    @property
    def calls(self) -> str:
        return self._calls.read_text() if self._calls.exists() else ""

    @property
    def requeued(self) -> bool:
        """Whether the job has been requeued since this was asked last."""
        found = "scontrol requeue 12345\n" in self.calls
        self._calls.unlink(missing_ok=True)
        return found


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_finished_run_ends_the_job(job):
    code, output = job.start("--recipe", "imagenet-vit-b", status=job.status("finished", 9), code=0)
    assert "-m fastmae pretrain --out" in job.calls
    assert "--recipe imagenet-vit-b" in job.calls
    assert "--resume" not in job.calls
    assert "--rdzv-endpoint node1:32345 --rdzv-id 12345-0" in job.calls
    assert "--nodes=2 --ntasks-per-node=1 --cpus-per-task=4" in job.calls
    assert (code, job.requeued) == (0, False), output


def test_a_run_that_never_trained_is_not_requeued(job):
    code, output = job.start(code=7)
    assert (code, job.requeued) == (7, False)
    assert "did not start training; not requeued" in output


def crash(job: Job, restarts: int, status: Path | None, **options) -> bool:
    """Whether the job is requeued after a crash; it ends with 0 then, otherwise with the launcher's exit code."""
    code, output = job.start(restarts=restarts, status=status, code=7, **options)
    requeued = job.requeued
    assert code == (0 if requeued else 7), output
    return requeued


def test_crashes_without_a_new_checkpoint_are_requeued_three_times(job):
    """Preemptions are requeued without limit; SLURM_RESTART_COUNT counts them too."""
    for restarts in range(4):
        job.start(restarts=restarts, status=job.status("preempted", restarts))
        assert job.requeued
    failed, killed = job.status("failed", 9), job.status("running", 9)
    assert [crash(job, 9, failed), crash(job, 10, None), crash(job, 11, killed)] == [True] * 3
    crashes = [crash(job, 12, failed, checkpoint=None if number else 16) for number in range(4)]
    assert crashes == [True, True, True, False]
    assert crash(job, 0, killed)  # submitted again by a person


def test_a_requeued_job_resumes_once(job):
    job.start(restarts=1, status=job.status("preempted", 12))
    assert job.calls.splitlines()[-2].count("--resume") == 1
    job.start("--resume", restarts=2, status=job.status("finished", 15))
    assert job.calls.splitlines()[-1].count("--resume") == 1


def test_the_status_of_an_earlier_start_does_not_count(job):
    job.start(status=job.status("finished", 9))
    code, output = job.start(restarts=1, status=None)  # fails before it trains
    assert (code, job.requeued) == (0, True)
    assert "did not start training; crash 1 without a new checkpoint, of at most 3; back into the queue" in output


def test_only_its_own_time_limit_ends_a_run_that_gets_no_further(job):
    preempted = job.status("preempted", 9)
    code, output = job.start(notice=True, status=preempted)
    assert "torchrun got SIGUSR1" in job.calls, output
    assert (code, job.requeued) == (0, True), output
    code, output = job.start(notice=True, restarts=1, status=preempted)
    assert (code, job.requeued) == (1, False)
    assert "its time was over at step 9, where it began" in output
    job.start(restarts=2, status=preempted)  # another job's turn came while it started
    assert job.requeued


STEP = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "28", "SLURM_PROCID": "26"}
STEP |= {"SLURM_LOCALID": "2", "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x3),4"}
STEP |= {"SLURM_STEP_NODELIST": "rack[2-3]gpu[003-004],cpu-1"}


def test_srun_takes_the_place_of_torchrun():
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for more, expected in (
        ({}, ("26", "28", "2", "4", "rack2gpu003", "27521")),
        ({"CUDA_VISIBLE_DEVICES": "2", "MASTER_PORT": "9"}, ("26", "28", "0", "4", "rack2gpu003", "9")),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_NODELIST": "n7"},
            ("26", "28", "2", "4", "127.0.0.1", "27521"),
        ),
    ):
        environment = STEP | more
        read_slurm(environment)
        assert tuple(environment[name] for name in own) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
        STEP | {"RANK": "0", "WORLD_SIZE": "16"},  # torchrun, which srun started
    ],
)
def test_one_process_under_slurm_stays_one(environment):
    before = dict(environment)
    read_slurm(environment)
    assert environment == before


def task(rank: int, folder: Path) -> None:
    """A task of ``srun``: the environment has nothing of torchrun's."""
    os.environ |= STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1"}
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")
    os.environ["SLURM_JOB_ID"] = str(os.getppid())  # another port for each test process
    os.dup2(os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY), 1)
    with no_evaluation():
        os._exit(main([*FLAGS, "--data.path", str(folder / "images"), "--out", str(folder / "run")]))


def test_tasks_of_srun_train_one_model(tmp_path):
    write_images(tmp_path / "images")
    processes = [start_process(task, rank, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(2 * LONG)
    assert [process.exitcode for process in processes] == [0, 0]
    assert "2 processes (ddp) x 1 x 4 images" in (tmp_path / "0.log").read_text()
    assert (tmp_path / "1.log").read_text() == ""
    assert read_json(tmp_path / "run/status.json")["status"] == "finished"


def test_torchrun_knows_the_options_of_script_and_page():
    known = set(re.findall(r"--[a-z-]+", (usage := get_args_parser().format_help())))
    for page in (SCRIPT, PAGE):
        commands = re.findall(r"\btorchrun (--.*?) -m fastmae ", page.read_text().replace("\\\n", " "))
        named = set(re.findall(r"--[a-z-]+", " ".join(commands)))
        assert named
        assert named <= known
    # Older versions have neither the option nor the variable, and an unknown option ends torchrun.
    if "--shutdown-timeout" in known:
        waits = set(re.findall(r"export (TORCH_\w+)=", SCRIPT.read_text() + PAGE.read_text()))
        assert {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"} == waits & set(re.findall(r"\w+", usage))


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([(TERM, 0), (TERM, 8)], 0),  # Slurm and torchrun both deliver it, and a launcher may take seconds
        ([(TERM, 0), (TERM, 20)], 143),
        ([(INT, 0), (INT, 0.5)], 0),
        ([(INT, 0), (INT, 2)], 130),  # a person, who presses Ctrl-C again
        ([(TERM, 0), (INT, 1)], 130),
        ([(USR1, 0), (USR1, 20), (TERM, 180), (USR1, 190)], 0),  # the end of the time after notice
        ([(USR1, 0), (TERM, 180), (TERM, 200)], 143),
    ],
)
def test_repeated_signals_are_one_request_unless_they_come_late(signals, code):
    child = os.fork()
    if child == 0:
        with StopRequest(process_ends=True):
            for number, seconds in signals:
                time.monotonic = lambda seconds=seconds: seconds
                os.kill(os.getpid(), number)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
