import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from pnc.heads import (
    SHRINKAGES,
    HeadSamples,
    OneClassHead,
    choose_shrinkage,
    fit_discriminant,
    fit_one_class,
)

N_BASE, N_NEW = 3, 2


def draw(n_per_class: int = 40, n_target: int = 6, n_clone: int = 5, seed: int = 0, base: bool = True) -> HeadSamples:
    generator = torch.Generator().manual_seed(seed)
    n_classes = N_BASE + N_NEW
    means = 1.5 * torch.randn(n_classes, n_target + n_clone, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n_classes).repeat_interleave(n_per_class)
    if not base:
        labels = labels[labels >= N_BASE]
    features = means[labels] + torch.randn(len(labels), n_target + n_clone, generator=generator)
    return HeadSamples(
        target_features=features[:, :n_target],
        clone_features=features[:, n_target:],
        base_logits=torch.randn(len(labels), N_BASE, generator=generator),
        labels=labels,
        groups=torch.arange(len(labels)),
        n_classes=n_classes,
    )


def test_discriminants_are_those_of_scikit_learn():
    samples = draw()
    features = torch.cat([samples.target_features, samples.clone_features], 1).double()
    # scikit-learn shrinks towards a multiple of the identity; on features of unit within-class variance that is ours
    means = torch.stack([features[samples.labels == k].mean(0) for k in range(5)])
    scale = (features - means[samples.labels]).square().mean(0).sqrt()
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=np.full(5, 0.2))
    model.fit((features / scale).numpy(), samples.labels.numpy())
    expected = torch.from_numpy(model.predict_log_proba((features / scale).numpy()))
    head = fit_discriminant(samples, 0.1)
    scores = (features @ head.weight.double().T + head.bias.double()).log_softmax(1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)  # our head is stored in float32


def test_more_features_than_samples_give_the_same_discriminants_as_a_direct_solve():
    samples = draw(n_per_class=4, n_target=30, n_clone=20)
    features = torch.cat([samples.target_features, samples.clone_features], 1).double()
    means = torch.stack([features[samples.labels == k].mean(0) for k in range(5)])
    centred = features - means[samples.labels]
    scale = centred.square().mean(0).sqrt()
    correlation = (centred / scale).T @ (centred / scale) / len(features)
    covariance = 0.8 * correlation + 0.2 * torch.eye(50, dtype=torch.float64)
    rows = (means - means.mean(0)) / scale
    weight = torch.linalg.solve(covariance, rows.T).T / scale
    head = fit_discriminant(samples, 0.2)
    torch.testing.assert_close(head.weight.double(), weight, atol=1e-5, rtol=1e-4)  # stored in float32


def test_the_composite_keeps_the_targets_conditional_distribution_and_gives_lda_to_the_new_classes():
    samples = draw()
    head = fit_discriminant(samples, 0.05)
    new = head(samples.target_features, samples.clone_features, samples.base_logits)
    probabilities = torch.cat([samples.base_logits, new], 1).double().softmax(1)
    features = torch.cat([samples.target_features, samples.clone_features], 1)
    posterior = (features @ head.weight.T + head.bias).double().softmax(1)
    torch.testing.assert_close(probabilities[:, 3:], posterior[:, 3:], atol=1e-5, rtol=1e-4)  # float32 logits
    conditional = probabilities[:, :3] / probabilities[:, :3].sum(1, keepdim=True)
    torch.testing.assert_close(conditional, samples.base_logits.double().softmax(1), atol=1e-6, rtol=1e-5)


def test_held_out_logits_come_from_heads_that_did_not_see_the_image():
    samples = draw(n_per_class=20)
    twice = HeadSamples(
        samples.target_features.repeat(2, 1),
        samples.clone_features.repeat(2, 1),
        samples.base_logits.repeat(2, 1),
        samples.labels.repeat(2),
        samples.groups.repeat(2),
        samples.n_classes,
    )
    shrinkage, logits = choose_shrinkage(twice, n_folds=5, seed=0)
    assert shrinkage in SHRINKAGES
    # Both copies of an image are held out together, so both get the very same answer, and it is not the training fit's.
    assert torch.equal(logits[: len(samples.labels)], logits[len(samples.labels) :])
    head = fit_discriminant(twice, shrinkage)
    fitted = head(twice.target_features, twice.clone_features, twice.base_logits)
    assert not torch.allclose(fitted.double(), logits[:, 3:], atol=1e-3)


def test_cross_validation_is_the_same_for_the_same_seed_only():
    samples = draw()
    same = [choose_shrinkage(samples, 5, 0)[1] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], choose_shrinkage(samples, 5, 1)[1])


def test_the_one_class_score_is_a_gaussian_log_density():
    samples = draw(base=False)
    head = fit_one_class(samples, torch.randn(N_NEW, 5), torch.zeros(N_NEW), shrinkage=0.3)
    features, labels = samples.target_features.double(), samples.labels - N_BASE
    means = torch.stack([features[labels == k].mean(0) for k in range(N_NEW)])
    centred = features - means[labels]
    scale = centred.square().mean(0).sqrt()
    correlation = (centred / scale).T @ (centred / scale) / len(features)
    covariance = torch.diag(scale) @ (0.7 * correlation + 0.3 * torch.eye(6, dtype=torch.float64)) @ torch.diag(scale)
    densities = [torch.distributions.MultivariateNormal(mean, covariance).log_prob(features) for mean in means]
    constant = torch.distributions.MultivariateNormal(means[0], covariance).log_prob(means[0])
    expected = torch.stack(densities, 1).logsumexp(1) - constant
    torch.testing.assert_close(head.fit_score(samples.target_features).double(), expected, atol=1e-3, rtol=1e-4)  # float32


def test_without_base_samples_the_head_is_the_ensemble_less_what_does_not_fit():
    samples = draw(base=False)
    weight, bias = torch.randn(N_NEW, 5), torch.randn(N_NEW)
    head = fit_one_class(samples, weight, bias)
    near, far = samples.target_features[:1], samples.target_features[:1] + 50
    clone_features, base_logits = samples.clone_features[:1], samples.base_logits[:1]
    ensemble = clone_features @ weight.T + bias
    # The correction is one number per sample: it cannot reorder the new classes.
    shift = head(near, clone_features, base_logits) - ensemble
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=1e-5)  # float32 sums
    assert (head(far, clone_features, base_logits) < head(near, clone_features, base_logits)).all()
    fits = head.fit_score(samples.target_features) >= head.offset
    assert fits.float().mean() == pytest.approx(0.8, abs=0.02)  # one support sample in five lies below the offset


def test_the_low_rank_score_ignores_only_the_smallest_directions():
    samples = draw(n_target=12, base=False)
    full = fit_one_class(samples, torch.zeros(N_NEW, 5), torch.zeros(N_NEW))
    low = fit_one_class(samples, torch.zeros(N_NEW, 5), torch.zeros(N_NEW), max_rank=3)
    assert isinstance(low, OneClassHead)
    assert low.whitening.shape == (3, 12)
    assert full.whitening.shape == (12, 12)
    # Dropping directions makes the density narrower in them: scores can only fall.
    assert (low.fit_score(samples.target_features) <= full.fit_score(samples.target_features) + 1e-4).all()
