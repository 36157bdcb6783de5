import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from pnc.method.discriminants import ABSENT, SHRINKAGES, choose_shrinkage, fit_discriminants


def draw(n_per_class: int, n_features: int) -> tuple[Tensor, Tensor]:
    """Features of five classes, float64, and labels."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(5, n_features, generator=generator, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(n_per_class)
    return means[labels] + torch.randn(len(labels), n_features, generator=generator, dtype=torch.float64), labels


def test_discriminants_are_those_of_scikit_learn() -> None:
    features, labels = draw(40, 11)
    # scikit-learn shrinks towards a multiple of the identity; on features of unit within-class variance that is ours
    means = torch.stack([features[labels == k].mean(0) for k in range(5)])
    scale = (features - means[labels]).square().mean(0).sqrt()
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=np.full(5, 0.2))
    model.fit((features / scale).numpy(), labels.numpy())
    expected = torch.from_numpy(model.predict_log_proba((features / scale).numpy()))
    weight, bias = fit_discriminants(features, labels, 5, 0.1)
    scores = (features @ weight.double().T + bias.double()).log_softmax(1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)  # ours are float32


def test_more_features_than_samples_give_the_same_discriminants_as_a_direct_solve() -> None:
    features, labels = draw(4, 50)
    means = torch.stack([features[labels == k].mean(0) for k in range(5)])
    centred = features - means[labels]
    scale = centred.square().mean(0).sqrt()
    correlation = (centred / scale).T @ (centred / scale) / len(features)
    covariance = 0.8 * correlation + 0.2 * torch.eye(50, dtype=torch.float64)
    rows = (means - means.mean(0)) / scale
    expected = torch.linalg.solve(covariance, rows.T).T / scale
    weight, _ = fit_discriminants(features, labels, 5, 0.2)
    torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=1e-4)  # ours are float32


def test_a_class_without_samples_is_left_out() -> None:
    features, labels = draw(20, 8)
    rows = labels != 1
    fewer = labels[rows] - (labels[rows] > 1).long()
    weight, bias = fit_discriminants(features[rows], labels[rows], 5, 0.1)
    assert not weight[1].any() and bias[1] == ABSENT
    smaller = fit_discriminants(features[rows], fewer, 4, 0.1)
    assert torch.equal(weight[[0, 2, 3, 4]], smaller[0]) and torch.equal(bias[[0, 2, 3, 4]], smaller[1])


def test_each_fold_is_judged_by_the_discriminants_of_the_others() -> None:
    features, labels = draw(40, 11)
    folds = torch.arange(len(labels)) % 5
    shrinkage, odds = choose_shrinkage(features, labels, folds, 3)
    assert shrinkage in SHRINKAGES and odds.shape == (200, 2)
    for fold in range(5):
        held_out = folds == fold
        weight, bias = fit_discriminants(features[~held_out], labels[~held_out], 5, shrinkage)
        scores = features[held_out] @ weight.double().T + bias.double()
        expected = scores[:, 3:] - scores[:, :3].logsumexp(1, keepdim=True)
        torch.testing.assert_close(odds[held_out], expected, atol=1e-3, rtol=1e-4)  # float64 against float32


def test_copies_of_a_sample_that_are_held_out_together_get_the_same_answer() -> None:
    features, labels = draw(20, 11)
    twice = torch.arange(len(labels)).repeat(2)
    _, odds = choose_shrinkage(features[twice], labels[twice], (torch.arange(len(labels)) % 5).repeat(2), 3)
    assert torch.equal(odds[: len(labels)], odds[len(labels) :])


def test_a_single_fold_takes_the_strongest_shrinkage() -> None:
    features, labels = draw(1, 11)
    shrinkage, odds = choose_shrinkage(features, labels, torch.zeros(5, dtype=torch.long), 3)
    assert shrinkage == SHRINKAGES[-1] and bool(odds.isfinite().all())
