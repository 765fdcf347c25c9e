"""``fastmae convert``: every target computes the same and leads back to the same weights; what cannot be is refused."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

import fastmae
from fastmae.cli import main
from fastmae.cli.convert import TARGETS
from fastmae.interop import export, facebook, to_hugging_face
from fastmae.interop import timm as to_timm
from fastmae.interop.facebook import weights_of
from fastmae.model import PRESETS, MaskedAutoencoderViT, build_model, create_model
from fastmae.model.classifier import VisionTransformer
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.weights import export_weights

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mean": [0.25, 0.5, 0.75]}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, "norm_pix_loss": True}
SUFFIXES = {name: target.suffix for name, target in TARGETS.items()}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(kind: str = "mae", **changes) -> nn.Module:
    """A model in which every tensor, norms and biases too, matters to the outputs."""
    torch.manual_seed(0)
    if kind in ("mae", "ablated"):
        model = build_model(ENCODER | DECODER | changes)
    else:
        model = VisionTransformer(5, pool=kind, **ENCODER | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def saved(model: nn.Module, folder: Path) -> str:
    return str(export_weights(model, folder / "source.safetensors", step=7))


def convert(source: object, target: str, folder: Path, *flags: str) -> Path:
    """The path that the command has written."""
    out = folder / f"{target}{SUFFIXES[target]}"
    assert main(["convert", str(source), str(out), "--to", target, *flags]) == 0
    return out


def refusal(capsys, source: object, target: str, folder: Path, *flags: str, out: str = "out") -> str:
    """What the command prints when it fails, leaving nothing."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(["convert", str(source), str(folder / f"{out}{SUFFIXES[target]}"), "--to", target, *flags]) == 2
    assert sorted(folder.rglob("*")) == before
    return " ".join(capsys.readouterr().err.split())


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert other.architecture == model.architecture
    assert getattr(other, "has_decoder", None) == getattr(model, "has_decoder", None)
    one, two = weights_of(model), weights_of(other)
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


@pytest.mark.parametrize("kind", ["mae", "cls", "avg"])
@pytest.mark.parametrize("target", ["facebook", "transformers", "timm", "safetensors"])
def test_there_and_back_is_the_identity(target, kind, tmp_path, capsys):
    model = build(kind)
    source = saved(model, tmp_path)
    if (target, kind) == ("transformers", "avg"):
        assert "classifies the class token; these weights pool" in refusal(capsys, source, target, tmp_path)
        return
    out = convert(source, target, tmp_path)
    compared = ["encoder tokens", *(["predictions", "loss"] if kind == "mae" else ["logits"])]
    if (target, kind) == ("timm", "mae"):  # which has no decoder
        compared, model.has_decoder = compared[:1], False
        model.architecture |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 1}
        model.architecture["norm_pix_loss"] = False
    printed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in printed.splitlines() if "largest difference" in line] == compared
    again, info = fastmae.load(out, return_info=True)
    assert_same(model, again)
    if target == "safetensors":
        assert info.step == 7
    if kind == "mae":
        assert info.norm_pix_loss is (None if target == "timm" else True)
    for file in out.iterdir() if out.is_dir() else [out]:
        assert file.stat().st_mode & 0o044, "others may read what a umask of 022 lets them"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_there_and_back(name, tmp_path):
    """With its patches, heads and ratio of widths, two blocks deep and four channels per head."""
    preset = PRESETS[name]
    sizes = {"img_size": 2 * preset["patch_size"], "depth": 2, "decoder_depth": 2, "norm_pix_loss": True, "seed": 0}
    sizes |= {f"{part}embed_dim": 4 * preset[f"{part}num_heads"] for part in ("", "decoder_")}
    model = create_model(name, **sizes)
    for target in ("facebook", "transformers", "timm"):
        model.has_decoder = TARGETS[target].decodes
        path = tmp_path / f"{target}{SUFFIXES[target]}"
        TARGETS[target].write(model, path)
        again = fastmae.load(path)
        assert again.has_decoder == model.has_decoder
        one, two = weights_of(model), weights_of(again)
        assert one.keys() == two.keys()
        assert not [key for key in one if not torch.equal(one[key], two[key])]
        kept = (
            model.architecture if model.has_decoder else {n: model.architecture[n] for n in ("num_heads", "img_size")}
        )
        assert again.architecture.items() >= kept.items()


@pytest.mark.parametrize("target", ["facebook", "transformers", "timm", "safetensors"])
def test_an_encoder_alone_goes_there_and_back(target, tmp_path, capsys):
    whole = saved(build(), tmp_path)
    first = convert(whole, "timm", tmp_path / "first")
    encoder, info = fastmae.load(convert(first, target, tmp_path), return_info=True)
    assert not info.has_decoder
    assert_same(fastmae.load(first), encoder)
    assert "needs a decoder" in refusal(capsys, first, target, tmp_path, "--kind", "pretraining")
    if TARGETS[target].decodes:
        short = convert(whole, target, tmp_path / "flag", "--kind", "encoder")
        assert torch.equal(fastmae.load(short).encode(IMAGES), encoder.encode(IMAGES))


@pytest.mark.parametrize("kind", ["mae", "avg"])
def test_an_exported_program_takes_any_batch_without_ops_of_fastmae(kind, tmp_path):
    model = build(kind, norm_eps=1e-3)
    program = torch.export.load(convert(saved(model, tmp_path), "torch-export", tmp_path))
    assert not [node for node in program.graph.nodes if "fastmae" in str(node.target)]
    expected = model.encode(IMAGES) if kind == "mae" else model(IMAGES)
    for count in (1, 3):
        torch.testing.assert_close(program.module()(IMAGES[:count]), expected[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype", "files"), [("mae", "uint8", 1), ("avg", "float", 2)])
def test_onnx_has_standard_operators_any_batch_and_statistics(kind, dtype, files, tmp_path, monkeypatch):
    """Weights that are too large for one file lie beside it."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = build(kind, norm_eps=1e-3)
    if files == 2:
        monkeypatch.setattr(export, "_LARGEST_MESSAGE", 10_000)
    out = convert(saved(model, tmp_path), "onnx", tmp_path, "--input", dtype)
    assert sorted(path.name for path in tmp_path.glob("onnx*")) == ["onnx.onnx", "onnx.onnx.data"][:files]
    stored = onnx.load(out, load_external_data=False)
    assert {node.domain for node in stored.graph.node} == {""}
    session = onnxruntime.InferenceSession(out)
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"]) == model.architecture["mean"]
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images = pixels if dtype == "uint8" else model.normalized(pixels / 255)
    name, expected = ("tokens", model.encode(pixels)) if kind == "mae" else ("logits", model(pixels))
    for count in (1, 3):
        (found,) = session.run([name], {"images": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:count], rtol=1e-4, atol=1e-4)


def test_programs_that_are_compared_on_given_images(tmp_path, capsys):
    """A folder's own images take the place of the embedded photographs, whatever number of channels the model has."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (40, 48, 2), np.uint8))
    source = saved(build(in_chans=2, mean=[0.5, 0.5]), tmp_path)
    convert(source, "torch-export", tmp_path, "--images", str(folder), "--input", "uint8")
    assert "compared on 2 random images and 2 photographs:" in capsys.readouterr().out
    convert(source, "timm", tmp_path)
    assert "compared on 4 random images and 4 photographs:" in capsys.readouterr().out
    assert "--input uint8: --to timm holds weights, not a program" in refusal(
        capsys, source, "timm", tmp_path, "--input", "uint8"
    )


@pytest.mark.parametrize(
    ("change", "described"),
    [
        ({"encoder_mask_tokens": True, "decoder_depth": 0}, "encoder_mask_tokens True"),
        ({"num_outputs": 7, "norm_pix_loss": False}, "num_outputs 7"),
        ({"loss_on_all_patches": True}, "loss_on_all_patches True"),
        ({"class_token": False}, "class_token False"),
    ],
)
def test_ablated_models_leave_as_encoders(change, described, tmp_path, capsys):
    """Other libraries have the paper's decoder only, so its variants are refused; their encoders are ordinary ones."""
    model = build("ablated", **change)
    source = saved(model, tmp_path)
    assert_same(model, fastmae.load(convert(source, "safetensors", tmp_path)))
    for target in ("facebook", "transformers"):
        assert f"not that of a model with {described}" in refusal(capsys, source, target, tmp_path)
    short = convert(source, "safetensors", tmp_path / "short", "--kind", "encoder")
    assert torch.equal(fastmae.load(short).encode(IMAGES), model.encode(IMAGES))
    if "class_token" in change:
        convert(short, "torch-export", tmp_path)
        for target in ("facebook", "transformers", "timm"):
            assert "holds encoders with a class token" in refusal(capsys, short, target, tmp_path)
        return
    for target in ("facebook", "transformers", "timm"):
        again = fastmae.load(convert(source, target, tmp_path, "--kind", "encoder"))
        assert not again.has_decoder
        assert torch.equal(again.encode(IMAGES), model.encode(IMAGES))


def test_transformers_finds_model_and_statistics_by_itself(tmp_path):
    model = build()
    out = convert(saved(model, tmp_path), "transformers", tmp_path)
    peer = transformers.ViTMAEForPreTraining.from_pretrained(out)
    noise = torch.rand(3, 16)
    torch.testing.assert_close(peer(IMAGES, noise=noise).loss, model(IMAGES, noise=noise).loss)
    assert type(transformers.AutoModel.from_pretrained(out)) is transformers.ViTMAEModel
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert (list(processor.image_mean), processor.size["height"]) == (model.architecture["mean"], 32)
    pixels = processor(torch.full((3, 32, 32), 51, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, :, 0, 0], (0.2 - model.mean) / model.std, rtol=1e-4, atol=1e-4)


def test_timm_takes_the_file_under_the_name_of_its_architecture(tmp_path):
    model = fastmae.create_classifier("vit_tiny_patch16", 5, img_size=64, pool="avg", mean=[0.2, 0.3, 0.4])
    out = convert(saved(model, tmp_path), "timm", tmp_path)
    name, options = "vit_tiny_patch16_224", {"img_size": 64, "num_classes": 5, "global_pool": "avg"}
    assert json.loads((out / "config.json").read_text())["architecture"] == name
    peer = timm.create_model(name, checkpoint_path=out / "model.safetensors", **options).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(peer(images), model.eval()(images), rtol=1e-4, atol=1e-6)
    found = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert found.pretrained_cfg["mean"] == [0.2, 0.3, 0.4]
    assert found.global_pool == "avg"


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"])
def test_models_of_transformers_keep_their_epsilon(name, tmp_path, capsys):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-2}
    if name == "ViTMAEForPreTraining":
        sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        sizes |= {"decoder_intermediate_size": 64}
    kind = getattr(transformers, name)
    peer = kind(kind.config_class(**sizes, **({"num_labels": 4} if "Class" in name else {}))).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "theirs")
    model = fastmae.load(tmp_path / "theirs")
    assert model.architecture["norm_eps"] == 1e-2
    with torch.no_grad():
        if name == "ViTModel":
            ours, theirs = model.encode(IMAGES), peer(IMAGES).last_hidden_state
        elif name == "ViTForImageClassification":
            ours, theirs = model(IMAGES), peer(IMAGES).logits
        else:
            noise = torch.rand(3, 16)
            ours, theirs = model(IMAGES, noise=noise).pred, peer(IMAGES, noise=noise).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for target in ("transformers", "safetensors"):
        assert_same(model, fastmae.load(convert(tmp_path / "theirs", target, tmp_path)))
    for target in ("facebook", "timm"):
        text = refusal(capsys, tmp_path / "theirs", target, tmp_path)
        assert "encoder tokens: largest difference" in text
        assert "nothing was written" in text


def test_a_smaller_epsilon_converts_where_outputs_do_not_show_it(tmp_path, capsys):
    source = saved(build(norm_eps=1e-12), tmp_path)
    assert "norm_eps" not in fastmae.load(convert(source, "facebook", tmp_path)).architecture
    assert "LayerNorm's epsilon of 1e-12 becomes 1e-06" in capsys.readouterr().out


def test_a_classifier_takes_the_epsilon_of_its_weights(tmp_path):
    path = saved(
        MaskedAutoencoderViT(**ENCODER | {"embed_dim": 192, "depth": 12, "num_heads": 3}, norm_eps=1e-3), tmp_path
    )
    assert fastmae.create_classifier("vit_tiny_patch16", 3, checkpoint=path).blocks[0].norm1.eps == 1e-3


@pytest.mark.parametrize(
    ("target", "module"), [("facebook", facebook), ("transformers", to_hugging_face), ("timm", to_timm)]
)
def test_an_export_that_computes_something_else_leaves_nothing(target, module, tmp_path, capsys, monkeypatch):
    source = saved(build(), tmp_path)

    def damaged(model):
        return weights_of(model) | {"blocks.1.mlp.fc1.bias": 1.01 * model.blocks[1].mlp.fc1.bias.detach()}

    monkeypatch.setattr(module, "weights_of", damaged)
    text = refusal(capsys, source, target, tmp_path)
    assert "encoder tokens: largest difference" in text
    assert "tolerance" in text


def test_what_cannot_be_is_refused_by_name(tmp_path, capsys, monkeypatch):
    whole = saved(build(), tmp_path)
    wide = export_weights(build(img_size=(32, 48)), tmp_path / "wide.safetensors")
    grey = export_weights(build(in_chans=1, mean=[0.5]), tmp_path / "grey.safetensors")
    classifier = export_weights(build("cls"), tmp_path / "classifier.safetensors")
    pretraining = "--kind", "pretraining"
    for source, target, flags, expected in (
        (classifier, "transformers", pretraining, "--kind pretraining: .* is a classifier"),
        (whole, "timm", pretraining, "--to timm takes no decoder"),
        (wide, "facebook", (), "takes square images and patches, img_size is 32 x 48"),
        (wide, "transformers", (), "ViTMAEForPreTraining takes square images and patches, image_size is 32 x 48"),
        (grey, "facebook", (), "takes images of 3 channels, these weights 1"),
        (tmp_path / "none.pth", "timm", (), "none.pth: no such file or folder"),
    ):
        assert re.search(expected, refusal(capsys, source, target, tmp_path, *flags)), expected
    assert "source.safetensors exists already" in refusal(capsys, whole, "safetensors", tmp_path, out="source")
    assert main(["convert", whole, str(tmp_path / "a.bin"), "--to", "facebook"]) == 2
    assert "--to facebook writes a .pth file, got" in capsys.readouterr().err
    # What the others refuse, timm and a folder of ViT take.
    convert(wide, "timm", tmp_path / "wide")
    assert fastmae.load(convert(wide, "transformers", tmp_path / "wide", "--kind", "encoder")).img_size == (32, 48)
    for target, library, needed in (
        ("transformers", "transformers", "transformers>="), ("timm", "timm", "timm>="),
        ("onnx", "onnxruntime", "fastmae[onnx]"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, library, None)
        expected = f"--to {target} needs {library}: pip install '{needed}"
        assert expected in refusal(capsys, whole, target, tmp_path)


def test_folders_that_contradict_themselves_are_refused(tmp_path):
    source = saved(build("avg"), tmp_path)
    timm_folder = convert(source, "timm", tmp_path)
    hugging_face = convert(saved(build("cls"), tmp_path), "transformers", tmp_path)
    for folder, name, value, expected in (
        (hugging_face, "image_size", 1 << 40, "does not fit the 16 patches of the position table"),
        (hugging_face, "image_size", "32", "does not fit the 16 patches"),
        (hugging_face, "layer_norm_eps", 0, r"norm_eps: expected a number in \(0, 1\), got 0"),
        (hugging_face, "layer_norm_eps", "small", r"norm_eps: expected a number in \(0, 1\)"),
        (timm_folder, "model_args", {"global_pool": "map"}, "expected global_pool token, or avg .*, got map"),
        (timm_folder, "model_args", [], "expected objects model_args and pretrained_cfg"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=expected):
            fastmae.load(folder)
        (folder / "config.json").write_text(json.dumps(config))
        fastmae.load(folder)


def test_files_of_facebookresearch_say_what_their_decoder_predicts(tmp_path, capsys):
    weights = build().state_dict()
    sizes = {"num_heads": 4, "decoder_num_heads": 2}
    for args, known in ((argparse.Namespace(norm_pix_loss=True, lr=1.0), True), (argparse.Namespace(lr=1.0), None)):
        torch.save({"model": weights, "args": args}, tmp_path / "run.pth")
        assert fastmae.load(tmp_path / "run.pth", return_info=True, **sizes)[1].norm_pix_loss is known
    torch.save({"model": weights, "args": sizes}, tmp_path / "run.pth")
    assert "--norm-pix-loss: " in refusal(capsys, tmp_path / "run.pth", "transformers", tmp_path)
    out = convert(tmp_path / "run.pth", "transformers", tmp_path, "--norm-pix-loss", "True")
    assert fastmae.load(out).norm_pix_loss
    own = fastmae.load(convert(tmp_path / "run.pth", "safetensors", tmp_path), return_info=True)[1]
    assert own.norm_pix_loss is None


def test_the_page_names_the_versions_that_are_tested():
    root = Path(__file__).parents[2]
    pinned = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    names = ("transformers", "timm", "torch", "onnxruntime")
    named = re.findall(rf"({'|'.join(names)}) (\d[\d.]*\d)", (root / "docs" / "interop.md").read_text())
    assert set(named) == {(name, pinned[name].split()[0]) for name in names}
