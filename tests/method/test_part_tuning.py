from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import pnc
from digits import BASE, NEW, pair, support
from pnc.data.image_set import class_subset
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method import part_tuning
from pnc.method.held_out import unscored
from pnc.method.localization.aim import Aim
from pnc.method.localization.inner_tensors import InnerTensors
from pnc.method.localization.localizer import localize
from pnc.method.localization.training_precision import training_autocast
from pnc.method.part_tuning import tune_part


@cache
def scanned():
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names())
    return task, pnc.scan(task)


@cache
def thinned(density=0.3):
    task, found = scanned()
    fitted = found.adapter(next(p for p in found.positions if p.is_exact))
    return task, fitted, localize(task, fitted.adapter, density, "taylor")


def distance(task, fitted, part):
    """Return the loss between a part's outputs and the source's own answers to the support."""
    aim, images = Aim(task), task.samples.images[:]
    with torch.no_grad():
        return float(aim.loss(part(fitted.adapter(images)), aim.answers(images)))


@pytest.mark.parametrize(("tune", "n_steps"), [("weights", 30), ("low-rank", 60)])
def test_a_tuned_part_is_closer_to_the_source_and_reproducible(tune, n_steps, monkeypatch):
    monkeypatch.setattr(part_tuning, "N_STEPS", n_steps)
    task, fitted, part = thinned()
    before, state = take_snapshot(pair().source.module), torch.get_rng_state()
    reports = []
    one, two = (tune_part(task, fitted, part, tune, progress=lambda *step: reports.append(step)) for _ in range(2))
    assert distance(task, fitted, one.part.module) < 0.8 * distance(task, fitted, part.module)
    for name, tensor in one.part.module.state_dict().items():
        assert torch.equal(tensor, two.part.module.state_dict()[name])
    assert differences(pair().source.module, before) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert reports[:n_steps] == [("tuning the part", step, n_steps) for step in range(1, n_steps + 1)]
    assert (one.part.deltas.rank.numel() > 0) == (tune == "low-rank")


def test_the_scored_copy_has_not_seen_its_fold(monkeypatch):
    """Other images in that fold change the part, but not the copy."""
    nets, parts = pair(), []
    for other in (False, True):
        images = support()
        task = pnc.prepare_task(nets.source.module, nets.target.module, images, classes=NEW, **nets.names())
        rows = (task.samples.folds == 0).nonzero().flatten()
        if other:
            store = task.samples.images._store
            for number in task.samples.groups[rows].tolist():
                store._blocks[0].tensor[number] = torch.rand(store.shape)
        found = pnc.scan(task)
        fitted = found.adapter(next(p for p in found.positions if p.is_exact))
        part = localize(task, fitted.adapter, 0.5, "taylor")
        # variances are those of all images
        monkeypatch.setattr(part_tuning, "InnerTensors", lambda task, *given: InnerTensors(unscored(task), *given))
        parts.append((part.masks, tune_part(task, fitted, part, "weights").part))
    (mask, one), (other_mask, two) = parts
    assert torch.equal(mask.flat, other_mask.flat)
    same, different = (
        [torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)]
        for first, second in ((one.held_out, two.held_out), (one.module, two.module))
    )
    assert all(same) and not all(different)


def test_statistics_stay_once_they_are_fixed():
    task, fitted, part = thinned()
    tuned = tune_part(task, fitted, part, "weights").part
    held_out = dict(tuned.held_out.named_buffers())
    changed = 0
    for name, buffer in tuned.module.named_buffers():
        assert torch.equal(buffer, held_out[name])
        changed += not torch.equal(buffer, part.module.get_buffer(name))
    assert changed
    weights = zip(tuned.module.parameters(), tuned.held_out.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in weights), "the last steps used all images"


def test_a_part_that_imitates_the_source_has_the_head_of_the_whole_source():
    task, fitted, _ = thinned()
    whole, part, untuned = (
        pnc.fit(task, fitted, **settings)
        for settings in ({}, {"density": 0.5, "tune": "weights"}, {"density": 0.5, "tune": "none"})
    )
    state = whole.branch.head.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in part.branch.head.state_dict().items())
    assert not all(torch.equal(state[name], tensor) for name, tensor in untuned.branch.head.state_dict().items())
    assert part.recipe["score"] != whole.recipe["score"]


def test_adapters_are_tuned_along_with_the_part():
    task, found = scanned()
    fitted = found.adapter(min((p for p in found.positions if not p.is_exact), key=lambda p: p.n_macs))
    tuned = tune_part(task, fitted, localize(task, fitted.adapter, 1.0), "weights")
    assert not torch.equal(tuned.fitted.adapter.weight, fitted.adapter.weight)
    assert not torch.equal(tuned.fitted.adapter.weight, tuned.scored.adapter.weight)
    assert tuned.fitted.adapter.weight.grad is None and not tuned.fitted.adapter.weight.requires_grad


def test_grouped_convolutions_are_trained_in_float32():
    task = replace(thinned()[0], precision="bfloat16")
    maps, weight = torch.rand(2, 4, 8, 8), torch.rand(4, 1, 3, 3, requires_grad=True)
    with training_autocast(task):
        inner = torch.conv2d(maps, torch.rand(4, 4, 1, 1))
        outputs = [
            nn.Conv2d(4, 4, 3, groups=2)(inner),
            torch.conv2d(inner, weight, groups=4),
            nn.functional.conv2d(inner, weight, None, 1, 0, 1, 4),
        ]
    assert inner.dtype == torch.bfloat16
    assert [output.dtype for output in outputs] == [torch.float32] * 3
    outputs[1].sum().backward()
    assert weight.grad.dtype == torch.float32


def test_the_source_answers_in_batches_of_the_task():
    task = thinned()[0]
    few, images = replace(task, batch_size=7), task.samples.images[:20]
    one, two = (Aim(each).answers(images) for each in (task, few))
    assert torch.allclose(one.features, two.features, atol=1e-5) and len(two.features) == 20
    assert torch.allclose(one.logits, two.logits, atol=1e-4)


def test_the_default_tuning_depends_on_the_allowed_bytes():
    task, found = scanned()
    fitted = found.adapter(next(p for p in found.positions if p.is_exact))
    sizes = {}
    for tune in ("weights", "low-rank", None):
        made = pnc.fit(task, fitted, density=0.5, tune=tune)
        sizes[tune] = part_tuning.tuned_bytes(
            task, fitted.adapter, made.branch.stitched.body, part_tuning.RANK if tune == "low-rank" else None
        )
        assert made.recipe["tune"] == (tune or "weights")
    for room, tune in (
        (sizes["weights"], "weights"),
        (sizes["weights"] - 1, "low-rank"),
        (sizes["low-rank"] - 1, None),
    ):
        assert pnc.fit(task, fitted, density=0.5, max_bytes=room).recipe.get("tune") == tune
    assert "tune" not in pnc.fit(task, fitted).recipe, "the source itself has nothing to tune"


@pytest.mark.filterwarnings("ignore::pnc.PNCWarning")  # the source knows nothing
def test_without_batch_norms_no_norms_are_tuned():
    nets = pair()
    hidden = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
    source = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, len(nets.source.classes)))
    settings = {"density": 0.5, "method": "taylor", "tune": "norms"}
    made = pnc.clone(source, nets.target.module, support(), **settings, **nets.names())
    assert made.masks is not None and "tune" not in made.recipe


@pytest.mark.parametrize("tune", ["weights", "low-rank", "norms", "none", None])
def test_a_file_larger_than_allowed_is_refused_before_the_work(tune, tmp_path, monkeypatch):
    task, fitted, _ = thinned()
    with monkeypatch.context() as patch:
        patch.setattr(part_tuning, "N_STEPS", 2)
        made = pnc.fit(task, fitted, density=0.5, tune=tune or "none", method="taylor")
    n_bytes = pnc.save(made, tmp_path / "clone")
    monkeypatch.setattr(part_tuning._Path, "walk", None)
    with pytest.raises(
        InputError, match="max_bytes=.*: the file of a part of density 0.* is estimated at up to"
    ) as told:
        pnc.fit(task, fitted, density=0.5, tune=tune, method="taylor", max_bytes=n_bytes - 1)
    assert ("tune=" in str(told.value)) == (tune not in (None, "none"))  # effort="seconds" means "none" too
    estimate = int(str(told.value).partition("up to ")[2].split()[0])
    assert n_bytes <= estimate < n_bytes + 4000


def test_a_whole_part_behind_a_fitted_adapter_needs_no_room_for_statistics():
    task, found = scanned()
    position = min((p for p in found.positions if not p.is_exact), key=lambda p: p.n_macs)
    fitted = found.adapter(position)
    for settings in ({"tune": "none"}, {"refine": True}):
        assert pnc.fit(task, fitted, max_bytes=position.n_bytes, **settings).masks is None
    _, exact, _ = thinned()
    with pytest.raises(InputError, match="max_bytes=100: the file of a part"):
        pnc.fit(task, exact, density=0.5, method="taylor", refine=True, max_bytes=100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune": "all"}, "tune: expected one of weights, low-rank, norms, none; got 'all'"),
        ({"tune": "weights", "refine": True}, "refine: tune='weights' already tunes the adapter"),
        ({"effort": "hours"}, "effort: expected one of seconds, minutes; got 'hours'"),
        ({"prefer": "big"}, "prefer: expected one of accuracy, balanced, small; got 'big'"),
        ({"prefer": "small", "density": 0.5}, "prefer: 'small' chooses the density, which density=0.5 fixes"),
        ({"prefer": "accuracy", "effort": "seconds"}, "prefer: 'accuracy' chooses .* which effort='seconds' fixes"),
        ({"effort": "seconds", "tune": "norms"}, "'seconds' is closed form only, but tune='norms' trains"),
        ({"effort": "seconds", "method": "gates"}, "but method='gates' trains by gradient; drop one"),
        ({"strategy": "sequential", "tune": "weights"}, "tune: strategy='sequential' tunes only"),
    ],
)
def test_contradicting_settings_are_refused(settings, words):
    nets = pair()
    with pytest.raises(InputError, match=words):
        pnc.clone(nets.source.module, nets.target.module, support(), **nets.names(), **settings)


def test_views_are_crops_and_mixtures_of_the_images():
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(12):
        views = part_tuning._views(images, generator)
        assert views.shape == images.shape
        inner = views[:, :, 4:12, 4:12]
        shifted = [images[:, :, 4 + y : 12 + y, 4 + x : 12 + x] for y in range(-2, 3) for x in range(-2, 3)]
        is_crop = torch.stack([(inner == one).flatten(1).all(1) for one in shifted]).any(0)
        seen.add(bool(is_crop.all()))
    assert seen == {True, False}, "half of the batches are mixed"


def test_few_images_fill_a_batch():
    draws = part_tuning._draws(5, torch.Generator().manual_seed(0))
    for _ in range(3):
        rows = next(draws)
        assert len(rows) == part_tuning.BATCH_SIZE
        assert set(rows.bincount().tolist()) <= {12, 13, 14}


def test_a_part_that_forgets_classes_has_a_head_of_its_own():
    """Its features differ from the source's, so the head of the whole source would not fit."""
    nets, some = pair(), NEW[:2]
    images = pnc.draw_support(pnc.load_data("digits", "train"), some, BASE, n_new=20, n_base=5)
    task = pnc.prepare_task(nets.source.module, nets.target.module, images, classes=some, **nets.names())
    found = pnc.scan(task)
    fitted = found.adapter(next(p for p in found.positions if p.is_exact))
    whole, part = pnc.fit(task, fitted), pnc.fit(task, fitted, density=0.5, tune="weights")
    heads = (made.branch.head.discriminants.weight for made in (whole, part))
    assert not torch.equal(*heads)
    test = class_subset(pnc.load_data("digits", "test"), [*BASE, *some])
    accuracies = []
    for made in (whole, part):
        net = pnc.attach(nets.target.module, made)
        accuracies.append(pnc.evaluate(net, test).average_accuracy)
        net.detach(made.name)
    assert accuracies[1] > accuracies[0] - 0.05
