"""Recording: every network of `hazards` is recorded exactly or refused with the reason, and is left untouched."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import hazards
from pnc.foundation.errors import InputError, RecordingError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.recording import info, record

# Some networks of `hazards` use old or unfinished parts of PyTorch, as users' networks do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit:DeprecationWarning"),
]


def logits(network, x):
    """The network's own logits, in eval mode."""
    network.eval()
    with torch.no_grad():
        out = network(x.clone())
    out = getattr(out, "logits", out)
    out = out["logits"] if isinstance(out, dict) else out
    return out[0] if isinstance(out, tuple) else out


def everything(network):
    """What `take_snapshot` does not cover: attributes and gradients by identity, plain containers, global state."""
    attributes = {
        (name, key): (id(value), str(value) if isinstance(value, (dict, list, int)) else None)
        for name, module in network.named_modules()
        for key, value in module.__dict__.items()
    }
    attributes |= {name: id(parameter.grad) for name, parameter in network.named_parameters()}
    state = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.is_grad_enabled()
    return attributes, state, nn.Module.__call__


@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_recording_gives_the_same_bits_and_leaves_the_network_alone(name):
    network = hazards.build(hazards.REPRODUCED[name])
    before, rest = take_snapshot(network), everything(network)
    recording = record(network, hazards.images(2))
    assert not differences(network, before)
    assert everything(network) == rest
    assert (recording.input_shape, recording.n_classes) == ((3, 8, 8), hazards.N_CLASSES)
    for size in (2, 5) if name == "SqueezedBatch" else (1, 2, 5):
        x = hazards.images(size, seed=size)
        with torch.no_grad():
            assert same_bits(recording.module(x.clone()), logits(network, x)), size


@pytest.mark.parametrize("name", hazards.REFUSED)
def test_what_cannot_be_reproduced_is_refused_and_left_alone(name):
    factory, reason = hazards.REFUSED[name]
    network = hazards.build(factory)
    if name == "lazy":
        before = None
    else:
        before, rest = take_snapshot(network), everything(network)
    with pytest.raises(RecordingError, match=reason):
        record(network, hazards.images(2))
    if before is not None:
        assert not differences(network, before)
        assert everything(network) == rest


def test_network_is_untouched_when_its_forward_fails_half_way():
    network = hazards.build(hazards.TrainMode)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:  # the warm-up succeeds, the first recording fails
            raise KeyError("half way")

    network.conv.register_forward_pre_hook(fail)
    before, rest = take_snapshot(network), everything(network)
    with pytest.raises(RecordingError, match="cannot process images of shape .* KeyError: 'half way'"):
        record(network, hazards.images(2))
    assert len(calls) == 2
    assert not differences(network, before)
    assert everything(network) == rest


@pytest.mark.parametrize(
    ("example", "found"),
    [
        ("images", "got str"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\) torch.float32"),
        (torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got .* torch.uint8"),
    ],
)
def test_example_is_checked(example, found):
    with pytest.raises(InputError, match=rf"example: expected a floating-point batch .*{found}"):
        record(hazards.build(hazards.Plain), example)


def test_model_is_checked():
    with pytest.raises(InputError, match="model: expected a torch.nn.Module, got function"):
        record(lambda x: x, hazards.images(2))


@pytest.mark.parametrize("n_images", [1, 2, 3, 7])
def test_any_number_of_example_images_will_do(n_images):
    network = hazards.build(hazards.Residual)
    recording = record(network, hazards.images(n_images))
    assert recording.probe.shape == (4, 3, 8, 8)
    assert same_bits(recording.probe_logits, logits(network, recording.probe))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    network = hazards.build(hazards.Residual).to(dtype)
    recording = record(network, hazards.images(2).to(dtype))
    assert recording.probe.dtype == dtype
    x = hazards.images(5, seed=5).to(dtype)
    with torch.no_grad():
        assert same_bits(recording.module(x), logits(network, x))


@pytest.mark.parametrize("name", ["Residual", "VisionTransformer", "ShapeArithmetic", "WrittenThroughView"])
def test_channels_last(name):
    network = hazards.build(hazards.REPRODUCED[name]).to(memory_format=torch.channels_last)
    if name == "WrittenThroughView":  # its `view` fails on this layout, also in the network itself
        with pytest.raises(RecordingError, match="cannot process .* view size is not compatible"):
            record(network, hazards.images(2).contiguous(memory_format=torch.channels_last))
        return
    recording = record(network, hazards.images(2).contiguous(memory_format=torch.channels_last))
    assert recording.probe.is_contiguous(memory_format=torch.channels_last)
    x = hazards.images(5, seed=5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert same_bits(recording.module(x), logits(network, x))


def test_autocast_of_the_caller_is_left_to_the_caller():
    network, x = hazards.build(hazards.Residual), hazards.images(5, seed=5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        recording = record(network, hazards.images(2))
        expected = logits(network, x)
        assert same_bits(recording.module(x), expected)
        assert expected.dtype == torch.bfloat16
    with torch.no_grad():
        assert same_bits(recording.module(x), logits(network, x))


def test_examples_may_be_any_kind_of_tensor():
    network, x = hazards.build(hazards.Residual), hazards.images(5, seed=5)
    expected = logits(network, x)
    for example in (
        hazards.images(2).requires_grad_(),
        nn.Parameter(hazards.images(2)),
        hazards.images(4)[::2].transpose(2, 3),
    ):
        recording = record(network, example)
        assert not recording.probe.requires_grad
        with torch.no_grad():
            assert same_bits(recording.module(x), expected)


# ------------------------------------------------------------------------------------------------------------- wrappers


def refuse_to_compile(module, inputs):
    raise AssertionError("compiled")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch._dynamo")
def test_wrappers_are_taken_off_and_nothing_is_compiled():
    network = hazards.build(hazards.Residual).eval()
    x = hazards.images(5, seed=5)
    expected = logits(network, x)
    inner = hazards.build(hazards.Residual).eval()
    inner.layers[1] = torch.compile(inner.layers[1], backend=refuse_to_compile)
    inner.layers[2].compile(backend=refuse_to_compile)
    inner.stem.forward = torch.compile(inner.stem.forward, backend=refuse_to_compile)
    wrapped = [hazards.data_parallel(network), torch.compile(network, backend=refuse_to_compile), inner]
    wrapped.append(torch.compile(hazards.data_parallel(wrapped[1]), backend=refuse_to_compile))
    for model in wrapped:
        recording = record(model, hazards.images(2))
        with torch.no_grad():
            assert same_bits(recording.module(x), expected)


# -------------------------------------------------------------------------------------------------------------- threads


def test_other_threads_go_their_own_way_while_one_records():
    network, other = hazards.build(hazards.Residual), hazards.build(hazards.VisionTransformer).eval()
    x = hazards.images(2)
    expected, found = logits(other, x), []

    def run_other(module, args):
        thread = threading.Thread(target=lambda: found.append(logits(other, x)))
        thread.start()
        thread.join()

    handle = network.layers.register_forward_pre_hook(run_other)
    original = nn.Module.__call__
    recording = record(network, x)
    handle.remove()
    assert nn.Module.__call__ is original
    assert found
    assert all(same_bits(answer, expected) for answer in found)
    assert {n.op for n in recording.module.graph.nodes if "patches" in n.name} == set()
    with torch.no_grad():
        assert same_bits(recording.module(x), logits(network, x))


def test_networks_are_recorded_by_several_threads_at_once():
    original = nn.Module.__call__
    networks = [
        hazards.build(factory)
        for factory in (hazards.Residual, hazards.VisionTransformer, hazards.Windows, hazards.Hooked)
    ]
    with ThreadPoolExecutor(4) as pool:
        recordings = list(pool.map(lambda network: record(network, hazards.images(2)), networks * 3))
    assert nn.Module.__call__ is original
    x = hazards.images(5, seed=5)
    for network, recording in zip(networks * 3, recordings, strict=True):
        with torch.no_grad():
            assert same_bits(recording.module(x), logits(network, x))


# ----------------------------------------------------------------------------------------------- what a recording holds


def test_nodes_carry_shapes_costs_and_scopes():
    recording = record(hazards.build(hazards.Residual), hazards.images(2))
    nodes = {node.name: info(node) for node in recording.module.graph.nodes}
    assert all("pnc" in node.meta for node in recording.module.graph.nodes)
    facts = nodes["layers_1_conv1"]
    assert (facts.shape, facts.shape3, facts.dtype) == ((2, 6, 4, 4), (3, 6, 4, 4), torch.float32)
    assert (facts.n_macs, facts.n_params, facts.scope) == (9 * 4 * 6 * 16, 9 * 4 * 6, "layers.1.conv1")
    assert nodes["layers_1_add"].writes == nodes["layers_1_norm2"].holds == nodes["layers_1_add"].holds
    assert nodes["tail_2"].n_macs == 6 * hazards.N_CLASSES
    assert sum(facts.n_params for facts in nodes.values()) == sum(p.numel() for p in hazards.Residual().parameters())


@pytest.mark.parametrize(
    "factory", [hazards.AppliedThreeTimes, hazards.SharedModules, hazards.Parametrized, hazards.TorchTransformer]
)
def test_every_parameter_counts_once(factory):
    network = hazards.build(factory)
    nodes = record(network, hazards.images(2)).module.graph.nodes
    assert sum(info(node).n_params for node in nodes) == sum(p.numel() for p in network.parameters())


def test_costs_of_attention_are_counted_inside_and_outside_of_leaves():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    per_token = 8 * 24 + 8 * 8 + 2 * 8 * 16
    attention = 2 * 4 * 4 * 8  # queries with keys, and scores with values, of 4 tokens
    network = hazards.build(hazards.TorchTransformer)
    network.encoder = nn.TransformerEncoder(layer, 1)
    nodes = {node.name: info(node) for node in record(network, hazards.images(2)).module.graph.nodes}
    assert nodes["encoder_layers_0"].n_macs == 4 * per_token + attention
    assert nodes["attention"].n_macs == 4 * (8 * 24 + 8 * 8) + attention


def test_recording_follows_the_weights_but_nothing_else():
    network = hazards.build(hazards.Residual).train()
    recording = record(network, hazards.images(2))
    before, x = take_snapshot(network), hazards.images(5, seed=5)
    module = copy.deepcopy(recording.module)
    recording.module.to("meta")
    assert not differences(network, before)
    assert not any(part.training for part in module.modules())

    recording = record(network, hazards.images(2))
    recording.module(x).sum().backward()
    recording.module.requires_grad_(False)
    recording.module.layers.get_submodule("0").relu.register_forward_hook(lambda *args: torch.zeros(()))
    recording.module.train()
    assert not differences(network, before)

    recording = record(network, hazards.images(2))
    with torch.no_grad():
        network.tail[2].weight.mul_(2)
        assert same_bits(recording.module(x), logits(network, x))
        assert not same_bits(recording.module(x), module(x))


def test_recording_can_be_made_under_any_gradient_mode():
    network, x = hazards.build(hazards.FrozenWeights), hazards.images(5, seed=5)
    with torch.inference_mode():
        recording = record(network, hazards.images(2))
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert same_bits(recording.module(x), logits(network, x))
    network.eval()
    assert same_bits(recording.module(x), network(x))
    assert recording.module(x).requires_grad


def test_views_become_reshapes_unless_something_is_written_through_them():
    targets = [n.target for n in record(hazards.build(hazards.Windows), hazards.images(2)).module.graph.nodes]
    assert "reshape" in targets
    assert "view" not in targets
    targets = [
        n.target for n in record(hazards.build(hazards.WrittenThroughView), hazards.images(2)).module.graph.nodes
    ]
    assert "view" in targets


def test_leaf_that_hands_its_argument_on_keeps_its_place():
    recording = record(hazards.build(hazards.DropoutBesideShortcut), hazards.images(2))
    nodes = {node.name: node for node in recording.module.graph.nodes}
    assert nodes["drop"].all_input_nodes == nodes["add"].all_input_nodes[:1] == [nodes["stem_2"]]


def test_node_names_are_the_same_in_every_recording():
    first, second = (record(hazards.build(hazards.VisionTransformer), hazards.images(n, seed=n)) for n in (1, 3))
    assert [n.name for n in first.module.graph.nodes] == [n.name for n in second.module.graph.nodes]


@pytest.mark.parametrize("factory", [hazards.VisionTransformer, hazards.Windows, hazards.OverwrittenCuts])
def test_recording_can_be_exported_and_compiled(factory):
    recording = record(hazards.build(factory), hazards.images(2))
    x = hazards.images(5, seed=5)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        expected = recording.module(x.clone())
        exported = torch.export.export(recording.module, (x.clone(),), dynamic_shapes=(batch,)).module()
        assert torch.equal(exported(x.clone()), expected)
        assert torch.equal(torch.compile(recording.module, backend="eager", fullgraph=True)(x.clone()), expected)
