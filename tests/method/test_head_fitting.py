from dataclasses import replace

import torch
import torch.nn.functional as F

from pnc.clones.heads import source_head
from pnc.method import head_fitting
from pnc.method.head_fitting import HeadSamples, balanced_weights, choose_stacking, fit_scores, fit_stacked

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
        own_logits=torch.randn(len(labels), N_NEW, generator=generator),
        labels=labels,
        folds=torch.arange(len(labels)) % 5,
        n_classes=n_classes,
    )


def test_the_composite_keeps_the_targets_conditional_distribution_and_gives_the_scores_posterior_to_the_new_classes():
    samples = draw()
    head = fit_scores(samples)
    new = head(samples.target_features, samples.clone_features, samples.base_logits)
    probabilities = torch.cat([samples.base_logits, new], 1).double().softmax(1)
    features = torch.cat([samples.target_features, samples.clone_features], 1)
    posterior = (features @ head.weight.T + head.bias).double().softmax(1)
    torch.testing.assert_close(probabilities[:, 3:], posterior[:, 3:], atol=1e-5, rtol=1e-4)  # float32 logits
    conditional = probabilities[:, :3] / probabilities[:, :3].sum(1, keepdim=True)
    torch.testing.assert_close(conditional, samples.base_logits.double().softmax(1), atol=1e-6, rtol=1e-5)


def test_base_classes_without_samples_are_left_out():
    samples = draw()
    kept = samples.select(samples.labels != 1)
    head = fit_scores(kept)
    assert head.weight[1].abs().sum() == 0
    two = replace(
        kept, labels=kept.labels - (kept.labels > 1).long(), base_logits=kept.base_logits[:, [0, 2]], n_classes=4
    )
    smaller = fit_scores(two)
    assert torch.equal(head.weight[[0, 2, 3, 4]], smaller.weight)
    new = head(kept.target_features, kept.clone_features, kept.base_logits)
    expected = smaller(kept.target_features, kept.clone_features, kept.base_logits)
    assert torch.equal(new, expected)
    assert choose_stacking(kept).logits.isfinite().all()


def test_without_base_samples_the_head_is_the_sources_own():
    samples = draw(base=False)
    weight, bias = torch.randn(N_NEW, 5), torch.randn(N_NEW)
    head = source_head(weight, bias)
    new = head(samples.target_features, samples.clone_features, samples.base_logits)
    assert torch.equal(new, torch.nn.functional.linear(samples.clone_features, weight, bias))
    assert head(samples.target_features, samples.clone_features, samples.base_logits.half()).dtype == torch.half


def informed(samples: HeadSamples, own: float, fitted: float) -> HeadSamples:
    """The same samples, with own logits and features that separate the classes this well (0: not at all)."""
    generator = torch.Generator().manual_seed(7)
    scores = own * F.one_hot(samples.labels, N_BASE + N_NEW) + torch.randn(len(samples.labels), 5, generator=generator)
    noise = torch.randn(samples.target_features.shape, generator=generator)
    return replace(
        samples,
        target_features=fitted * samples.target_features + (1 - fitted) * noise,
        clone_features=fitted * samples.clone_features,
        base_logits=scores[:, :N_BASE],
        own_logits=scores[:, N_BASE:],
    )


def log_loss(logits: torch.Tensor, samples: HeadSamples) -> float:
    return float(F.cross_entropy(logits, samples.labels))


def held_out_odds(samples: HeadSamples) -> torch.Tensor:
    return head_fitting._odds(samples, head_fitting._fold_heads(samples))


def fitted_alone(samples: HeadSamples) -> torch.Tensor:
    """The composite's held-out logits from fitted scores alone, before mixing."""
    level = samples.base_logits.logsumexp(1, keepdim=True)
    return torch.cat([samples.base_logits, held_out_odds(samples) + level], 1)


def test_stacking_keeps_the_networks_own_logits_if_discriminants_are_useless():
    samples = informed(draw(), own=4.0, fitted=0.0)
    stacking = choose_stacking(samples)
    ensemble = torch.cat([samples.base_logits, samples.own_logits], 1).double()
    assert log_loss(stacking.logits, samples) < log_loss(ensemble, samples) + 0.03
    assert log_loss(stacking.logits, samples) < log_loss(fitted_alone(samples), samples) - 0.2


def test_stacking_keeps_the_discriminants_if_the_source_is_useless():
    samples = replace(draw(), own_logits=torch.zeros(200, N_NEW))
    stacking = choose_stacking(samples)
    fitted = fitted_alone(samples)
    is_new = samples.labels >= N_BASE
    found, expected = (((logits.argmax(1) >= N_BASE) == is_new).double().mean() for logits in (stacking.logits, fitted))
    assert found >= expected - 0.01
    # a constant term leaves only rounding errors
    assert abs(float(stacking.odds_weight[1])) < 1e-3
    assert abs(float(stacking.class_weight[1])) < 1e-3


def test_a_stacked_head_uses_the_chosen_weights_and_keeps_the_targets_conditional_distribution():
    samples = informed(draw(), own=2.0, fitted=1.0)
    stacking = choose_stacking(samples)
    own = source_head(torch.randn(N_NEW, 5), torch.randn(N_NEW))
    head = fit_stacked(samples, stacking, own)
    inputs = samples.target_features, samples.clone_features, samples.base_logits
    new = head(*inputs)
    fitted, sources = head.discriminants(*inputs), own(*inputs)
    exact = fit_scores(samples).weight
    torch.testing.assert_close(head.discriminants.weight, exact, atol=1e-6, rtol=1e-3)  # eleven bits
    assert torch.equal(head.discriminants.weight.half().float(), head.discriminants.weight)
    base = samples.base_logits.logsumexp(1)
    terms = torch.stack([fitted.logsumexp(1) - base, sources.logsumexp(1), base, torch.ones_like(base)], 1)
    log_odds = terms @ stacking.odds_weight.float()
    torch.testing.assert_close(new.logsumexp(1) - base, log_odds, atol=1e-4, rtol=1e-4)  # float32 in another order
    within = fitted * stacking.class_weight[0].float() + sources * stacking.class_weight[1].float()
    torch.testing.assert_close(new.log_softmax(1), within.log_softmax(1), atol=1e-4, rtol=1e-4)  # likewise
    assert head(*inputs[:2], samples.base_logits.half()).dtype == torch.half


def test_mixing_weights_do_not_depend_on_how_many_samples_a_class_has():
    samples = informed(draw(), own=2.0, fitted=1.0)
    once = choose_stacking(samples)
    more = samples.select(torch.cat([torch.arange(200), (samples.labels == 4).nonzero().flatten().repeat(3)]))
    # The penalty is fixed while the sum grows with the samples, so the weights move a little.
    assert float((choose_stacking(more).odds_weight - once.odds_weight).abs().max()) < 0.4


def test_base_and_new_samples_have_equal_weight_and_so_have_the_classes_of_each_kind():
    labels = torch.tensor([0, 0, 0, 2, 3, 3, 4])  # no sample of class 1; new classes are 3 and 4
    weights = balanced_weights(labels, 3)
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, labels, weights)
    torch.testing.assert_close(sums, torch.tensor([0.5, 0.0, 0.5, 0.5, 0.5], dtype=torch.float64))
    assert balanced_weights(labels[4:], 3).sum() == 1


def test_each_sample_is_judged_by_scores_that_were_fitted_without_its_fold() -> None:
    samples = draw()
    held_out = samples.folds == 2
    labels = samples.labels.clone()
    labels[held_out] = labels[held_out].flip(0)  # as many of each class, so that the weights are the same
    odds, with_others = held_out_odds(samples), held_out_odds(replace(samples, labels=labels))
    # the regressions share their step sizes, so other folds affect this one slightly
    torch.testing.assert_close(odds[held_out], with_others[held_out], atol=0.05, rtol=0.05)
    assert float((odds - with_others)[~held_out].abs().max()) > 0.5


def test_with_one_fold_the_discriminants_cannot_be_judged_and_are_left_out():
    samples = replace(informed(draw(n_per_class=1), own=4.0, fitted=1.0), folds=torch.zeros(5, dtype=torch.long))
    stacking = choose_stacking(samples)
    assert stacking.odds_weight[0] == 0
    assert stacking.class_weight[0] == 0
    assert stacking.class_weight[1] > 0
    alone = choose_stacking(replace(samples, own_logits=torch.zeros(5, N_NEW)))
    assert alone.class_weight[0] > 0


def test_the_same_heads_give_the_same_logits_on_the_same_features_and_follow_other_ones():
    samples = informed(draw(), own=1.0, fitted=1.0)
    stacking = choose_stacking(samples)
    assert torch.equal(stacking.on(samples).logits, stacking.logits)
    noisy = replace(samples, clone_features=torch.randn_like(samples.clone_features))
    other = stacking.on(noisy)
    assert torch.equal(other.odds_weight, stacking.odds_weight)
    assert torch.equal(other.logits[:, : samples.n_base], stacking.logits[:, : samples.n_base])
    assert log_loss(other.logits, samples) > log_loss(stacking.logits, samples) + 0.1
