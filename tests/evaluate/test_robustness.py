"""``fastmae evaluate robustness``: subsets of classes, corruptions relative to a reference, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import mistake
from PIL import Image

from fastmae.cli import main
from fastmae.cli.commands import RobustnessConfig
from fastmae.cli.evaluate import class_names
from fastmae.evaluate.linear import fit_linear
from fastmae.evaluate.robustness import mean_corruption_error
from fastmae.loading import load
from fastmae.model.classifier import VisionTransformer

COLOURS = {
    "blue": (40, 40, 200), "cyan": (40, 200, 200), "green": (40, 200, 40), "grey": (120, 120, 120),
    "pink": (200, 120, 160), "red": (200, 40, 40),
}  # fmt: skip


def write(folder, names, noise=30, count=4):
    """Images of a colour per class; returns them, in the order of their paths, and the colours' numbers."""
    generator, images, labels = np.random.default_rng(noise), [], []
    for name in sorted(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(COLOURS[name]) + generator.integers(-noise, noise + 1, (16, 16, 3))
            images.append(pixels.clip(0, 255).astype(np.uint8))
            labels.append(list(COLOURS).index(name))
            Image.fromarray(images[-1]).save(folder / name / f"{number}.png")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), np.array(labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A classifier of six colours as facebookresearch's file, and folders of images."""
    root = tmp_path_factory.mktemp("robustness")
    model = VisionTransformer(6, 16, 8, embed_dim=32, depth=1, num_heads=2, pool="avg", seed=0).eval()
    images, labels = write(root / "train", COLOURS, noise=60)
    with torch.no_grad():
        found = fit_linear(model.forward_features(images), torch.from_numpy(labels), l2=0.1)
        model.head.weight.copy_(found.weight / found.std)
        model.head.bias.copy_(found.bias - model.head.weight @ found.mean)
    torch.save({"model": model.state_dict(), "args": {"num_heads": 2}}, root / "classifier.pth")
    root.joinpath("names.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    return root


def logits_of(root, images):
    with torch.no_grad():
        return load(root / "classifier.pth")(images).numpy()


def test_a_subset_is_judged_among_its_own_classes_and_among_all(root, tmp_path):
    weights = root / "classifier.pth"
    some = write(tmp_path / "some", ["cyan", "grey", "pink"], noise=255)
    every = write(tmp_path / "every", COLOURS, noise=100)
    flags = ["--images", tmp_path / "some", tmp_path / "every", "--crop-ratio", 1, "--out", tmp_path / "found.json"]
    flags += ["--device", "cpu"]  # logits are compared
    assert main([str(f) for f in ["evaluate", "robustness", weights, *flags, "--classes", root / "names.txt"]]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["sets"]
    for name, (images, labels) in (("some", some), ("every", every)):
        logits, got = logits_of(root, images), found[str(tmp_path / name)]
        outside = [number for number in range(6) if number not in labels]
        expected = (logits.argmax(1) == labels).mean()
        logits[:, outside] = -np.inf
        among = (logits.argmax(1) == labels).mean()
        assert (got["top1_all_classes"], got["top1"]) == (expected, among)
        assert ("top5" in got) == (name == "every")
    assert found[str(tmp_path / "every")]["top5"] >= found[str(tmp_path / "every")]["top1"] == among
    some = found[str(tmp_path / "some")]
    assert some["top1"] > some["top1_all_classes"]  # so that the difference is tested


def test_a_fine_tuned_run_knows_its_classes(root, tmp_path):
    info = load(root / "classifier.pth", return_info=True)[1]
    run = RobustnessConfig(tmp_path / "run", images=(root / "train",))
    run.weights.mkdir()
    with pytest.raises(ValueError, match="--classes: expected a file of names or the training folder"):
        class_names(run, info)
    trained = replace(info, config={"data": {"path": str(root / "train")}})
    assert class_names(run, trained) == list(COLOURS)
    (run.weights / "summary.json").write_text('{"classes": ["one", "two"]}')
    assert class_names(run, trained) == ["one", "two"]
    assert class_names(replace(run, classes=root / "names.txt"), trained) == list(COLOURS)


def test_corruption_errors_are_means_over_severities_relative_to_the_reference(root, tmp_path, capsys):
    errors = {"noise": [], "haze": []}
    for name, levels in (("noise", (40, 120)), ("haze", (90,))):
        for severity, level in enumerate(levels, 1):
            images, labels = write(tmp_path / "c" / name / str(severity), COLOURS, noise=level)
            errors[name].append((logits_of(root, images).argmax(1) != labels).mean())
    (tmp_path / "reference.json").write_text(json.dumps({"noise": 0.5, "haze": 0.25, "snow": 0.3}))
    flags = ["--corruptions", tmp_path / "c", "--reference", tmp_path / "reference.json", "--out", tmp_path / "o.json"]
    command = ["evaluate", "robustness", root / "classifier.pth", *flags, "--classes", root / "train"]
    assert main([str(word) for word in command]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    means = {name: np.mean(values) for name, values in errors.items()}
    assert found["corruptions"] == pytest.approx(means)
    assert found["mean_error"] == pytest.approx(np.mean(list(means.values())))
    expected = (means["noise"] / 0.5 + means["haze"] / 0.25) / 2
    assert expected > 0
    assert found["mean_corruption_error"] == pytest.approx(expected)
    assert "of the reference" in capsys.readouterr().out
    assert mean_corruption_error({"a": 0.2, "b": 0.6}, {"a": 0.4, "b": 0.6}) == pytest.approx(0.75)


def test_mistakes_are_named(root, tmp_path, capsys):
    command = ["evaluate", "robustness", root / "classifier.pth"]
    named = ["--classes", root / "names.txt"]
    train = ["--images", root / "train"]
    assert "--images: expected folders of images, or --corruptions" in mistake(capsys, *command)
    assert "--classes: expected a file of names or the training folder" in mistake(capsys, *command, *train)
    (tmp_path / "two.txt").write_text("red\nblue\n")
    assert "expected 6 names, one per output, got 2" in mistake(
        capsys, *command, *train, "--classes", tmp_path / "two.txt"
    )
    write(tmp_path / "s", ["red"])
    (tmp_path / "s" / "red").rename(tmp_path / "s" / "crimson")
    error = mistake(capsys, *command, *named, "--images", tmp_path / "s")
    assert "expected classes that the classifier has (blue, cyan, green, ...), got crimson" in error
    corruptions = ["--corruptions", tmp_path]
    assert "expected folders corruption/severity/class/image" in mistake(capsys, *command, *named, *corruptions)
    write(tmp_path / "c" / "noise" / "1", ["red"])
    corruptions = ["--corruptions", tmp_path / "c"]
    (tmp_path / "r.json").write_text('{"noise": 40}')
    error = mistake(capsys, *command, *named, *corruptions, "--reference", tmp_path / "r.json")
    assert "expected an error of noise in (0, 1], got 40.0" in error
    assert "--reference: expected --corruptions" in mistake(
        capsys, *command, *train, "--reference", tmp_path / "r.json"
    )
    classifier = load(root / "classifier.pth").state_dict()
    encoder = {name.replace("fc_norm", "norm"): tensor for name, tensor in classifier.items() if "head" not in name}
    torch.save({"model": encoder, "args": {"num_heads": 2}}, tmp_path / "encoder.pth")
    command[2] = tmp_path / "encoder.pth"
    assert "expected a classifier, got" in mistake(capsys, *command, *train, *named)
