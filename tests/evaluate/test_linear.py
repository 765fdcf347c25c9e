"""The linear classifier: it is at the optimum of its objective, on standardised features, as scikit-learn finds it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmae.evaluate import fit_linear, linear


def clusters(n=300, classes=4, dim=12, spread=1.0):
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(n) % classes
    return 5.0 + 3.0 * (centers[labels] + spread * torch.randn(n, dim)), labels


def objective(classifier, features, labels, l2):
    weights = classifier.weight.double().requires_grad_()
    bias = classifier.bias.double().requires_grad_()
    x = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    loss = F.cross_entropy(F.linear(x, weights, bias), labels) + l2 / 2 * weights.square().sum()
    return torch.autograd.grad(loss, [weights, bias])


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_the_gradient_of_the_objective_vanishes(l2):
    features, labels = clusters()
    features.requires_grad_()
    state = torch.get_rng_state()
    with torch.no_grad():
        classifier = fit_linear(features, labels, l2=l2)
    assert torch.equal(torch.get_rng_state(), state)
    assert features.grad is None
    features = features.detach()
    assert not classifier.scores(features).requires_grad
    for gradient in objective(classifier, features, labels, l2):
        assert gradient.abs().max() < 1e-4


def test_the_same_classifier_as_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters()
    ours = fit_linear(features, labels, l2=0.01)
    x = ((features - ours.mean) / ours.std).double().numpy()
    theirs = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000).fit(x, labels.numpy())
    torch.testing.assert_close(ours.weight.double(), torch.from_numpy(theirs.coef_), rtol=0, atol=2e-3)
    assert (ours.scores(features).argmax(1) == torch.from_numpy(theirs.predict(x))).all()


def test_logits_of_a_few_rows_at_a_time_give_the_same_classifier(monkeypatch):
    features, labels = clusters()
    expected, shapes, product = fit_linear(features, labels), [], F.linear
    monkeypatch.setattr(linear, "_ROWS", 128)
    monkeypatch.setattr(linear.F, "linear", lambda x, *weights: shapes.append(len(x)) or product(x, *weights))
    found = fit_linear(features, labels)
    assert shapes[:3] == [128, 128, 44]
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=1e-3)


def test_units_of_the_features_do_not_matter_nor_does_a_constant_one():
    features, labels = clusters()
    scores = fit_linear(features, labels).scores(features)
    moved = torch.cat([1000 * features - 77, torch.full((300, 1), 3.0)], 1)
    torch.testing.assert_close(fit_linear(moved, labels).scores(moved), scores, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused():
    features, labels = clusters()
    with pytest.raises(ValueError, match="l2: expected at least 0, got -1"):
        fit_linear(features, labels, l2=-1)
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        fit_linear(features.log(), labels)
    with pytest.raises(ValueError, match=r"labels: expected int64 of shape \(300,\)"):
        fit_linear(features, labels[:5])
    with pytest.raises(ValueError, match="classes from 0 to 1, got 0 to 3"):
        fit_linear(features, labels, num_classes=2)
