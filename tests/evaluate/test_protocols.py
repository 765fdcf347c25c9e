"""Protocols on a frozen encoder: settings are chosen without the test images, schedules are the paper's."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastmae.evaluate import knn
from fastmae.evaluate.attentive import AttentivePool, evaluate_attentive, fit_attentive
from fastmae.evaluate.frozen import Split, accuracies, split_of
from fastmae.evaluate.knn import evaluate_knn
from fastmae.evaluate.linear import create_head, evaluate_logistic, fit_linear_probe, learning_rate


def clusters(n: int, m: int, *, noise: float = 0.3, classes: int = 6, dim: int = 16, seed: int = 0) -> Split:
    """Gaussian classes around random centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n + m) % classes
    features = centres[labels] + noise * torch.randn(n + m, dim, generator=generator)
    return Split(features[:n], labels[:n], features[n:], labels[n:], classes)


def test_the_held_out_images_are_a_tenth_of_each_class_and_none_of_the_tests():
    split = clusters(120, 30)
    inner = split.held_out(seed=1)
    assert inner.test_labels.bincount().tolist() == [2] * 6
    assert inner.labels.bincount().tolist() == [18] * 6
    rows = {tuple(row) for row in split.inputs.tolist()}
    parts = [{tuple(row) for row in part.tolist()} for part in (inner.inputs, inner.tests)]
    assert parts[0] | parts[1] == rows
    assert not parts[0] & parts[1]
    assert not torch.equal(split.held_out(seed=2).tests, inner.tests)
    with pytest.raises(ValueError, match="expected a class of at least two images"):
        Split(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2), 2).held_out(0)
    lonely = Split(torch.eye(3), torch.tensor([0, 0, 1]), torch.eye(3), torch.tensor([0, 0, 1]), 2).held_out(0)
    assert sorted(lonely.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("evaluate", [evaluate_knn, evaluate_logistic])
def test_separable_classes_are_found_and_shuffled_labels_are_not(evaluate):
    found = evaluate(clusters(300, 120))
    assert found["top1"] > 0.95
    assert found["top5"] >= found["top1"]
    split = clusters(300, 120)
    shuffled = split._replace(labels=split.labels[torch.randperm(300, generator=torch.Generator().manual_seed(1))])
    assert evaluate(shuffled)["top1"] < 0.4


def test_settings_do_not_depend_on_the_test_images():
    split = clusters(300, 60, noise=1.5)
    other = split._replace(tests=torch.randn(60, 16), test_labels=torch.zeros(60, dtype=torch.int64))
    for evaluate, names in ((evaluate_knn, ("k", "temperature")), (evaluate_logistic, ("l2",))):
        one, two = evaluate(split), evaluate(other)
        assert [one[name] for name in names] == [two[name] for name in names]
    assert evaluate_knn(split, k=3, temperature=0.1).items() >= {"k": 3, "temperature": 0.1}.items()


def test_images_are_compared_once_for_all_settings(monkeypatch):
    compared, nearest, split = [], knn._nearest, clusters(300, 60, noise=1.5)
    monkeypatch.setattr(knn, "_nearest", lambda *arguments: compared.append(1) or nearest(*arguments))
    found = evaluate_knn(split)
    assert len(compared) == 2  # held-out images, then those to test on
    scores = knn.knn_scores(split.inputs, split.labels, split.tests, k=found["k"], temperature=found["temperature"])
    assert found["top1"] == accuracies(scores, split)["top1"]
    with pytest.raises(ValueError, match="k and temperature: expected positive numbers, got -1 and 0"):
        evaluate_knn(split, k=-1, temperature=0.1)


def test_features_are_not_copied_where_all_images_could_be_read():
    features, labels, good = torch.randn(20, 3), np.arange(20) % 2, torch.ones(20, dtype=torch.bool)
    split = split_of(features, labels, good, features, labels, good)
    assert split.inputs.data_ptr() == features.data_ptr()
    bad = good.clone()
    bad[3] = False
    assert torch.equal(split_of(features, labels, bad, features, labels, good).inputs, features[bad])


def test_a_class_that_was_never_learned_counts_as_wrong():
    split = clusters(60, 12)
    unknown = split._replace(test_labels=torch.full((12,), -1))
    assert evaluate_knn(unknown)["top1"] == 0
    assert "top5" not in accuracies(
        torch.eye(3), Split(torch.eye(3), torch.arange(3), *[torch.eye(3), torch.arange(3)], 3)
    )


def test_attention_finds_what_the_mean_of_the_tokens_hides():
    # The class is in one token, at a random place; its direction in all others is noise of the same size.
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (600,), generator=generator)
    tokens = torch.randn(600, 9, 32, generator=generator)
    place = torch.randint(0, 9, (600,), generator=generator)
    tokens[torch.arange(600), place] = 3 * torch.eye(32)[labels]
    tokens[torch.arange(600), place, 31] = 12.0  # what says where to look
    split = Split(tokens[:400], labels[:400], tokens[400:], labels[400:], 4)
    mean = split._replace(inputs=split.inputs.mean(1), tests=split.tests.mean(1))
    attentive = evaluate_attentive(split, lr=1e-2, epochs=20, num_queries=4)
    assert attentive["top1"] > evaluate_logistic(mean)["top1"] + 0.1
    again = evaluate_attentive(split, lr=1e-2, epochs=20, num_queries=4)
    assert again == attentive


def test_attentive_pool_equals_its_definition_and_refuses_odd_queries():
    torch.manual_seed(0)
    pool, tokens = AttentivePool(8, 3, num_queries=2), torch.randn(5, 7, 8)
    pool.norm = nn.Identity()
    values = pool.values(tokens)
    slices = []
    for query, part in zip(pool.queries, values.split(4, dim=-1), strict=True):
        weights = (tokens @ query / math.sqrt(8)).softmax(1)
        slices.append((weights[..., None] * part).sum(1))
    torch.testing.assert_close(pool(tokens), pool.head(torch.cat(slices, 1)))
    with pytest.raises(ValueError, match="num_queries: expected a divisor of the width 8, got 3"):
        AttentivePool(8, 3, num_queries=3)
    trained = fit_attentive(tokens.half(), torch.arange(5) % 3, 3, lr=0.1, epochs=2, num_queries=2)
    assert not trained.training


def test_the_linear_probe_has_the_schedule_and_optimiser_of_table_10():
    rate = [learning_rate(e, epochs=90, warmup_epochs=10, base_lr=0.1, batch_size=16_384) for e in (0, 5, 10, 50, 90)]
    assert rate == pytest.approx([0, 3.2, 6.4, 3.2, 0])  # 0.1 x 16,384 / 256 = 6.4
    norm, linear = create_head(64, 10)
    assert not list(norm.parameters())
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("optimizer", "batch"), [("lars", 16_384), ("sgd", 4_096)])
def test_every_update_of_the_linear_probe_is_that_of_table_10(optimizer, batch, monkeypatch):
    optim = pytest.importorskip("timm.optim") if optimizer == "lars" else torch.optim
    name, rates, decay = "Lars" if optimizer == "lars" else "SGD", [], []

    class Recorded(getattr(optim, name)):
        def step(self, closure=None):
            group = self.param_groups[0]
            rates.append(group["lr"])
            decay.append((group["momentum"], group["weight_decay"]))
            return super().step(closure)

    monkeypatch.setattr(optim, name, Recorded)
    part = torch.randn(batch // 4, 4), torch.arange(batch // 4) % 3
    images = 2 * batch  # two updates per pass, of four parts each
    fit_linear_probe(
        iter([part] * 100),
        4,
        3,
        images=images,
        device=torch.device("cpu"),
        optimizer=optimizer,
        epochs=4,
        warmup_epochs=1,
    )
    schedule = {"epochs": 4, "warmup_epochs": 1, "base_lr": 0.1, "batch_size": batch}
    assert rates == pytest.approx([learning_rate(number / 2, **schedule) for number in range(1, 9)])
    assert max(rates) == pytest.approx(0.1 * batch / 256)
    assert set(decay) == {(0.9, 0.0)}


def test_lars_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ValueError, match=r"--solver lars needs timm: pip install 'fastmae\[eval\]'"):
        fit_linear_probe(iter([]), 4, 2, images=4, device=torch.device("cpu"), epochs=20)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_linear_probe_learns_and_accumulates_its_batch(optimizer):
    pytest.importorskip("timm")
    split, updates = clusters(240, 60), []

    def batches():
        while True:
            for rows in torch.randperm(240).split(60):
                yield split.inputs[rows], split.labels[rows]

    torch.manual_seed(0)
    options = {"images": 240, "device": torch.device("cpu"), "optimizer": optimizer, "epochs": 20, "warmup_epochs": 2}
    head = fit_linear_probe(
        batches(), 16, 6, **options, base_lr=1.0, batch_size=120, on_batch=lambda loss: updates.append(float(loss))
    )
    assert len(updates) == 20 * 4
    assert updates[0] == pytest.approx(updates[1], rel=0.05)  # no update before two batches of 60
    assert accuracies(head(split.tests), split)["top1"] > 0.9
