"""Weights of other runs and libraries: read without executing anything, fitted exactly or refused by name."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import Malicious
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from training import FLAGS, MODEL, write_images

from fastmae.cli import main
from fastmae.interop.hugging_face_weights import read_hugging_face
from fastmae.loading import read_weights
from fastmae.model import create_model
from fastmae.train import parallel
from fastmae.train.checkpoint import CheckpointError
from fastmae.train.config import PretrainConfig, TrainConfig
from fastmae.train.weights import export_weights, initialize

ARGUMENTS = PretrainConfig(model=MODEL).model_arguments()


def build(seed: int = 1, **changes) -> torch.nn.Module:
    """A model in which every tensor, norms and biases too, tells the seed."""
    model = create_model(**ARGUMENTS | changes | {"seed": seed})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def load_into(model: torch.nn.Module, path: Path) -> str:
    weights, info = read_weights(path)
    return initialize(model, weights, info.known)


def encoder(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("decoder_") and n != "mask_token"}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("legacy", [False, True])
def test_pth_files_of_weights_and_of_training(tmp_path, legacy):
    source, path = build(1), tmp_path / "w.pth"
    weights = source.state_dict()
    for content in (weights, {"model": weights, "epoch": 7, "args": argparse.Namespace(lr=1.0)}):
        model = build(2)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert load_into(model, path) == "encoder and decoder"
        assert_equal(model.state_dict(), weights)


def test_nothing_in_a_file_is_executed(tmp_path):
    proof = tmp_path / "executed"
    torch.save({"model": build().state_dict(), "args": Malicious(proof)}, tmp_path / "w.pth")
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Malicious(proof)))
    for name in ("w.pth", "w.bin"):
        with pytest.raises(CheckpointError, match=f"{name}: not read"):
            read_weights(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae"}')
    torch.save({"model": Malicious(proof)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not read, .*: Unsupported global: GLOBAL io\.open"):
        read_hugging_face(tmp_path)
    assert not proof.exists()


def test_an_encoder_alone_leaves_the_decoder_as_it_was_drawn(tmp_path):
    source, model = build(1), build(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(encoder(source), tmp_path / "w.safetensors")
    assert "no decoder, which is drawn anew" in load_into(model, tmp_path / "w.safetensors")
    assert_equal(model.state_dict(), before | encoder(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_embed_dim": 32}, r"mask_token: the weights' has shape \(1, 1, 32\), this model's \(1, 1, 16\)"),
        ({"img_size": (32, 32)}, r"pos_embed: .*\(1, 17, 32\).*\(1, 25, 32\); positions are not interpolated"),
        ({"depth": 1}, r"blocks\.1\.norm1\.weight: missing"),
        ({"depth": 3}, r"blocks\.2\.attn\.proj\.bias: among the weights, but not a tensor of this model"),
        ({"num_heads": 4}, "num_heads: the weights are of a model with 4, this one has 2"),
        ({"decoder_num_heads": 4}, "decoder_num_heads: the weights are of a model with 4"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(changes, message):
    source, model, before = build(1, **changes), build(2), build(2).state_dict()
    with pytest.raises(CheckpointError, match=message):
        initialize(model, source.state_dict(), source.architecture)
    assert_equal(model.state_dict(), before)


def test_half_a_decoder_and_damaged_numbers_are_refused():
    whole = build(1).state_dict()
    with pytest.raises(CheckpointError, match=r"decoder_pred\.bias: missing"):
        initialize(build(2), {n: t for n, t in whole.items() if n != "decoder_pred.bias"}, {})
    with pytest.raises(CheckpointError, match=r"norm\.bias: has values that are not finite"):
        initialize(build(2), whole | {"norm.bias": whole["norm.bias"] * float("nan")}, {})


def test_another_target_of_the_decoder_or_epsilon_is_reported(tmp_path):
    path = export_weights(build(1), tmp_path / "w.safetensors")
    reported = load_into(build(2, norm_pix_loss=True), path)
    assert "trained for plain pixels and goes on with normalised pixels" in reported
    path = export_weights(build(1, norm_eps=1e-12), tmp_path / "w.safetensors")
    expected = "encoder and decoder; LayerNorm's epsilon was 1e-12 there and is 1e-06 here"
    assert load_into(build(2), path) == expected


def test_a_source_without_weights_is_named(tmp_path):
    for name in ("notes.txt", "w.safetensors", "w.pth"):
        (tmp_path / name).write_text("words")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("none", "none.pth", "notes.txt", "w.safetensors", "w.pth", "list.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_weights(tmp_path / name)


def test_a_folder_of_hugging_face_gives_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, layer_norm_eps=1e-6,
    )  # fmt: skip
    from fastmae import accelerate
    from fastmae.interop import decelerate

    torch.manual_seed(0)
    theirs = decelerate(accelerate(transformers.ViTMAEForPreTraining(config), init=True)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = theirs(images, noise=noise)
    sizes = {"img_size": 32, "decoder_depth": 2}
    for shards, options in (("whole", {}), ("shards", {"max_shard_size": "20KB"})):
        theirs.save_pretrained(tmp_path / shards, **options)
        model = build(3, **sizes)
        assert load_into(model, tmp_path / shards) == "encoder and decoder"
        ours = model(images, noise=noise)
        torch.testing.assert_close(ours.pred, expected.logits, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "whole" / "pytorch_model.bin")
    assert_equal(read_hugging_face(tmp_path / "whole")[0], read_hugging_face(tmp_path / "shards")[0])
    theirs.vit.save_pretrained(tmp_path / "encoder")
    assert "no decoder" in load_into(build(3, **sizes), tmp_path / "encoder")


def test_a_folder_of_another_library_or_with_unset_positions_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="expected model_type vit_mae or vit, got clip"):
        read_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    with pytest.raises(ValueError, match="expected one of model"):
        read_hugging_face(tmp_path)
    save_file({"vit.embeddings.position_embeddings": torch.zeros(1, 5, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pos_embed is all zeros"):
        read_hugging_face(tmp_path)


def shard_and_load(rank: int, path: Path) -> dict[str, torch.Tensor]:
    """The whole weights of a model that was made on the meta device, sharded, drawn and then given a file's encoder."""
    parallelism = parallel.initialize("fsdp")
    model = parallel.construct(lambda: create_model(**ARGUMENTS), parallelism)
    parallel.parallelize(model, parallelism, TrainConfig(seed=2, precision="fp32"))
    assert "no decoder" in load_into(model, path)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}


def test_sharded_models_start_from_the_same_weights(tmp_path):
    source = build(1)
    save_file(encoder(source), tmp_path / "w.safetensors")
    whole = create_model(**ARGUMENTS | {"seed": 2}).state_dict() | encoder(source)
    for weights in run_ranks(shard_and_load, 2, tmp_path / "w.safetensors"):
        assert_equal(weights, whole)


def test_a_run_starts_from_weights_and_a_resumed_one_does_not_read_them_again(tmp_path, capsys):
    """The rate is too small to change a weight, so the first run's end shows what it started from."""
    images, path = write_images(tmp_path / "images"), tmp_path / "w.safetensors"
    source = build(5)
    export_weights(source, path)
    command = ["pretrain", "--data.path", str(images), *FLAGS.split(), "--train.steps", "2", "--out"]
    assert main([*command, str(tmp_path / "one"), "--train.init-from", str(path), "--train.base-lr", "1.6e-29"]) == 0
    printed = capsys.readouterr().out
    assert f"Weights from {path}: encoder and decoder" in printed
    assert "Recipe photographs, version " in printed
    assert "learning rate 1.6e-29 x 8 / 256 = 5e-31 after 0 steps of warm-up, then a cosine to 0" in printed
    for weights in (load_file(tmp_path / "one" / "model.safetensors"), read_weights(tmp_path / "one")[0]):
        assert_equal(weights, source.state_dict())
    assert json.loads((tmp_path / "one" / "config.json").read_text())["train"]["init_from"] == str(path)

    path.unlink()
    resume = ["pretrain", "--out", str(tmp_path / "one"), "--resume", "--train.steps", "3"]
    assert main(resume) == 0
    assert "Weights from" not in capsys.readouterr().out
    assert main([*resume, "--train.init-from", str(tmp_path / "other.pth")]) == 2
    assert "--train.init-from: a resumed run needs the value it started with" in capsys.readouterr().err

    assert main([*command, str(tmp_path / "two"), "--train.init-from", str(path)]) == 2
    assert f"--train.init-from {path}: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    assert main(["pretrain", "--recipe", "adapt-vit-b", "--out", str(tmp_path / "two")]) == 2
    assert "--train.init-from: expected weights to continue from with adapt-vit-b, got none" in capsys.readouterr().err
