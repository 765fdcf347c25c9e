"""Folders for the Hugging Face hub: a card that says what is known, no path of this machine, no network unasked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import fastmae
from fastmae.cli import main
from fastmae.hub import Pretrained
from fastmae.model.classifier import VisionTransformer
from fastmae.train.checkpoint import CheckpointError

RUN = Path(__file__).parents[1] / "integration" / "fixtures" / "run-0.1.0"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose configuration has paths of this machine, with a picture."""
    run = shutil.copytree(RUN, tmp_path / "private" / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"], config["train"]["init_from"] = "/private/photos", "/private/w.pth"
    (run / "config.json").write_text(json.dumps(config))
    (run / "reconstructions").mkdir()
    shutil.copyfile(run / "images" / "0.png", run / "reconstructions" / "final.png")
    return run


def test_a_run_becomes_a_folder_with_a_card(run, tmp_path, capsys):
    out = tmp_path / "photos"
    flags = ["--to", "hub", "--data-license", "CC BY 4.0, by the photographers"]
    assert main(["convert", str(run), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "loss: largest difference 0" in printed
    assert f"hf upload OWNER/NAME {out}" in printed
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "curves.png", "model.safetensors", "reconstruction.png"
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for expected in (
        "# photos", "library_name: fastmae", "| recipe | photographs, version 1 |", "1 blocks of 16, 2 heads",
        "32 x 32 pixels, 3 channels, patches of 8 x 8", "predicts plain pixels", "CC BY 4.0, by the photographers",
        "(reconstruction.png)", "(curves.png)", "can show what does not exist", "| training | 6 steps of batches of 4;",
    ):  # fmt: skip
        assert expected in card, expected
    assert json.loads((out / "config.json").read_text())["train"]["base_lr"] == 0.012
    for file in out.iterdir():
        assert b"private" not in file.read_bytes(), file.name
    model, info = fastmae.load(out, return_info=True)
    assert (info.step, info.has_decoder, info.source) == (fastmae.load(run, return_info=True)[1].step, True, "fastmae")
    assert model.architecture == fastmae.load(run).architecture
    assert main(["convert", str(run), str(tmp_path / "x"), "--to", "timm", "--data-license", "mine"]) == 2
    assert "--data-license: --to timm has no model card" in capsys.readouterr().err


@pytest.fixture
def classifier() -> VisionTransformer:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "pool": "avg"}
    return VisionTransformer(4, **options).eval()


def test_models_go_there_and_back(classifier, tmp_path):
    folder = tmp_path / "birds"
    Pretrained(classifier, name="Birds").save_pretrained(folder)
    again = Pretrained.from_pretrained(folder)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.model(images), classifier(images))
    assert again.info.num_classes == 4
    card = (folder / "README.md").read_text()
    assert "# Birds" in card
    assert "| licence of the data | not stated |" in card
    assert "pipeline_tag: image-classification" in card
    (folder / "README.md").write_text("edited by hand")
    with torch.no_grad():
        classifier.head.bias += 1
    Pretrained(classifier).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "edited by hand"
    assert torch.equal(fastmae.load(folder)(images), classifier(images))
    (folder / "model.safetensors").unlink()
    for make in (lambda path: None, os.mkfifo):  # which nothing waits for
        make(folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"birds.*model\.safetensors: .*no such file"):
            fastmae.load(folder)


def test_a_model_is_uploaded_when_asked(classifier, tmp_path, monkeypatch):
    def create_repo(api, repo_id, **options):
        assert (api.token, repo_id, options) == ("secret", "me/birds", {"private": True, "exist_ok": True})
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(api, *, folder_path, revision, create_pr, **options):
        assert (revision, create_pr) == ("next", True)
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return f"https://hub/{options['repo_id']}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    options = {"private": True, "token": "secret", "branch": "next", "create_pr": True}
    assert Pretrained(classifier, "CC0").push_to_hub("me/birds", **options) == "https://hub/me/birds"
    assert {path.name for path in (tmp_path / "uploaded").iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert "# birds" in card
    assert "| licence of the data | CC0 |" in card


def test_names_on_the_hub_are_looked_up_and_come_from_the_cache_offline(run, tmp_path, monkeypatch, capsys):
    """In huggingface_hub's own cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    revision = 40 * "a"
    cached = tmp_path / "cache" / "models--me--photos"
    Pretrained(run).save_pretrained(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    expected = fastmae.load(run).state_dict()
    models = [fastmae.load("hf-hub:me/photos"), fastmae.load(f"hf-hub:me/photos@{revision}")]
    models += [Pretrained.from_pretrained("me/photos", revision=name).model for name in (None, revision)]
    for found in (model.state_dict() for model in models):
        assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    assert main(["inspect", "hf-hub:me/photos"]) == 0
    assert "fastmae" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="hf-hub:me/other: "):
        fastmae.load("hf-hub:me/other")
    with pytest.raises(CheckpointError, match="me/photos: no such file or folder"):
        fastmae.load("me/photos")
