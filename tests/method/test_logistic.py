import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pnc.method.logistic import PENALTY, logistic_regressions

N_CLASSES = 4


def draw(n_per_class: int = 60, n_features: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N_CLASSES).repeat_interleave(n_per_class)
    means = torch.randn(N_CLASSES, n_features, generator=generator)
    features = 3 + 5 * (means[labels] + torch.randn(len(labels), n_features, generator=generator))
    return features, labels


EVERY = torch.ones(N_CLASSES, dtype=torch.bool)


def test_probabilities_are_those_of_scikit_learn() -> None:
    features, labels = draw()
    weights = torch.where(labels == 1, 0.4, 1.2)
    weight, bias = logistic_regressions(features, labels, weights[:, None], EVERY)
    rows = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    model = LogisticRegression(C=1 / PENALTY, max_iter=1000, tol=1e-8).fit(rows, labels.numpy(), weights.numpy())
    expected = torch.from_numpy(model.predict_proba(rows)).float()
    found = F.linear(features, weight[0], bias[0]).softmax(1)
    # thirty steps in float32, compared with scikit-learn's minimum
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_a_sample_of_weight_zero_is_ignored() -> None:
    features, labels = draw()
    taking_part = (torch.arange(len(labels)) % 3 > 0).float()[:, None]
    wrong = torch.where(taking_part[:, 0] > 0, labels, labels.flip(0))
    found = logistic_regressions(features, labels, taking_part, EVERY)
    for one, other in zip(found, logistic_regressions(features, wrong, taking_part, EVERY), strict=True):
        assert torch.equal(one, other)


def test_several_regressions_at_once_equal_single_ones() -> None:
    features, labels = draw()
    folds = F.one_hot(torch.arange(len(labels)) % 3, 3)
    weight, bias = logistic_regressions(features, labels, 1 - folds, EVERY)
    for fold in range(3):
        alone = logistic_regressions(features, labels, 1 - folds[:, [fold]], EVERY)
        scores = [
            F.linear(features, one[0], other[0]).log_softmax(1)
            for one, other in (alone, (weight[[fold]], bias[[fold]]))
        ]
        # they share their step sizes, so results after thirty steps differ slightly
        torch.testing.assert_close(*scores, atol=0.02, rtol=0.02)


def test_an_absent_class_gets_no_weights_and_changes_nothing() -> None:
    features, labels = draw()
    rows = labels != 2
    some = labels[rows].clone()
    some[some == 3] = 2
    weight, bias = logistic_regressions(
        features[rows], labels[rows], torch.ones(180, 1), EVERY & (torch.arange(4) != 2)
    )
    fewer = logistic_regressions(features[rows], some, torch.ones(180, 1), torch.ones(3, dtype=torch.bool))
    assert not weight[:, 2].any() and not bias[:, 2].any()
    assert torch.equal(weight[:, [0, 1, 3]], fewer[0]) and torch.equal(bias[:, [0, 1, 3]], fewer[1])


@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_constant_features_and_few_samples_give_finite_weights(constant: float) -> None:
    features = torch.full((3, 40), constant)
    features[:, 0] = torch.tensor([0.0, 1.0, 2.0])
    weight, bias = logistic_regressions(features, torch.tensor([0, 1, 1]), torch.ones(3, 1), torch.tensor([True, True]))
    assert weight.isfinite().all() and bias.isfinite().all()
    assert float(weight[:, :, 1:].abs().max()) < 1e-3
