"""Graphs are pickled and rebuilt without tracing, with the facts of their nodes."""

import copy
import pickle
import sys

import pytest
import torch
from torch import fx, nn

import hazards
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.nodes import info
from pnc.graph.recording import record

NAMES = [
    "Residual",
    "VisionTransformer",
    "Windows",
    "NestedResults",
    "Operators",
    "Indexing",
    "Recurrent",
    "BatchInArguments",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_graph_is_the_same_and_nothing_is_traced(name, monkeypatch):
    module = record(hazards.build(hazards.REPRODUCED[name]), hazards.images(2)).module
    monkeypatch.setattr(fx.Tracer, "trace", None)
    call, data = nn.Module.__call__, pickle.dumps(module)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(nn.Module.__call__))
    try:
        again = pickle.loads(data)  # noqa: S301 - our own bytes
    finally:
        sys.setprofile(None)
    assert set(calls) == {call}
    x = hazards.images(5, seed=5)
    twice = pickle.loads(pickle.dumps(again))  # noqa: S301 - our own bytes
    for other in (again, copy.deepcopy(again), twice):
        with torch.no_grad():
            assert same_bits(other(x.clone()), module(x.clone()))
        assert [(n.name, n.op, str(n.target)) for n in other.graph.nodes] == [
            (n.name, n.op, str(n.target)) for n in module.graph.nodes
        ]
        assert [info(n) for n in other.graph.nodes] == [info(n) for n in module.graph.nodes]
    assert not any(part.training for part in again.modules())


def test_a_recording_touches_no_module_but_its_networks():
    network, call, seen = hazards.build(hazards.Residual), nn.Module.__call__, []
    network.stem.register_forward_hook(lambda *given: seen.append(nn.Module.__call__))
    record(network, hazards.images(2))
    assert set(seen) == {call}
    assert "_compiled_call_impl" not in vars(network.stem)
