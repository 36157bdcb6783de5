"""Calibration on synthetic log-odds with a known answer, and on tiny composites, in which nothing else may change."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pnc
from pnc.bench.random_lives import BASE, GROUPS
from pnc.clones.branch import Scalars, against_rivals
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.method.calibration import MIN_SCALE, _against_rivals, _most_probable, _Problem, collect_log_odds

N_BASE = len(BASE)
NEW = tuple(name for group in GROUPS for name in group)


@pytest.fixture
def net(stage):
    return pnc.attach(copy.deepcopy(stage.target), *stage.clones)


def problem(scales, offsets, sizes=(2, 3), n_base=3, n=4000, seed=0):
    """Draw labels from logits computed from log-odds with the given scales and offsets."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, n_base, generator=generator, dtype=torch.float64)
    level = base.logsumexp(1, keepdim=True)
    log_odds = 3 * torch.randn(n, sum(sizes), generator=generator, dtype=torch.float64)
    owner = F.one_hot(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))).double()
    logits = torch.cat([base, level + log_odds * (owner @ torch.tensor(scales).double()) + torch.tensor(offsets)], 1)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return _Problem(base, level, log_odds, labels, owner)


def test_slopes_are_those_of_autograd():
    one = problem((0.5, 1.5), (0.0, 1.0, -1.0, 0.0, 2.0), n=50)
    values = torch.tensor([0.7, 1.2, 0.1, -0.2, 0.3, 0.4, -0.5], dtype=torch.float64, requires_grad=True)

    def loss(at):
        return one.loss(at[:2], at[2:])

    gradient, hessian = one.slopes(values[:2].detach(), values[2:].detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(values), values)[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, values.detach()))


def test_the_optimum_is_where_loss_and_prior_are_flat():
    one = problem((0.5, 1.5), (0.0, 1.0, -1.0, 0.0, 2.0), n=300)
    scales, offsets = _most_probable(one, fit_scales=True)
    values = torch.cat([scales, offsets])
    mean = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    slope = one.slopes(scales, offsets)[0] + one.prior_precision @ (values - mean)
    assert slope.abs().max() < 1e-9


def test_with_many_samples_scales_and_offsets_are_found_again():
    one = problem((0.5, 1.5), (0.3, 0.0, 0.0, -0.3, 0.0), n=40_000)
    scales, offsets = _most_probable(one, fit_scales=True)
    # Base and new samples have equal weight whatever their numbers, so offsets differ by a constant for each class.
    # Scales have no such freedom; with 40,000 draws the error is about a hundredth.
    torch.testing.assert_close(scales, torch.tensor([0.5, 1.5], dtype=torch.float64), atol=0.06, rtol=0)
    assert one.loss(scales, offsets) < one.loss(torch.ones(2).double(), torch.zeros(5).double())


def test_few_samples_move_little():
    few, many = (problem((0.3, 0.3), (0.0,) * 5, n=n) for n in (5, 2000))
    moved = [float((_most_probable(one, fit_scales=True)[0] - 1).abs().max()) for one in (few, many)]
    assert moved[0] < moved[1]


def test_a_clone_that_is_always_wrong_is_scaled_down_and_not_inverted():
    one = problem((1.0, -1.0), (0.0,) * 5)
    scales, _ = _most_probable(one, fit_scales=True)
    assert scales[1] == MIN_SCALE
    assert 0.5 < scales[0] < 2


def clusters(n_each, spread, seed=0):
    """Features (4 * n_each, 6) around four means, labels -1 (base), 0, 1, 2."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(-1, 3).repeat(n_each)
    means = 3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), 6, generator=generator, dtype=torch.float64)
    return means[labels + 1] + spread * noise, labels


def test_rivals_are_separated_as_well_as_the_features_allow():
    is_own = torch.tensor([True, False, True])
    features, labels = clusters(40, 1.0)
    told, rivals = _against_rivals(features, labels, is_own)
    assert told.shape == (160, 1) and len(rivals) == 3 and {len(row) for row in rivals} == {7}
    rival, own = labels == 1, (labels == 0) | (labels == 2)
    assert told[own].mean() > -0.1 and told[rival].mean() < -2
    again, expected = clusters(200, 1.0, seed=0)
    against = against_rivals(again, torch.tensor(rivals, dtype=torch.float64), 2)
    assert ((against > 0) == (expected != 1)[:, None])[expected >= 0].double().mean() > 0.95
    surer, sure = (float(against_rivals(features, torch.tensor(rows, dtype=torch.float64), 2).abs().mean())
                   for rows in (rivals, _against_rivals(*clusters(40, 6.0), is_own)[1]))  # fmt: skip
    assert sure < surer / 2, "where classes overlap, less is said"


def test_without_others_or_held_out_images_there_are_no_rivals():
    features, labels = clusters(40, 1.0)
    for told, rivals in (
        _against_rivals(features, labels, torch.ones(3, dtype=torch.bool)),
        _against_rivals(features[:4], labels[:4], torch.tensor([True, False, False])),
    ):
        assert rivals == () and not told.any()


def test_calibrate_changes_only_the_scalars(stage, net):
    images = stage.images
    before, clones = take_snapshot(net.target), [copy.deepcopy(clone.branch.state_dict()) for clone in stage.clones]
    random_state = torch.get_rng_state()
    found = pnc.calibrate(net, stage.support)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert found.loss_after < found.loss_before
    assert found.has_base and found.n_images == len(stage.support.labels)
    assert any(one.rivals for one in found.scalars.values()), "or their term is not looked at here"
    assert tuple(found.scalars) == net.clones
    assert differences(net.target, before) == []
    for clone, state in zip(stage.clones, clones, strict=True):
        assert clone.branch.scalars.is_identity
        assert all(torch.equal(tensor, state[name]) for name, tensor in clone.branch.state_dict().items())
    assert all(row.calibrated for row in net.status())
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(logits[:, :N_BASE], stage.base)
        level, features = stage.base.logsumexp(1, keepdim=True), net.now().log_odds(images)[1]
        start = N_BASE
        for (name, scalars), raw in zip(found.scalars.items(), stage.alone, strict=True):
            expected = level + scalars.scale * (raw - level) + torch.tensor(scalars.offsets)
            if scalars.rivals:
                rows = torch.tensor(scalars.rivals)
                scores = features[name][1] @ rows[:, :-1].T + rows[:, -1]
                expected = expected + scores.log_softmax(1)[:, -raw.shape[1] :].logsumexp(1, keepdim=True)
            end = start + raw.shape[1]
            # Scalars are computed in float64 and stored in float32.
            torch.testing.assert_close(logits[:, start:end], expected, atol=1e-4, rtol=1e-4, msg=name)
            start = end
        # Folded weights, and kernels for another batch size, round differently.
        torch.testing.assert_close(net.fused()(images), logits, atol=1e-4, rtol=1e-4)
        only = net(images, only=[net.clones[1:]] * 2 + [()] * (len(images) - 2))[:2, -4:]
        torch.testing.assert_close(only, logits[:2, -4:], atol=1e-4, rtol=1e-4)
        losses = F.cross_entropy(net(stage.support.images), stage.support.labels, reduction="none")
        is_base = stage.support.labels < N_BASE  # classes are equally many within either kind
        measured = (losses[is_base].mean() + losses[~is_base].mean()) / 2
    assert float(measured) < found.loss_before


def test_calibrating_again_starts_from_the_uncalibrated_clones(stage, net):
    first = pnc.calibrate(net, stage.support)
    assert pnc.calibrate(net, stage.support) == first
    net.base_priority = 3.0
    assert pnc.calibrate(net, stage.support) == first
    net.base_priority = 0.0
    net.rescale({name: Scalars() for name in net.clones})
    with torch.no_grad():
        assert torch.equal(net(stage.images), torch.cat([stage.base, *stage.alone], 1))


def test_a_saved_calibrated_clone_is_loaded_with_the_same_bits(stage, net, tmp_path):
    pnc.calibrate(net, stage.support)
    for index, name in enumerate(net.clones):
        taken = net.clone(name)
        assert not taken.branch.scalars.is_identity
        for clone, file in ((taken, "calibrated"), (stage.clones[index], "plain")):
            pnc.save(clone, tmp_path / file)
        calibrated, plain = (pnc.inspect(tmp_path / file)["n_values"] for file in ("calibrated", "plain"))
        rivals = taken.branch.rivals.numel()
        assert calibrated == plain + 1 + len(taken.classes) + rivals
        loaded = pnc.load(tmp_path / "calibrated", source=stage.sources[index])
        assert loaded.branch.scalars == taken.branch.scalars
        pnc.save(loaded, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "calibrated").read_bytes()
        with torch.no_grad(), net.only(name):
            assert torch.equal(pnc.attach(net.target, loaded)(stage.images), net(stage.images))
    assert net.detach(stage.clones[0].name) is stage.clones[0], "what comes out is what went in"


def test_without_base_samples_only_offsets_change_and_their_mean_does_not(stage, net):
    rows = stage.support.labels >= N_BASE
    support = pnc.Support(stage.support.images[rows], stage.support.labels[rows], stage.support.names)
    found = pnc.calibrate(net, support)
    assert not found.has_base and found.loss_after < found.loss_before
    assert all(one.scale == 1 for one in found.scalars.values())
    offsets = [offset for one in found.scalars.values() for offset in one.offsets]
    assert any(offsets) and sum(offsets) == pytest.approx(0, abs=1e-6)


def test_some_base_classes_or_unlabelled_images_are_enough(stage, net):
    support = stage.support
    some = support.labels != 1
    found = pnc.calibrate(net, pnc.Support(support.images[some], support.labels[some], support.names))
    assert found.has_base and found.loss_after < found.loss_before
    is_base = support.labels < N_BASE
    new = pnc.Support(support.images[~is_base], support.labels[~is_base], support.names)
    found = pnc.calibrate(net, new, background=support.images[is_base])
    with torch.no_grad():
        seen = net.target(support.images[is_base]).argmax(1)
    labels = torch.cat([new.labels, seen])
    labelled = pnc.Support(torch.cat([new.images, support.images[is_base]]), labels, support.names)
    assert found == pnc.calibrate(net, labelled) and found.n_images == len(labels)


def test_only_enabled_clones_are_calibrated_together(stage, net):
    two = [net.clones[0], net.clones[3]]
    with net.only(*two):
        names = net.classes
        wanted = torch.tensor([name in names for name in stage.support.names])[stage.support.labels]
        place = torch.tensor([names.index(name) if name in names else -1 for name in stage.support.names])
        support = pnc.Support(stage.support.images[wanted], place[stage.support.labels[wanted]], names)
        assert list(pnc.calibrate(net, support).scalars) == two
    assert [row.calibrated for row in net.status()] == [True, False, False, True]
    with net.disabled(), pytest.raises(InputError, match="no clone is enabled"):
        pnc.calibrate(net, stage.support)


def test_a_support_may_come_as_names_in_any_order_as_uint8_or_as_a_loader(stage, net):
    images = (stage.support.images * 255).round().to(torch.uint8)
    names = [stage.support.names[label] for label in stage.support.labels]
    expected = pnc.calibrate(net, pnc.ImageSet(images, stage.support.labels, stage.support.names))
    assert pnc.calibrate(net, (images, names)) == expected
    pairs = list(zip(images, names, strict=True))
    assert pnc.calibrate(net, torch.utils.data.DataLoader(pairs, 7)) == expected


def test_wrong_supports_are_refused(stage, net):
    support = stage.support

    def without(*names):
        rows = torch.tensor([name not in names for name in support.names])[support.labels]
        return pnc.Support(support.images[rows], support.labels[rows], support.names)

    with pytest.raises(InputError, match="no sample of elk, gnu; every class"):
        pnc.calibrate(net, without("elk", "gnu"))
    with pytest.raises(InputError, match="background"):
        pnc.calibrate(net, support, background=torch.rand(3, 1, 9, 9))
    net.detach("gnu")
    with pytest.raises(ClassNameError, match="samples of gnu, which the composite does not know; it knows ant"):
        pnc.calibrate(net, support)


def test_invalid_scalars_are_refused(net):
    n_values = net.clone("dog").branch.rivals.shape[1]
    for scalars, words in (
        (Scalars(0.0), "finite scale above 0"),
        (Scalars(float("nan")), "finite scale"),
        (Scalars(1.0, (float("inf"),)), "finite offsets"),
        (Scalars(1.0, (0.0, 0.0)), "one for each of 1 classes; got 2"),
        (Scalars(rivals=((0.0,), (0.0,))), "rivals: expected at least 2 rows of .* values"),
        (Scalars(rivals=((0.0,) * n_values,)), "rivals: expected at least 2 rows of .* values.* got 1 rows"),
        (Scalars(rivals=((float("nan"),) * n_values,) * 2), "rivals: expected finite values"),
    ):
        with pytest.raises(InputError, match=words):
            net.rescale({"dog": scalars})
    with pytest.raises(InputError, match="no clone 'cow'"):
        net.rescale({"cow": Scalars()})


def test_log_odds_are_relative_to_the_base_and_uncalibrated(stage, net):
    net.rescale({"dog": Scalars(0.5, (1.0,))})
    base, found, features = collect_log_odds(net.now(), stage.images, batch_size=2)
    assert all(one.dtype == torch.float64 and len(one) == len(stage.images) for one in features.values())
    assert base.dtype == torch.float64
    level = stage.base.double().logsumexp(1, keepdim=True)
    for raw, one in zip(stage.alone, found.values(), strict=True):
        torch.testing.assert_close(level + one, raw.double(), atol=1e-3, rtol=1e-4)  # another batch size


def test_infinite_logits_of_an_uncalibrated_clone_stay_infinite(stage, net):
    branch = net.branches[0]
    tensor = torch.full((2, *stage.clones[0].target_cut.shape), 1e38)
    features, logits = torch.full((2, *stage.clones[0].target_features.shape), 1e38), torch.full((2, N_BASE), 1e38)
    with torch.no_grad():
        expected = branch.head_logits(tensor, features, logits)
        assert not expected.isfinite().all()
        assert same_bits(branch(tensor, features, logits), expected)
