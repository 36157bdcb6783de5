from functools import cache

import pytest
import torch

import pnc
from digits import BASE, NEW, held_out_images, pair, support
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import class_subset, select
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method import part_tuning, refinement
from pnc.method.refinement import Schedule


def accuracy(clone, classes=NEW):
    test = held_out_images(classes)
    target = pair().target.module
    with torch.no_grad():
        return measure_logits(pnc.attach(target, clone)(test.images), test.labels, target(test.images))


def clone(**settings):
    nets = pair()
    data = settings.pop("support", None) or support()
    if settings.get("density", "auto") == "auto":
        settings = {"effort": "seconds", **settings}
    return pnc.clone(nets.source.module, nets.target.module, data, **nets.names(), **settings)


def test_new_digits_are_recognised_and_old_ones_keep_their_answers():
    found = accuracy(clone())
    assert found.average_accuracy >= 0.94
    assert found.conditional_kl <= 1e-6
    assert found.base_drop <= 0.08


def test_neither_network_nor_the_random_state_is_touched():
    nets = pair()
    nets.source.module.train()
    try:
        before = [take_snapshot(nets.source.module), take_snapshot(nets.target.module)]
        state = torch.get_rng_state()
        clone(density=0.5)
        assert torch.equal(torch.get_rng_state(), state)
        assert differences(nets.source.module, before[0]) == []
        assert differences(nets.target.module, before[1]) == []
    finally:
        nets.source.module.eval()


def test_without_base_samples_the_clone_still_works():
    found = accuracy(clone(support=support(n_base=0)))
    assert found.average_accuracy >= 0.85
    assert found.conditional_kl <= 1e-6


@cache
def scanned():
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names())
    return task, pnc.scan(task)


def at_the_input(**settings):
    """A clone of the whole source, which has channels to remove."""
    task, found = scanned()
    position = next(p for p in found.positions if p.is_exact)
    return pnc.fit(task, found.adapter(position), **settings)


@pytest.mark.parametrize("method", ["taylor", "magnitude", "random"])
def test_a_lower_density_makes_the_clone_smaller_and_cheaper(method):
    full, half = at_the_input(), at_the_input(density=0.5, method=method)
    assert half.masks is not None
    assert 0.45 < half.recipe["density"] <= 0.5
    assert half.n_params < 0.8 * full.n_params
    assert half.recipe["macs_share"] < 0.7 * full.recipe["macs_share"]
    found = accuracy(half)
    assert found.average_accuracy > 0.8  # far above the .1 of chance for any choice of channels
    assert abs(half.recipe["score"] - found.average_accuracy) < 0.1


def test_if_nothing_can_be_removed_the_clone_is_whole_and_its_recipe_says_so():
    task, found = scanned()
    position = min(found.positions, key=lambda p: p.n_macs)
    whole = pnc.fit(task, found.adapter(position), density=0.5)
    assert whole.masks is None
    assert whole.recipe["density"] == 1.0


def test_one_class_out_of_five():
    one = clone(classes=("7",), support=support(classes=("7",)))
    assert one.name == "7"
    found = accuracy(one, ("7",))
    assert found.new_accuracy >= 0.9
    assert found.base_drop <= 0.05


def test_a_bound_on_macs_is_kept_or_refused():
    nets = pair()
    cheap = clone(max_macs=0.3)
    assert cheap.recipe["macs_share"] <= 0.3
    with pytest.raises(InputError, match="cheapest position adds"):
        clone(max_macs=1e-9)
    assert nets.target.classes == BASE


@pytest.mark.parametrize("density", [0, -1, 1.01])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(InputError, match="density: expected a share"):
        clone(density=density)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"round_to": 0}, "round_to"),
        ({"round_to": 1.5}, "round_to"),
        ({"max_macs": "half"}, "max_macs: expected a share"),
    ],
)
def test_values_that_are_not_numbers_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        clone(**settings)


def test_the_callers_torch_settings_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(0.001, 6, 3))  # as many kinds of operations in fewer steps

    def saved():
        made = clone(max_macs=0.9, refine=True, density=0.7, method="taylor")
        pnc.save(made, tmp_path / "clone")
        return (tmp_path / "clone").read_bytes()

    expected = saved()
    with torch.autocast("cpu", torch.bfloat16):
        assert saved() == expected
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert saved() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert saved() == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["", "a\nb", "n" * 1001])
def test_names_must_be_printable(name):
    with pytest.raises(InputError, match="name: expected printable"):
        clone(name=name)


def test_a_score_counts_labelled_base_images_only():
    nets, given = pair(), support()
    answers = {}
    for name, labels in (
        ("right", given.labels),
        ("wrong", torch.where(given.labels < 5, 4 - given.labels, given.labels)),
    ):
        task = pnc.prepare_task(
            nets.source.module,
            nets.target.module,
            (given.images, [given.names[label] for label in labels]),
            classes=None,
            background=class_subset(load_data("digits"), BASE).images[:100],
            **nets.names(),
        )
        answers[name] = {position.names: position.score for position in pnc.scan(task, max_cuts=2).positions}
    for position, score in answers["wrong"].items():  # only the middle class of five is right where labels are mirrored
        assert score < answers["right"][position] - 0.2


def test_background_images_do_the_work_of_base_samples():
    given = support(n_base=0)
    labels = [given.names[label] for label in given.labels]
    unlabelled = class_subset(load_data("digits"), BASE)
    first = select(unlabelled, torch.arange(100))
    nets, test = pair(), held_out_images()
    clones = {
        name: pnc.clone(
            nets.source.module, nets.target.module, (given.images, labels), **nets.names(), background=images
        )
        for name, images in (("without", None), ("with", unlabelled.images[:100]), ("set", first))
    }
    scores = {}
    for name, clone in clones.items():
        with torch.no_grad():
            logits = pnc.attach(nets.target.module, clone)(test.images)
        scores[name] = measure_logits(logits, test.labels, logits[:, :5]).average_accuracy
    assert scores["with"] == scores["set"]
    assert min(scores["with"], scores["without"]) >= 0.94
    assert clones["with"].target_features != clones["without"].target_features
    assert clones["with"].recipe["n_background_samples"] == 100
    assert clones["with"].recipe["n_base_samples"] == 0


def prepared(classes=NEW, n_new=8):
    nets = pair()
    data = support(n_new, 4, classes)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=classes, **nets.names())


@pytest.mark.parametrize(("classes", "n_new"), [(NEW, 8), (NEW, 1), (NEW[:2], 17)])
def test_adapters_of_another_task_are_refused(classes, n_new):
    found = pnc.scan(prepared(classes, n_new), max_cuts=2)
    with pytest.raises(InputError, match="from the scan of another task"):
        pnc.fit(prepared(), found.adapter(found.choose()))


def test_densities_whose_file_would_be_too_large_are_left_out(monkeypatch):
    monkeypatch.setattr(part_tuning, "N_STEPS", 3)
    given = {"density": "auto", "tune": "weights", "effort": "minutes"}
    with pytest.raises(InputError, match="estimated at up to"):
        clone(**{**given, "density": 0.5}, max_bytes=40_000)
    made = clone(**given, max_bytes=40_000)
    assert not any(abs(density - 0.5) < 0.02 for _, density, _, _ in made.recipe["front"])
    assert any(is_made for *_, is_made in made.recipe["front"])
