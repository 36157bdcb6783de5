import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pnc
from digits import BASE, NEW, held_out_images, pair, support
from pnc.composite.metrics import measure_logits, shifted
from pnc.data.image_set import select
from pnc.foundation.errors import InputError
from pnc.method.base_drop_bound import check_promise, least_priority

N_BASE = 3


def lost(logits, labels, groups, nats):
    """Count lost images one by one: each copy of an image counts as a fraction."""
    moved, total = shifted(logits, N_BASE, -nats), 0.0
    for image in groups[labels < N_BASE].unique():
        rows = (groups == image).nonzero().flatten()
        alone = logits[rows, :N_BASE].argmax(1) == labels[rows]
        total += float((alone & (moved[rows].argmax(1) != labels[rows])).double().mean())
    return total


@given(st.integers(0, 2**31), st.integers(20, 60), st.sampled_from([0.05, 0.1, 0.3]))
def test_it_is_the_smallest_shift_that_keeps_the_bound_with_one_more_lost_image(seed, n, bound):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * n, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (n,), generator=generator)
    labels[:20] = labels[:20] % N_BASE
    labels, groups = labels.repeat(2), torch.arange(n).repeat(2)
    n_base_images = int((labels < N_BASE).sum()) // 2
    nats = least_priority(logits, labels, groups, N_BASE, bound)
    allowed = math.floor(bound * (n_base_images + 1) - 1 + 1e-9)
    assert lost(logits, labels, groups, nats + 1e-9) <= allowed
    assert nats == 0 or lost(logits, labels, groups, nats - 1e-6) > allowed


def test_nothing_is_lowered_if_no_image_is_lost():
    logits = torch.tensor([[5.0, 0, 0, 1]]).repeat(60, 1).double()
    assert least_priority(logits, torch.zeros(60, dtype=torch.long), torch.arange(60), N_BASE, 0.05) == 0


def test_a_bound_that_needs_more_images_is_refused_with_both_ways_out():
    text = "are too few to verify that; give at least 49 (labelled, or as background), or allow 0.091 or more"
    with pytest.raises(InputError, match=re.escape(text)):
        check_promise(0.02, 10, 10)
    check_promise(0.02, 49, 49)


def test_images_that_do_not_fit_into_memory_are_counted_before_the_work():
    text = "only 28 of 100 base images fit into memory=, too few to verify that; allow more memory, or allow 0.034 or"
    with pytest.raises(InputError, match=re.escape(text)):
        check_promise(0.02, 100, 28)
    nets, data = pair(), support(60, 20)
    task = pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names())
    found = pnc.scan(task, max_cuts=2)
    with pytest.raises(InputError, match="fit into memory="):
        pnc.fit(replace(task, memory=2**18), found.adapter(found.choose()), max_base_drop=0.02)


def test_without_base_images_no_bound_is_offered():
    with pytest.raises(InputError, match=r"or as background\)$"):
        check_promise(0.2, 0, 0)


def unseen_drops(part):
    """Drops on half of the target's test images, without and with a bound, of clones made with the other half."""
    nets, images = pair(), held_out_images(NEW)
    target, base = nets.target.module, (images.labels < len(BASE)).nonzero().flatten()
    new = support(5, 0)
    labels = [images.classes[i] for i in images.labels[base[part::2]]] + [new.names[i] for i in new.labels]
    given_samples = torch.cat([images.images[base[part::2]], new.images]), labels
    free, bounded = (
        pnc.clone(nets.source.module, target, given_samples, effort="seconds", **nets.names(), max_base_drop=bound)
        for bound in (None, 0.02)
    )
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[base[part::2]] = False
    test = select(images, rest.nonzero().flatten())
    with torch.no_grad():
        drops = [
            measure_logits(pnc.attach(target, one)(test.images), test.labels, target(test.images)).base_drop
            for one in (free, bounded)
        ]
    assert drops[1] <= drops[0]
    assert bounded.recipe["max_base_drop"] == 0.02
    assert bounded.recipe["base_priority"] > 0 or drops[1] == drops[0]
    return drops


def test_clones_keep_the_bound_on_unseen_images():
    """Both halves of the target's test images are alike; the bound holds in expectation, so over both."""
    assert sum(unseen_drops(part)[1] for part in (0, 1)) / 2 <= 0.02 + 0.02  # two standard errors of 220 images


def test_without_base_samples_the_bound_is_refused_before_any_work():
    nets, seen = pair(), []
    with pytest.raises(InputError, match="0 base images are too few to verify that"):
        pnc.clone(
            nets.source.module,
            nets.target.module,
            support(20, 0),
            **nets.names(),
            max_base_drop=0.02,
            progress=lambda *step: seen.append(step),
        )
    assert not seen
