"""Features of labelled images: which images, what the model sees of them, shares of ranks, classes matched by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import TINY

import fastmae
from fastmae import data
from fastmae.data import errors
from fastmae.data.decode import center_box, resize_crop_into
from fastmae.evaluate import (
    Features,
    choose_labelled,
    evaluating,
    hold_out,
    join_ranks,
    judge,
    labelled,
    match_classes,
    pooled_features,
    probe,
)
from fastmae.model import MaskedAutoencoderViT, create_model
from fastmae.model.classifier import VisionTransformer

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def write_classes(folder, per_class=10, colors=COLORS):
    """A folder per class, of noisy images of one colour each."""
    generator = np.random.default_rng(0)
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.array(color) + generator.integers(-30, 30, (20 + i, 30, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def opened(path, tmp_path, **options):
    return data.open_dataset(path, cache_dir=tmp_path / "cache", **options)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    return opened(write_classes(root / "images"), root)


def tiny(img_size=(16, 24)):
    return MaskedAutoencoderViT(img_size, 8, seed=0, **TINY).train()


def test_features_are_those_of_the_central_crops_in_the_order_asked_for(dataset):
    model, ids = tiny(), np.array([7, 3, 29, 0, 12])
    found = pooled_features(model, dataset, ids, batch_size=2)
    images = torch.empty(5, 16, 24, 3, dtype=torch.uint8)
    for out, i in zip(images.numpy(), ids, strict=True):
        pixels = dataset.decode(int(i))
        resize_crop_into(out, pixels, center_box(*pixels.shape[:2], (16, 24)))
    with torch.no_grad():
        tokens = model.encode(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(found.class_token, tokens[:, 0])
    torch.testing.assert_close(found.pooled, tokens[:, 1:].mean(1))
    assert found.readable.all()


def test_an_encoder_without_a_class_token_has_the_mean_of_all_tokens(dataset, tmp_path):
    model, ids = (
        create_model("mae_vit_tiny_patch16", img_size=(16, 24), patch_size=8, seed=0, class_token=False, **TINY),
        np.arange(30),
    )
    found = pooled_features(model, dataset, ids)
    assert found.class_token.shape == (30, 0)
    np.testing.assert_array_equal(fastmae.extract_features(model, dataset.root, crop_ratio=1).features, found.pooled)
    with pytest.raises(ValueError, match="pool: expected avg, since the encoder has no class token"):
        fastmae.extract_features(model, dataset.root, pool="cls")
    labels = np.repeat(np.arange(3), 10)
    assert judge(found, labels, found, labels).keys() == {"knn_top1", "linear_top1"}


def test_public_features_are_those_that_a_head_takes_with_ids_and_paths(dataset, tmp_path):
    model = tiny()
    found = fastmae.extract_features(model, dataset, crop_ratio=1)
    np.testing.assert_array_equal(found.features, pooled_features(model, dataset, np.arange(30)).pooled)
    assert [found.ids.tolist(), found.paths[:1]] == [list(range(30)), [f"{dataset.root}/blue/0.png"]]
    cls = fastmae.extract_features(model, dataset, pool="cls", crop_ratio=1, rank=1, world_size=2)
    np.testing.assert_allclose(
        cls.features, pooled_features(model, dataset, np.arange(1, 30, 2)).class_token, atol=1e-6
    )
    assert cls.ids.tolist() == list(range(1, 30, 2))
    pixels = torch.from_numpy(np.ascontiguousarray(dataset.decode(0)[:16, :24]))
    for pool in ("cls", "avg"):
        classifier = VisionTransformer(3, (16, 24), 8, embed_dim=16, depth=1, num_heads=2, pool=pool, seed=0).eval()
        norm = classifier.norm if pool == "cls" else classifier.fc_norm
        torch.nn.init.constant_(norm.bias, 0.5)
        with torch.no_grad():
            expected = classifier.forward_features(pixels.permute(2, 0, 1)[None])
        found = fastmae.extract_features(classifier, [pixels.numpy()], crop_ratio=1)
        torch.testing.assert_close(torch.from_numpy(found.features), expected)
    with pytest.raises(ValueError, match='pool: expected "cls" or "avg", got \'max\''):
        fastmae.extract_features(model, dataset, pool="max")


def test_ranks_run_as_many_forwards_of_one_shape_and_their_features_together_are_those_of_one(dataset):
    model, ids, shapes = tiny(), np.arange(0, 30, 6), []
    alone = pooled_features(model, dataset, ids)
    encode = model.encode
    model.encode = lambda images: shapes.append(tuple(images.shape)) or encode(images)
    for world_size, forwards in ((2, 4), (3, 3), (7, 7)):
        options = {"world_size": world_size, "batch_size": 2}
        parts = [pooled_features(model, dataset, ids, rank=rank, **options) for rank in range(world_size)]
        for joined, expected in zip(join_ranks(parts), alone, strict=True):
            torch.testing.assert_close(joined, expected)
        assert shapes == [shapes[0]] * forwards
        shapes.clear()


def test_floats_in_a_range_and_bfloat16_give_nearly_the_features_of_bytes(dataset, tmp_path):
    model, ids = tiny(), np.arange(6)
    exact = pooled_features(model, dataset, ids)
    ranged = opened(dataset.root, tmp_path, value_range=(0, 1))
    assert ranged.decode(0).dtype == np.float32
    found = pooled_features(model, ranged, ids)
    torch.testing.assert_close(found.pooled, exact.pooled, rtol=0, atol=0.02)  # the bytes are rounded by resizing
    found = pooled_features(model, dataset, ids, dtype=torch.bfloat16)
    assert found.pooled.dtype == torch.float32
    assert not torch.equal(found.pooled, exact.pooled)
    torch.testing.assert_close(found.pooled, exact.pooled, rtol=0, atol=0.05)


def test_images_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", ())
    dataset = opened(write_classes(tmp_path / "images"), tmp_path)
    path = tmp_path / "images" / "green" / "3.png"
    path.write_bytes(path.read_bytes()[:60] + bytes(40))
    (tmp_path / "images" / "red" / "9.png").unlink()
    ids = np.arange(30)
    found = pooled_features(tiny(), dataset, ids, batch_size=8)
    lost = [dataset.path(i).rsplit("/", 2)[1:] for i in np.flatnonzero(~found.readable.numpy())]
    assert lost == [["green", "3.png"], ["red", "9.png"]]
    labels = dataset.labels(ids)
    numbers = judge(found, labels, found, labels)
    assert numbers["knn_top1"] == 1.0
    assert numbers["unreadable"] == 4


def test_a_model_in_training_is_left_as_it_was(dataset):
    model = tiny()
    model.set_input_size((32, 48))
    state = torch.get_rng_state()
    pooled_features(model, dataset, np.arange(3))
    assert model.training
    assert model.blocks[0].training
    assert model.input_size == (32, 48)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    with evaluating(model):
        assert model.input_size == (16, 24)
        assert not model.training
    with pytest.raises(ValueError), evaluating(model):
        model.encode(torch.zeros(1, 3, 8, 8))
    assert model.training
    assert model.input_size == (32, 48)


def test_nothing_is_compiled_for_looking_and_what_was_compiled_is_used_afterwards(dataset):
    graphs, runs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: runs.append(1) or graph.forward(*inputs)

    model = tiny()
    block = model.blocks[0]
    block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
    images = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    model.encode(images)
    before = len(graphs), len(runs)
    pooled_features(model, dataset, np.arange(3))
    assert (len(graphs), len(runs)) == before
    model.encode(images)
    assert (len(graphs), len(runs)) == (before[0], 2 * before[1])
    assert before[1] > 0


def test_chosen_images_are_spread_over_the_classes_and_always_the_same(dataset):
    some = choose_labelled(dataset, 12)
    assert np.bincount(some.labels).tolist() == [4, 4, 4]
    assert np.array_equal(some.labels, dataset.labels(some.sample_ids))
    assert len(set(some.sample_ids.tolist())) == 12
    assert np.array_equal(choose_labelled(dataset, 12).sample_ids, some.sample_ids)
    assert np.array_equal(choose_labelled(dataset, 1000).sample_ids, np.arange(30))
    known, tests = hold_out(choose_labelled(dataset, 1000))
    assert (len(known.labels), len(tests.labels)) == (27, 3)
    assert not set(known.sample_ids) & set(tests.sample_ids)


def test_of_a_large_data_set_some_labels_are_looked_up(dataset, monkeypatch):
    monkeypatch.setattr(labelled, "_LOOKED_AT", 5)
    some = choose_labelled(dataset, 5)
    assert len(set(some.sample_ids.tolist())) == 5
    assert np.bincount(some.labels).min() >= 1


def test_images_without_label_and_bad_ones_are_not_chosen(dataset, tmp_path):
    folder = write_classes(tmp_path / "images")
    (folder / "red" / "0.png").rename(folder / "loose.png")
    (folder / "red" / "1.png").write_bytes(b"")
    some = choose_labelled(opened(folder, tmp_path, max_bad_fraction=0.1), 100)
    assert np.bincount(some.labels).tolist() == [10, 10, 8]
    with pytest.raises(ValueError, match="images of photographs have no labels; expected a folder per class"):
        choose_labelled(data.open_dataset(None), 10)
    with pytest.raises(ValueError, match="expected at least 10 labelled images to hold some out, got 9"):
        hold_out(choose_labelled(dataset, 9))


def test_classes_of_another_data_set_are_matched_by_name(dataset, tmp_path, caplog):
    known = choose_labelled(dataset, 100)
    others = {"yellow": (200, 200, 40), "red": (200, 40, 40), "blue": (40, 40, 200)}
    tests = choose_labelled(opened(write_classes(tmp_path / "tests", 2, others), tmp_path), 100)
    matched = match_classes(known, tests)
    assert "tests: images of classes that images lacks are left out: yellow in 2 of 6 images" in caplog.text
    names = [matched.dataset.path(int(i)).rsplit("/", 2)[1] for i in matched.sample_ids]
    assert names == ["blue", "blue", "red", "red"]
    assert [dataset.classes[label] for label in matched.labels] == names
    strange = opened(write_classes(tmp_path / "strange", 1, {"cat": (0, 0, 0), "dog": (9, 9, 9)}), tmp_path)
    with pytest.raises(ValueError, match=r"classes of images \(blue, green, red\) in strange, got cat, dog"):
        match_classes(known, choose_labelled(strange, 100))


def test_numbers_of_classes_are_matched_where_there_are_no_names(dataset, tmp_path):
    sets = []
    for name, labels in (("one", (3, 5, 3)), ("two", (5, 8, 3))):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"{dataset.root}/red/{i}.png\t{label}\n" for i, label in enumerate(labels)))
        sets.append(choose_labelled(opened(path, tmp_path), 10))
    assert match_classes(*sets).labels.tolist() == [5, 3]
    with pytest.raises(ValueError, match="images has names of classes and two only numbers"):
        match_classes(choose_labelled(dataset, 100), sets[1])


def features_of(values):
    return Features(values, values.flip(1), torch.ones(len(values), dtype=torch.bool))


def test_judging_takes_any_numbers_of_classes_and_counts_unknown_ones_as_missed():
    labels = np.array([3, 70, 900] * 20)
    points = torch.eye(3).repeat(20, 1) + 0.01 * torch.randn(60, 3)
    found = judge(features_of(points), labels, features_of(torch.eye(3)), np.array([3, 70, 900]))
    assert found == dict.fromkeys(("knn_top1", "linear_top1", "knn_top1_class_token", "linear_top1_class_token"), 1.0)
    missed = judge(features_of(points), labels, features_of(torch.eye(3)), np.array([3, 70, 5]))
    assert missed["knn_top1"] == missed["linear_top1"] == pytest.approx(2 / 3)
    seven = judge(features_of(points), np.arange(60) % 7, features_of(points), np.arange(60) % 7)
    assert seven["knn_top1"] < seven["knn_top5"] <= 1


def test_probing_recognises_colours_and_not_shuffled_labels(dataset):
    known, tests = hold_out(choose_labelled(dataset, 100))
    found = probe(tiny(), known, tests, batch_size=8)
    assert found["knn_top1"] == found["linear_top1"] == 1.0
    everything = choose_labelled(dataset, 100)
    shuffled = everything._replace(labels=np.random.default_rng(1).permutation(everything.labels))
    known, tests = shuffled.take(np.arange(30) % 2 == 0), shuffled.take(np.arange(30) % 2 == 1)
    found = probe(tiny(), known, tests)
    assert max(found["knn_top1"], found["linear_top1"]) < 0.7


def test_what_cannot_be_judged_or_does_not_fit_is_refused(dataset):
    points, labels = features_of(torch.randn(6, 3)), np.array([0, 1] * 3)
    with pytest.raises(ValueError, match="expected images of at least two classes to learn from, got only class 4"):
        judge(points, np.full(6, 4), points, labels)
    with pytest.raises(ValueError, match="finite"):
        judge(features_of(torch.full((6, 3), torch.nan)), labels, points, labels)
    with pytest.raises(ValueError, match="none of the 6 images to test on could be read"):
        judge(points, labels, points._replace(readable=torch.zeros(6, dtype=torch.bool)), labels)
    with pytest.raises(ValueError, match="expected a label for each of 6 images to learn from, got 5"):
        judge(points, labels[:5], points, labels)
    with pytest.raises(ValueError, match="dataset: expected images of 1 channels, got 3"):
        pooled_features(MaskedAutoencoderViT(16, 8, 1, seed=0, **TINY), dataset, np.arange(3))
    with pytest.raises(ValueError, match="sample_ids and batch_size: expected at least 1, got 0 and 64"):
        pooled_features(tiny(), dataset, np.arange(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_features_and_numbers_agree_with_the_cpus(dataset, dtype):
    known, tests = hold_out(choose_labelled(dataset, 100))
    model = tiny()
    expected = pooled_features(model, dataset, known.sample_ids)
    model = model.to("cuda")
    found = pooled_features(model, dataset, known.sample_ids, dtype=dtype)
    assert found.pooled.is_cuda
    assert found.readable.is_cuda
    torch.testing.assert_close(found.pooled.cpu(), expected.pooled, rtol=0, atol=0.05)
    assert probe(model, known, tests, dtype=dtype)["linear_top1"] == 1.0
