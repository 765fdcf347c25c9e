"""``fastmae.pretrain`` in a script, in a thread and in a notebook; what a ``Run`` shows of a folder."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from training import write_images

import fastmae
from fastmae import pretraining
from fastmae.data import open_dataset
from fastmae.loading import load
from fastmae.train.liveness import StopRequest

ROOT = Path(__file__).parents[2]
TINY = {
    "recipe": "photographs",
    "img_size": (32, 48),
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_num_heads": 2,
    "global_batch_size": 8,
    "steps": 6,
    "log_every_steps": 2,
    "precision": "fp32",
    "device": "cpu",
    "loader": "torch",
    "data_num_threads": 1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_a_run_returns_what_it_left_and_can_be_continued(tmp_path, images, monkeypatch):
    before, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(3)
    run = fastmae.pretrain(data=images, out=tmp_path / "run", train_num_threads=1, **TINY)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    assert repr(run) == f"Run('{tmp_path}/run': finished, step 6)"
    assert [row["step"] for row in list_of(run.metrics)] == [2, 4, 6]
    assert run.summary["sets"]
    assert Path(run.figure.filename).name == "final.png"
    model, weights = run.model(), load(tmp_path / "run").state_dict()
    assert not model.training
    assert model.patch_size == (8, 8)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    run = fastmae.pretrain(out=tmp_path / "run", resume=True, steps=8, train_num_threads=1)
    assert run.status == {"status": "finished", "step": 8, "reason": "all steps done"}
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=tuple))
    assert isinstance(run.metrics, tuple)


def list_of(table) -> list[dict]:
    return table if isinstance(table, list) else table.to_dict("records")


def test_outside_the_main_thread_no_signal_handler_is_needed(tmp_path, images):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(fastmae.pretrain(data=images, out=tmp_path / "run", **TINY)))
    thread.start()
    thread.join()
    assert runs[0].status["status"] == "finished"


def test_an_interrupt_saves_and_returns(tmp_path, images):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return open_dataset(*arguments, **options)

    with patch.object(pretraining.data, "open_dataset", interrupted):
        run = fastmae.pretrain(data=images, out=tmp_path / "run", **TINY)
    assert run.status["status"] == "preempted"
    assert run.summary is run.figure is None
    assert fastmae.pretrain(out=tmp_path / "run", resume=True).status["step"] == 6


def test_a_second_interrupt_raises_and_does_not_end_the_process(tmp_path, images, monkeypatch):
    monkeypatch.setitem(StopRequest.repeats, signal.SIGINT, 0.0)

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with patch.object(pretraining.data, "open_dataset", interrupted), pytest.raises(KeyboardInterrupt):
        fastmae.pretrain(data=images, out=tmp_path / "run", **TINY)
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epoch": 3}, TypeError, "epoch: no such option; did you mean epochs?"),
        ({"num_threads": 3}, TypeError, "num_threads: expected data_num_threads or train_num_threads"),
        ({"epochs": "3"}, ValueError, "--train.epochs: expected a number, got '3'"),
        ({"hflip": True}, ValueError, "--data.hflip: expected a number, got True"),
        ({"img_size": (64,)}, ValueError, "--model.img-size: expected 2 numbers, got (64,)"),
        ({"base_lr": -1}, ValueError, "--train.base-lr: expected a positive number, got -1"),
        ({"recipe": "imagenet"}, ValueError, "--recipe: expected one of photographs, "),
        ({"data": "/no/such/folder"}, fastmae.data.DataError, "/no/such/folder"),
        ({"resume": True}, ValueError, "--resume: expected --out"),
    ],
)
def test_mistakes_are_exceptions_and_leave_no_folder(tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        fastmae.pretrain(**options)
    assert message in str(raised.value)
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture
def kernel(tmp_path):
    """The quickstart in a Jupyter kernel that runs in ``tmp_path``."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    with client.setup_kernel(env=os.environ | {"PYTHONPATH": paths, "IPYTHONDIR": str(tmp_path / "ipython")}):
        yield client


def test_the_quickstart_runs_in_a_notebook_and_its_stop_button_saves(kernel, tmp_path):
    cells = {cell.id: cell for cell in kernel.nb.cells}
    (parameters,) = (cell for cell in kernel.nb.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\noptions = {TINY}"
    for index, cell in enumerate(kernel.nb.cells):
        kernel.execute_cell(cell, index)
    outputs = {name: cell.get("outputs", []) for name, cell in cells.items()}
    assert "finished, step 6" in outputs["pretrain"][-1]["data"]["text/plain"]
    bars = [output for output in outputs["pretrain"] if output.output_type == "display_data"]
    assert ["step 6/6" in bar["data"]["text/plain"] for bar in bars] == [True]  # one, updated in place
    assert "image/png" in outputs["figure"][0]["data"]
    assert "(1, 25, 32)" in outputs["features"][-1]["data"]["text/plain"]

    cells["options"].source += "\noptions |= {'steps': 1000000, 'out': 'stopped', 'max_minutes': 1.0}"
    kernel.execute_cell(cells["options"], 1)

    def stop() -> None:
        while not (tmp_path / "stopped" / "metrics.jsonl").is_file():
            time.sleep(0.05)
        os.kill(kernel.km.provisioner.pid, signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    kernel.execute_cell(cells["pretrain"], 3)
    thread.join()
    assert "preempted, step" in cells["pretrain"].outputs[-1]["data"]["text/plain"]
    kernel.execute_cell(cells["metrics"], 7)  # the kernel lives
