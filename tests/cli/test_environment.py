"""``fastmae env``: the report is complete, survives broken libraries, and does not import the noisy ones."""

from __future__ import annotations

import re
import subprocess
import sys

import torch

import fastmae
from fastmae import environment


def test_the_report_is_complete_and_imports_nothing_noisy():
    code = "import sys; from fastmae.cli import main; main(['env']);"
    code += "print('IMPORTED', [m for m in ('nvidia.dali', 'xformers', 'apex', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    report = done.stdout
    assert report.endswith("IMPORTED []\n")
    assert re.search(rf"^  fastmae +{re.escape(fastmae.__version__)}", report, re.MULTILINE)
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}, built for", report, re.MULTILINE)
    assert re.search(r"^  cpu +\S+.* logical cores usable, torch uses \d+ threads", report, re.MULTILINE)
    assert re.search(r"auto, cpu, float32, 197 tokens +heads of 32: (plain|sdpa) \([\d.]+\), heads of 64: ", report)
    assert "torchvision.io decodes JPEG, PNG, WEBP" in report
    for section in ("Versions", "Devices", "Kernels", "Attention", "Optimizers", "Data"):
        assert re.search(rf"^{section}\n  \S+", report, re.MULTILINE), section


def test_apex_that_is_broken_or_works_is_a_line_of_the_report(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for source, found in (
        ("raise RuntimeError('built for another torch')", "does not load (RuntimeError: built for another torch)"),
        ("import os; os._exit(3)", "does not load (exit status 3)"),
        ("class FusedAdam: ...", "found"),
    ):
        (tmp_path / "apex/__init__.py").write_text("")
        (tmp_path / "apex/optimizers.py").write_text(source)
        (_, (name, text), *how) = environment._optimizers()
        assert (name, text.removesuffix("; optional")) == ("apex FusedAdam", found)
        assert ("GitHub source" in str(how)) == (found != "found")


def test_a_library_that_crashes_after_it_answered_does_not_load():
    assert "exit status 3" in environment._ask("print('loads', flush=True); import os; os._exit(3)")


def test_kernels_that_do_not_import_are_reported(monkeypatch):
    def broken(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(environment, "import_module", broken)
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "xformers" else object())
    assert "do not import" in environment._kernels()[0][1]
    assert "does not import" in environment._attention()[0][1]
