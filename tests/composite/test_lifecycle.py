"""The composite as a changing set of clones and as an ordinary module: exact, on tiny networks."""

import contextlib
import copy
import dataclasses
import io
import itertools
import pickle
import shutil
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hazards
import pnc
from pnc.bench import random_lives
from pnc.bench.random_lives import ACTIONS, BASE, GROUPS, Life
from pnc.clones.branch import Scalars
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.graph.nodes import info
from pnc.graph.recording import record
from pnc.models.model_specs import build_model

N_BASE = len(BASE)
NEW = tuple(name for group in GROUPS for name in group)


@pytest.fixture
def net(stage):
    """All four clones attached to a copy of the target."""
    return pnc.attach(copy.deepcopy(stage.target), *stage.clones)


@pytest.fixture(scope="module")
def logits(stage):
    return torch.cat([stage.base, *stage.alone], 1)


def same(net, images, expected):
    with torch.no_grad():
        return torch.equal(net(images), expected)


# ------------------------------------------------------------------------------ what is attached where
def test_status_says_what_is_attached_where_and_what_it_costs(stage, net):
    rows = net.status()
    assert [row.name for row in rows] == [clone.name for clone in stage.clones] == list(net.clones)
    assert [row.classes for row in rows] == list(GROUPS)
    assert len({row.target_cut for row in rows}) > 2, "the stage has clones at several positions"
    assert len({row.target_cut for row in rows}) < 4, "and two at one cut"
    for row, clone in zip(rows, stage.clones, strict=True):
        assert (row.target_cut, row.source_cut) == (clone.target_cut.name, clone.source_cut.name)
        source_macs = record(stage.sources[stage.clones.index(clone)], stage.images)
        total = sum(info(node).n_macs for node in source_macs.module.graph.nodes)
        assert row.n_macs == round(clone.recipe["macs_share"] * total)
        assert row.n_params == clone.n_params
        assert row.n_bytes >= 4 * row.n_params
        assert row.density == 1.0 and row.enabled and not row.calibrated
    twin = pickle.loads(pickle.dumps(net))  # noqa: S301 - our own bytes
    assert twin.status() == rows, "also where the graph's notes are lost"


def test_only_and_disabled_name_the_logits_that_they_give(stage, net, logits):
    first, second, third, _ = net.clones
    x = stage.images
    with torch.no_grad():
        with net.only(third, first):
            assert net.classes == (*BASE, *GROUPS[0], *GROUPS[2]), "in the order of attachment"
            assert torch.equal(net(x), torch.cat([stage.base, stage.alone[0], stage.alone[2]], 1))
            assert [row.enabled for row in net.status()] == [True, False, True, False]
            assert net.clones == tuple(clone.name for clone in stage.clones)
            with net.disabled():
                assert net.classes == BASE
                assert torch.equal(net(x), stage.base)
            with net.only(second):
                assert torch.equal(net(x), torch.cat([stage.base, stage.alone[1]], 1))
            net.detach(third)
            assert net.classes == (*BASE, *GROUPS[0])
            net.attach(stage.clones[2])
            assert torch.equal(net(x), torch.cat([stage.base, stage.alone[0], stage.alone[2]], 1))
        assert net.clones == (first, second, stage.clones[3].name, third)
        with pytest.raises(KeyError), net.disabled():
            raise KeyError
        assert net.classes == (*BASE, *GROUPS[0], *GROUPS[1], *GROUPS[3], *GROUPS[2])
    with pytest.raises(InputError, match=r"no clone 'elk'.*there are dog, elk\+fox"), net.only("elk"):
        pass
    with pytest.raises(InputError, match="at least one clone, or use disabled"), net.only():
        pass


def test_blocks_may_end_in_any_order(stage, net):
    outer, inner = net.only(net.clones[0]), net.disabled()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert net.classes == BASE
    inner.__exit__(None, None, None)
    assert net.classes == (*BASE, *NEW)


def test_names_and_classes_that_clash_can_be_renamed(stage, net, logits):
    dog = stage.clones[0]
    with pytest.raises(InputError, match="'dog' is attached already; .* name="):
        net.attach(dog)
    with pytest.raises(ClassNameError, match="has a class 'dog' already; leave one of the two out"):
        net.attach(dog, name="again")
    net.attach(dog, name="again", rename={"dog": "wolf"})
    assert net.classes == (*BASE, *NEW, "wolf") and net.clones[-1] == "again"
    assert same(net, stage.images, torch.cat([logits, stage.alone[0]], 1))
    assert net.clone("again").classes == ("wolf",)
    assert net.detach("again").classes == ("wolf",)
    assert dog.classes == ("dog",), "the given clone is as it was"
    with pytest.raises(ClassNameError, match="rename: there is no class 'dig' .did you mean 'dog'"):
        net.attach(dog, name="again", rename={"dig": "wolf"})
    with pytest.raises(ClassNameError, match="given twice"):
        stage.clones[1].renamed(classes={"elk": "fox"})
    assert stage.clones[1].renamed(classes={"elk": "fox", "fox": "elk"}).classes == ("fox", "elk")
    with pytest.raises(InputError, match="name: expected printable text"):
        dog.renamed(name="")
    both = pnc.attach(stage.target, dog, dog.renamed("b", {"dog": "wolf"}))
    assert both.classes == (*BASE, "dog", "wolf")
    with pytest.raises(ClassNameError, match="class 'ant' already"):
        net.attach(dog, name="again", rename={"dog": "ant"})


def test_arguments_of_another_type_are_named(stage, net):
    for call in (net.detach, net.clone, net.only):
        with (
            pytest.raises(InputError, match="name: expected the name of a clone; got"),
            contextlib.ExitStack() as block,
        ):
            found = call(["dog"])
            block.enter_context(found)
    with pytest.raises(InputError, match="rename: expected {old: new}; got"):
        net.attach(stage.clones[0], name="again", rename=["dog"])
    with pytest.raises(InputError, match="scalars: expected Scalars; got 1"):
        net.rescale({net.clones[0]: 1})
    with pytest.raises(InputError, match="images: expected a tensor"):
        net(stage.images.numpy())
    for call in (net.refresh, lambda allow_mismatch: net.attach(stage.clones[0], allow_mismatch=allow_mismatch)):
        with pytest.raises(InputError, match="allow_mismatch: expected True or False"):
            call(allow_mismatch="False")


def test_base_priority_comes_off_the_new_logits_alone(stage, net, logits):
    net.base_priority = 1.5
    assert same(net, stage.images, torch.cat([stage.base, logits[:, N_BASE:] - 1.5], 1))
    assert copy.deepcopy(net).base_priority == 1.5
    net.base_priority = 0
    assert same(net, stage.images, logits)
    for wrong in (float("nan"), "1", True, None):
        with pytest.raises(InputError, match="base_priority: expected a finite number"):
            net.base_priority = wrong


def test_a_clone_taken_from_a_composite_is_independent_of_it(stage, net, logits):
    name = net.clones[1]
    taken = net.clone(name)
    for tensor in [*taken.branch.parameters(), *taken.branch.buffers()]:
        tensor.data.zero_()
    assert same(net, stage.images, logits)
    with pytest.raises(InputError, match="no clone 'nobody'"):
        net.clone("nobody")


# ------------------------------------------------------------------------------ composites as networks
def test_a_composite_may_be_a_source_and_may_not_be_a_target(stage, net):
    with pytest.raises(InputError, match="target is a composite already; use its method attach"):
        pnc.attach(net, stage.clones[0])
    target = build_model("zoo:cnn?width=0.25", ("yak", "zebra"), random_lives.SHAPE, seed=9).module
    labels = torch.arange(3).repeat(4)
    images = torch.rand(12, *random_lives.SHAPE, generator=torch.Generator().manual_seed(0))
    support = pnc.Support(images, labels, ("yak", "zebra", "gnu"))
    names = {"source_classes": net.classes, "base_classes": ("yak", "zebra"), "classes": ["gnu"]}
    clone = pnc.clone(net, target, support, effort="seconds", **names)
    assert pnc.attach(target, clone).classes == ("yak", "zebra", "gnu")
    with pytest.raises(InputError, match=r"target is a composite.*clone into its target \(composite.target\)"):
        pnc.clone(target, nn.DataParallel(net), support, source_classes=("yak", "zebra"), base_classes=net.classes)


# ---------------------------------------------------------------------------------- an ordinary module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_bits_and_follow_their_own_target(stage, net, logits, how):
    net.attach(stage.clones[0], name="twice", rename={"dog": "dog 2"})
    net.detach("dog")
    expected = torch.cat([stage.base, *stage.alone[1:], stage.alone[0]], 1)
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net))  # noqa: S301 - our own bytes
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same(twin, stage.images, expected)
    assert twin.classes == net.classes
    with torch.no_grad():
        for parameter in twin.target.parameters():
            parameter.mul_(1.1)
        assert torch.equal(twin(stage.images)[:, :N_BASE], twin.target(stage.images)), "the copy runs its own target"
        assert not torch.equal(twin(stage.images)[:, :N_BASE], stage.base)
    assert same(net, stage.images, expected)
    assert twin.detach("twice").classes == ("dog 2",)


def test_a_copy_made_within_a_block_is_not_caught_in_it(stage, net, logits):
    with net.disabled():
        twin = copy.deepcopy(net)
    assert same(twin, stage.images, logits)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_saved_and_loaded_also_within_another_module(stage, net, logits, assign):
    saved = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    twin = pnc.attach(copy.deepcopy(stage.target), *stage.clones)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert not same(twin, stage.images, logits)
    outer = nn.Sequential(twin)
    outer.load_state_dict({f"0.{name}": tensor for name, tensor in saved.items()}, strict=True, assign=assign)
    assert same(outer, stage.images, logits)
    with torch.no_grad():
        for parameter in twin.target.parameters():
            parameter.mul_(1.1)
        assert torch.equal(twin(stage.images)[:, :N_BASE], twin.target(stage.images))
    with pytest.raises(RuntimeError, match=r"Missing key.*branches\.3"):
        twin.load_state_dict({name: t for name, t in saved.items() if not name.startswith("branches.3")})


def test_the_state_of_a_calibrated_composite_fits_into_one_that_is_not_and_back(stage, net, logits):
    plain = copy.deepcopy(net.state_dict())
    pnc.calibrate(net, stage.support)
    assert any(len(branch.rivals) for branch in net.branches), "or it is easy"
    with torch.no_grad():
        calibrated = net(stage.images)
        twin = pnc.attach(copy.deepcopy(stage.target), *stage.clones)
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(stage.images), calibrated) and not torch.equal(calibrated, logits)
        assert torch.equal(pickle.loads(pickle.dumps(twin))(stage.images), calibrated)  # noqa: S301 - our own bytes
        twin.load_state_dict(plain)
        assert torch.equal(twin(stage.images), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_casts_take_the_target_along(stage, net, logits, dtype):
    net.to(dtype)
    x = stage.images.to(dtype)
    with torch.no_grad():
        found = net(x)
        assert found.dtype == dtype
        assert torch.equal(found[:, :N_BASE], net.target(x))
    assert not torch.equal(found, logits)
    # Features are rounded to the 8 or 11 bits of the dtype, and discriminants amplify that.
    scale = logits.abs().max()
    assert (found.float() - logits).abs().max() < scale * {torch.float64: 1e-4, torch.float16: 0.05}.get(dtype, 0.3)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(buffer.dtype == wanted for buffer in net.branches[0].head.buffers()), "heads keep 32 bits"
    assert net.branches[0].gain.dtype == wanted


def test_casting_to_double_precision_and_back_gives_the_same_bits(stage, net, logits):
    assert same(net.double().float(), stage.images, logits)


def test_channels_last_and_device(stage, net, logits):
    net.to(memory_format=torch.channels_last).to("cpu")
    x = stage.images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(net(x)[:, :N_BASE], net.target(x))
        torch.testing.assert_close(net(x), logits, atol=1e-3, rtol=1e-4)  # kernels differ in the order of sums


def test_a_target_never_leaves_eval_mode_and_its_statistics_never_move(stage):
    target = build_model("zoo:resnet20?width=0.25", BASE, random_lives.SHAPE, seed=4).module
    labels = torch.arange(5).repeat(6)
    images = torch.rand(30, *random_lives.SHAPE, generator=torch.Generator().manual_seed(0))
    support = pnc.Support(images, labels, (*BASE, *GROUPS[1]))
    names = {"source_classes": NEW, "base_classes": BASE, "classes": GROUPS[1]}
    task = pnc.prepare_task(stage.sources[3], target, support, **names)
    found = pnc.scan(task)
    clone = pnc.fit(task, found.adapter(max(found.positions, key=lambda position: position.n_params)))
    before = take_snapshot(target)
    net = pnc.attach(target, clone)
    expected = net(images).detach()
    for parameter in net.branches.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(net.branches.parameters(), lr=1e-3)
    for step in range(100):  # fine-tuning as a user would write it
        net.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        if step % 10 == 0:
            net.eval()
    net.eval()
    assert net.training is False and not any(module.training for module in net.modules())
    assert not torch.equal(net(images)[:, N_BASE:], expected[:, N_BASE:]), "the clone has learned"
    assert torch.equal(net(images)[:, :N_BASE], expected[:, :N_BASE])
    net.train()
    assert net.training and not any(module.training for module in net.modules() if module is not net)
    net.branches.train()
    assert not any(module.training for module in net.branches[0].modules())
    net.detach(clone.name)
    assert differences(target, before) == []


def test_gradients_flow_to_the_images_and_only_where_asked(stage, net):
    x = stage.images.clone().requires_grad_(True)
    net(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in [*net.parameters(), *net.buffers()])
    weight = net.branches[2].stitched.adapter.weight.requires_grad_(True)
    net(stage.images)[:, N_BASE:].square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    others = [tensor for tensor in [*net.parameters(), *net.buffers()] if tensor is not weight]
    assert all(tensor.grad is None for tensor in others)


def test_inference_mode_leaves_nothing_behind(stage, logits):
    target = copy.deepcopy(stage.target)
    with torch.inference_mode():
        net = pnc.attach(target, *stage.clones)
        assert torch.equal(net(stage.images), logits)
        pnc.calibrate(net, stage.support)
    x = stage.images.clone().requires_grad_(True)
    net(x).sum().backward()
    assert x.grad is not None


def test_data_parallel_with_one_device_and_a_refusal_of_more(stage, net, logits):
    assert same(hazards.data_parallel(net), stage.images, logits)
    with pytest.raises(InputError, match="cannot be spread over several devices by DataParallel"):
        net._replicate_for_data_parallel()


def test_distributed_data_parallel(stage, net, logits, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net.target.requires_grad_(False)
        net.branches[1].stitched.body.requires_grad_(True)
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert torch.equal(wrapped(stage.images), logits)
        wrapped(stage.images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.branches[1].stitched.body.parameters())
        wrapped.train()
        assert not any(module.training for module in net.target.modules())
    finally:
        torch.distributed.destroy_process_group()


BACKENDS = ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_follows_attach_detach_and_calibration(stage, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    net = pnc.attach(copy.deepcopy(stage.target), stage.clones[0], stage.clones[1])
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x = stage.images

    def agrees():
        with torch.no_grad():
            found, expected = compiled(x), net(x)
        if backend == "inductor":  # fused kernels round differently
            return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
        return torch.equal(found, expected)

    assert agrees() and net(x).shape[1] == N_BASE + 3
    given = net.detach("dog")
    assert agrees() and net(x).shape[1] == N_BASE + 2
    net.attach(given)
    assert agrees()
    net.rescale({"dog": Scalars(0.5, (1.0,))})
    assert agrees()
    rivals = torch.ones(3, net.branches[1].rivals.shape[1]).cumsum(0).tolist()
    net.rescale({"dog": Scalars(0.5, (1.0,), tuple(map(tuple, rivals)))})
    assert agrees()
    net.base_priority = 2.0
    assert agrees()
    with net.disabled():
        assert agrees()
    assert agrees()
    torch._dynamo.reset()


def test_exported_programs_give_the_same_bits(stage, net, logits):
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(net, (stage.images,), dynamic_shapes=({0: batch},)).module()
        assert torch.equal(program(stage.images), logits)
        assert torch.equal(program(stage.images[:3]), net(stage.images[:3]))


# --------------------------------------------------------------------------------------------- threads
def test_a_call_sees_the_old_or_the_new_set_and_never_a_mixture(stage, net):
    x = stage.images[:2]
    allowed = set()
    with torch.no_grad():
        alone = {clone.name: pnc.attach(stage.target, clone)(x)[:, N_BASE:] for clone in stage.clones}
        base = stage.target(x)
    names = tuple(alone)
    for size in range(len(names) + 1):
        for chosen in itertools.permutations(names, size):
            allowed.add(torch.cat([base, *(alone[name] for name in chosen)], 1).numpy().tobytes())
    strange, calls, stop = [], [0], threading.Event()

    def call():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    found = net(x)
                except Exception as error:  # noqa: BLE001 - a race may raise anything
                    strange.append(repr(error))
                    return
                calls[0] += 1
                if found.numpy().tobytes() not in allowed:
                    strange.append(tuple(found.shape))
                if net.classes[:N_BASE] != BASE:
                    strange.append(net.classes)
                net.status()

    threads = [threading.Thread(target=call) for _ in range(3)]
    deadline = time.monotonic() + 120  # long, for busy machines, but ends a hang
    for thread in threads:
        thread.start()
    try:
        for round_ in itertools.count():
            if strange or (round_ >= 40 and calls[0] > 30) or time.monotonic() > deadline:
                break
            given = net.detach(names[round_ % len(names)])
            with net.disabled():
                pass
            net.attach(given)
            with net.only(names[(round_ + 1) % len(names)]):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not strange
    assert calls[0] > 30


def test_threads_that_attach_at_once_all_succeed(stage):
    net = pnc.attach(copy.deepcopy(stage.target), stage.clones[0])

    def attach_and_detach(clone):
        for _ in range(10):
            net.attach(clone)
            net.detach(clone.name)
        net.attach(clone)

    threads = [threading.Thread(target=attach_and_detach, args=[clone]) for clone in stage.clones[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(net.clones) == {clone.name for clone in stage.clones}
    expected = dict(zip((clone.name for clone in stage.clones), stage.alone, strict=True))
    assert same(net, stage.images, torch.cat([stage.base, *(expected[name] for name in net.clones)], 1))


# ---------------------------------------------------------------------------------------- random lives
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), max_size=8)


@settings(max_examples=15, deadline=None)
@given(steps=STEPS)
def test_every_promise_holds_after_every_step(stage, tmp_path_factory, steps):
    live(stage, tmp_path_factory, steps)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(steps=STEPS)
def test_every_promise_holds_in_a_thousand_random_sequences(stage, tmp_path_factory, steps):
    live(stage, tmp_path_factory, steps)


def live(stage, tmp_path_factory, steps):
    life = Life(stage, tmp_path_factory.getbasetemp())
    for action, index in steps:
        life.step(action, index)
    life.end()
    assert life.problems == []


def test_a_broken_promise_is_noticed(stage, tmp_path):
    life = Life(stage, tmp_path)
    life.step("attach", 0)
    next(iter(life._net.branches[1].buffers())).data.add_(1)
    life.step("disable", 0)
    assert any("clone 1: other logits" in problem for problem in life.problems)
    life = Life(dataclasses.replace(stage, target=copy.deepcopy(stage.target)), tmp_path)
    life.stage.target.train()
    life.end()
    assert any("training flag" in problem for problem in life.problems)
