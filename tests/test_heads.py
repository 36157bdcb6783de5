from dataclasses import replace

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from pnc.heads import (
    SHRINKAGES,
    HeadSamples,
    choose_shrinkage,
    fit_discriminant,
    source_head,
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
        folds=torch.arange(len(labels)) % 5,
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
        samples.folds.repeat(2),
        samples.n_classes,
    )
    shrinkage, logits = choose_shrinkage(twice)
    assert shrinkage in SHRINKAGES
    # Both copies of an image are held out together, so both get the very same answer, and it is not the training fit's.
    assert torch.equal(logits[: len(samples.labels)], logits[len(samples.labels) :])
    head = fit_discriminant(twice, shrinkage)
    fitted = head(twice.target_features, twice.clone_features, twice.base_logits)
    assert not torch.allclose(fitted.double(), logits[:, 3:], atol=1e-3)


def test_each_fold_is_judged_by_the_discriminants_of_the_others():
    samples = draw()
    shrinkage, logits = choose_shrinkage(samples)
    for fold in range(5):
        held_out = samples.folds == fold
        head, part = fit_discriminant(samples.select(~held_out), shrinkage), samples.select(held_out)
        new = head(part.target_features, part.clone_features, part.base_logits)
        torch.testing.assert_close(logits[held_out, 3:].float(), new, atol=1e-3, rtol=1e-4)  # float64 against float32


def test_a_single_fold_takes_the_strongest_shrinkage():
    samples = replace(draw(n_per_class=1), folds=torch.zeros(5, dtype=torch.long))
    shrinkage, logits = choose_shrinkage(samples)
    assert shrinkage == SHRINKAGES[-1]
    assert logits.isfinite().all()


def test_without_base_samples_the_head_is_the_sources_own():
    samples = draw(base=False)
    weight, bias = torch.randn(N_NEW, 5), torch.randn(N_NEW)
    head = source_head(weight, bias)
    new = head(samples.target_features, samples.clone_features, samples.base_logits)
    assert torch.equal(new, torch.nn.functional.linear(samples.clone_features, weight, bias))
    assert head(samples.target_features, samples.clone_features, samples.base_logits.half()).dtype == torch.half
