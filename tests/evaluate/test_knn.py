"""Weighted nearest neighbours: the votes against sums written out, ties, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastmae.evaluate import knn_scores, top_k_accuracy


def written_out(bank, labels, query, k, temperature, num_classes):
    similarity = [float(F.cosine_similarity(query, known, dim=0)) for known in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = [0.0] * num_classes
    for i in nearest:
        votes[int(labels[i])] += math.exp(similarity[i] / temperature)
    return [vote / sum(votes) for vote in votes]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (100, 0.07)])
def test_votes_are_those_of_the_formula(k, temperature):
    bank, labels = 3 * torch.randn(40, 6), torch.randint(0, 4, (40,))
    queries = torch.randn(7, 6)
    scores = knn_scores(bank, labels, queries, k=k, temperature=temperature, num_classes=5)
    assert scores.shape == (7, 5)
    expected = [written_out(bank, labels, query, k, temperature, 5) for query in queries]
    torch.testing.assert_close(scores.exp(), torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_neither_lengths_nor_the_number_of_queries_matter_and_a_cold_temperature_does_not_overflow():
    bank, labels, queries = torch.randn(30, 8), torch.randint(0, 3, (30,)), torch.randn(1030, 8)
    scores = knn_scores(bank, labels, queries)  # more queries than are compared at once
    torch.testing.assert_close(knn_scores(100 * bank, labels, 0.01 * queries[1020:]), scores[1020:])
    cold = knn_scores(bank, labels, queries, temperature=1e-4)
    assert cold.max(1).values.isfinite().all()
    assert torch.equal(cold.argmax(1), knn_scores(bank, labels, queries, k=1).argmax(1))


def test_top_k_counts_classes_with_votes_only_and_prefers_earlier_ones():
    none = -math.inf
    scores = torch.tensor([[0.0, -1.0, none], [-1.0, -1.0, none], [none, none, 0.0]])
    assert top_k_accuracy(scores, torch.tensor([1, 0, 2])) == pytest.approx(2 / 3)
    assert top_k_accuracy(scores, torch.tensor([1, 1, 0])) == 0
    assert top_k_accuracy(scores, torch.tensor([1, 1, 0]), 2) == pytest.approx(2 / 3)
    assert top_k_accuracy(scores, torch.tensor([2, 2, 0]), 3) == 0
    assert top_k_accuracy(scores, torch.tensor([-1, 7, -1]), 3) == 0


def test_what_does_not_fit_is_refused():
    fine = {"bank": torch.ones(3, 4), "labels": torch.tensor([0, 1, 0]), "queries": torch.ones(2, 4)}
    for arguments, message in [
        ({"bank": torch.zeros(0, 4)}, r"bank: expected shape \(n, D\) with n at least 1"),
        ({"labels": torch.zeros(3)}, "labels: expected int64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: expected int64 of shape \(3,\)"),
        ({"labels": torch.tensor([0, 1, -1])}, "labels: expected classes from 0 to 1, got -1 to 1"),
        ({"num_classes": 1}, "labels: expected classes from 0 to 0, got 0 to 1"),
        ({"queries": torch.zeros(2, 3)}, r"queries: expected shape \(m, 4\)"),
        ({"k": 0}, "k and temperature"),
        ({"temperature": 0.0}, "k and temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            knn_scores(**fine | arguments)
    for queries, classes in ((0, 0), (2, 3)):
        with pytest.raises(ValueError, match="scores and labels"):
            top_k_accuracy(torch.zeros(queries, 3), torch.zeros(classes, dtype=torch.int64))
