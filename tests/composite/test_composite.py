import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pnc
from digits import BASE, NEW, held_out_images, network, pair, support
from pnc.foundation.errors import ClassNameError, InputError, MismatchError
from pnc.foundation.network_state import differences, take_snapshot

SHARED = {}


def clone_of(classes, name=None):
    """One clone per set of classes, cached: these tests are not about making clones."""
    if classes not in SHARED:
        nets = pair()
        names = nets.names()
        data = support(classes=classes)
        chosen = {"classes": classes, "name": name, "effort": "seconds"}
        SHARED[classes] = pnc.clone(nets.source.module, nets.target.module, data, **chosen, **names)
    return SHARED[classes]


def images(n: int = 40) -> torch.Tensor:
    return held_out_images().images[:n]


def target() -> torch.nn.Module:
    return pair().target.module


def test_base_logits_are_the_targets_bits_and_new_ones_follow():
    net = pnc.attach(target(), clone_of(NEW))
    x = images()
    with torch.no_grad():
        logits, base = net(x), target()(x)
    assert logits.shape == (40, 10)
    assert torch.equal(logits[:, :5], base)
    assert net.classes == (*BASE, *NEW)
    for n in (1, 3):  # batch sizes that may use different matrix-product kernels
        assert torch.equal(net(x[:n])[:, :5], target()(x[:n]))


def test_the_target_is_as_it_was_through_attach_use_and_detach():
    model = copy.deepcopy(target())
    model.train()
    model[0].eval() if isinstance(model, torch.nn.Sequential) else None
    before = take_snapshot(model)
    net = pnc.attach(model, clone_of(NEW))
    net.train()
    net(images())
    net.eval()
    net.detach(clone_of(NEW).name)
    assert differences(model, before) == []


def test_a_target_in_training_mode_still_answers_as_in_eval_mode_and_keeps_its_statistics():
    model = copy.deepcopy(target())
    with torch.no_grad():
        expected = model(images())
    model.train()
    before = take_snapshot(model)
    assert torch.equal(pnc.attach(model, clone_of(NEW))(images())[:, :5], expected)
    assert differences(model, before) == []


def test_train_never_reaches_target_or_clone():
    net = pnc.attach(copy.deepcopy(target()).eval(), clone_of(NEW))
    net.train()
    assert net.training
    assert not any(module.training for module in net.modules() if module is not net)


CLASSES = [("5", "6"), ("7",), ("8", "9")]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["attach", "detach", "disable"]), st.integers(0, 2)), max_size=8))
def test_any_order_of_attaching_and_detaching_gives_the_same_logits_per_clone(steps):
    model, x = target(), images(6)
    before = take_snapshot(model)
    with torch.no_grad():
        base = model(x)
        alone = {c: pnc.attach(model, clone_of(c))(x)[:, 5:] for c in CLASSES}
        net = pnc.attach(model, clone_of(CLASSES[0]))
        attached = [CLASSES[0]]
        for step, index in steps:
            chosen = clone_of(CLASSES[index])
            if step == "attach" and CLASSES[index] not in attached:
                net.attach(chosen)
                attached.append(CLASSES[index])
            elif step == "detach" and CLASSES[index] in attached:
                assert net.detach(chosen.name) is chosen
                attached.remove(CLASSES[index])
            elif step == "disable":
                with net.disabled():
                    assert torch.equal(net(x), base)
            assert torch.equal(net(x), torch.cat([base, *(alone[c] for c in attached)], 1))
            assert net.classes == (*BASE, *(name for c in attached for name in c))
            assert net.clones == tuple(clone_of(c).name for c in attached)
    assert differences(model, before) == []


def test_a_clone_is_copied_when_attached():
    clone = clone_of(NEW)
    net = pnc.attach(target(), clone)
    for tensor in [*net.branches.parameters(), *net.branches.buffers()]:
        tensor.data.zero_()
    assert clone.branch.head.own.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda x: torch.nn.functional.interpolate(x, (16, 16)), r"\(1, 16, 16\) float32"),
        (lambda x: x.double(), r"\(1, 8, 8\) float64"),
        (lambda x: (x * 255).byte(), r"\(1, 8, 8\) uint8"),
        (lambda x: x[0], r"\(8, 8\) float32"),
    ],
)
def test_images_that_the_target_may_treat_otherwise_are_refused(change, came):
    wrapped = pnc.Preprocessed(target(), (1, 8, 8))  # takes any size and resizes if necessary
    nets = pair()
    clone = pnc.clone(nets.source.module, wrapped, support(), effort="seconds", **nets.names())
    net = pnc.attach(wrapped, clone)
    fast, other = net.fused(), change(images(5))
    for call in (net, fast, net.now().log_odds):
        with pytest.raises(InputError, match=f"like those that its clones were made with.*{came}"):
            call(other)
    if other.dtype == torch.float32:
        with pytest.raises(InputError, match="like those|non-empty tensor"):
            pnc.calibrate(net, (other, NEW))
    with net.disabled(), pytest.raises(InputError, match="images"):
        net(other)
    assert torch.equal(net(images(4))[:, :5], wrapped(images(4)))


def test_arguments_that_are_not_networks_or_clones_are_refused():
    clone = clone_of(("5", "6"))
    with pytest.raises(InputError, match="target: expected a torch.nn.Module, got OrderedDict"):
        pnc.attach(target().state_dict(), clone)
    with pytest.raises(InputError, match="clones: expected what pnc.clone or pnc.load returns, one by one; got list"):
        pnc.attach(target(), [clone])
    with pytest.raises(InputError, match="net: expected a composite"):
        pnc.calibrate(target(), support())
    with pytest.raises(InputError, match="target: expected"):
        pnc.snapshot(pair().target)


def test_clones_must_use_the_same_names_of_base_classes():
    other = replace(clone_of(("7",)), base_classes=("1", "0", "2", "3", "4"))
    net = pnc.attach(target(), clone_of(("5", "6")))
    with pytest.raises(ClassNameError, match="calls the target's outputs 1, 0, 2, 3, 4, here they are 0, 1, 2, 3, 4"):
        net.attach(other)
    assert net.clones == ("5+6",)


def test_a_shallow_copy_attaches_and_detaches_independently():
    net = pnc.attach(target(), clone_of(("5", "6")))
    twin = copy.copy(net)
    twin.detach("5+6")
    assert twin.classes == BASE and net.classes == (*BASE, "5", "6")
    net.attach(clone_of(("7",)))
    assert len(net.status()) == 2 and twin.status() == ()


def test_the_callers_autocast_does_not_reach_the_fused_form():
    net, x = pnc.attach(target(), clone_of(NEW)), images(8)
    with torch.autocast("cpu", torch.bfloat16):
        fast = net.fused()
    with torch.no_grad():
        assert torch.equal(fast(x), net.fused()(x))


def test_attaching_to_other_weights_names_the_tensor_that_differs():
    other = copy.deepcopy(target())
    last = list(other.state_dict())[-1]
    other.state_dict()[last].add_(1)
    with pytest.raises(MismatchError, match=f"another target: the values of '{last}' differ"):
        pnc.attach(other, clone_of(NEW))
    with pytest.raises(MismatchError, match="another architecture"):
        pnc.attach(network(BASE, "zoo:cnn?width=0.5").module, clone_of(NEW))


def test_a_changed_target_is_noticed_when_another_clone_is_attached():
    model = copy.deepcopy(target())
    net = pnc.attach(model, clone_of(("5", "6")))
    list(model.parameters())[-1].data.view(-1)[0] += 1e-3
    with pytest.raises(MismatchError, match="another target: the values of"):
        net.attach(clone_of(("7",)))


def test_names_that_clash_or_are_unknown_are_errors():
    net = pnc.attach(target(), clone_of(("5", "6")))
    with pytest.raises(InputError, match=r"'5\+6' is attached already"):
        net.attach(clone_of(("5", "6")))
    nets = pair()
    again = pnc.clone(
        nets.source.module,
        target(),
        support(classes=("6",)),
        classes=("6",),
        name="again",
        effort="seconds",
        **nets.names(),
    )
    with pytest.raises(ClassNameError, match="class '6' already"):
        net.attach(again)
    with pytest.raises(InputError, match=r"no clone '7'; there are 5\+6"):
        net.detach("7")
    with pytest.raises(InputError, match="at least one"):
        pnc.attach(target())
    with pytest.raises(InputError, match="composite already"):
        pnc.attach(net, clone_of(("7",)))


def test_double_precision_and_back():
    model = copy.deepcopy(target())
    net = pnc.attach(model, clone_of(NEW)).double()
    x = images().double()
    with torch.no_grad():
        assert torch.equal(net(x)[:, :5], model(x))
        # float64 against float32 arithmetic of the same network
        torch.testing.assert_close(net(x).float(), pnc.attach(target(), clone_of(NEW))(x.float()), atol=1e-2, rtol=1e-3)


def test_deepcopy_is_independent_and_state_dict_lists_each_tensor_once():
    net = pnc.attach(copy.deepcopy(target()), clone_of(NEW))
    x = images(4)
    with torch.no_grad():
        expected = net(x)
        twin = copy.deepcopy(net)
        for tensor in net.state_dict().values():
            tensor.zero_()
        assert torch.equal(twin(x), expected)
        assert not torch.equal(net(x), expected)
    names = list(net.state_dict())
    assert len({tensor.data_ptr() for tensor in net.state_dict().values() if tensor.numel()}) == len(
        [name for name in names if net.state_dict()[name].numel()]
    )
    assert {name.split(".")[0] for name in names} == {"target", "branches"}


def test_changes_of_the_target_are_followed():
    model = copy.deepcopy(target())
    net = pnc.attach(model, clone_of(NEW))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        assert torch.equal(net(images())[:, :5], model(images()))
