"""``fastmae env``: the report is complete, survives broken libraries, and does not import the noisy ones."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import fastmae
from fastmae import environment


@pytest.fixture(scope="module")
def printed() -> str:
    code = (
        "import sys; from fastmae.environment import report; print(report());"
        "print('IMPORTED', [m for m in ('nvidia.dali', 'xformers', 'apex', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_report_names_versions_and_devices(printed):
    assert re.search(rf"fastmae +{re.escape(fastmae.__version__)}", printed)
    assert re.search(rf"torch +{re.escape(torch.__version__)}, built for", printed)
    assert re.search(r"cpu +\S+.* logical cores usable, torch uses \d+ threads", printed)
    if not torch.cuda.is_available():
        assert re.search(r"cuda +none: ", printed)


@pytest.mark.parametrize("section", ["Versions", "Devices", "Kernels", "Attention", "Optimizers", "Data"])
def test_report_has_every_section_with_rows(printed, section):
    assert re.search(rf"^{section}\n  \S+", printed, re.MULTILINE)


def test_report_says_what_auto_attention_picks_and_why(printed):
    assert re.search(r"auto, cpu +by the nearest shape measured on \w+", printed)
    assert re.search(r"auto, cpu, float32, 197 tokens +heads of 32: (plain|sdpa) \([\d.]+\), heads of 64: ", printed)


def test_report_finds_the_decoders_by_decoding(printed):
    assert "torchvision.io decodes JPEG, PNG, WEBP" in printed


def test_report_imports_nothing_noisy(printed):
    assert printed.rstrip().endswith("IMPORTED []")


@pytest.mark.parametrize(
    "source", ["raise RuntimeError('built for another torch')", "raise SystemExit", "import os; os._exit(3)"]
)
def test_a_broken_apex_is_a_line_of_the_report(source, tmp_path, monkeypatch):
    (tmp_path / "apex.py").write_text(source)
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = environment._optimizers()
    assert "does not load" in dict(rows)["apex FusedAdam"]
    assert "GitHub source" in rows[-1][1]


def test_a_working_apex_is_found(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: ...")
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert dict(environment._optimizers())["apex FusedAdam"] == "found"


def test_a_library_that_crashes_after_it_answered_does_not_load():
    assert "exit status 3" in environment._ask("print('loads', flush=True); import os; os._exit(3)")


def test_kernels_that_do_not_import_are_reported(monkeypatch):
    def broken(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(environment, "import_module", broken)
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "xformers" else object())
    assert "do not import" in environment._kernels()[0][1]
    assert "does not import" in environment._attention()[0][1]
