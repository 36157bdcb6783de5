"""Parts of a recorded graph: nodes that every path passes through, and the sub-network between given nodes."""

import dataclasses
from collections.abc import Sequence

from torch import fx

from pnc.foundation.errors import InputError
from pnc.graph.graph_builder import eval_module
from pnc.graph.nodes import BATCH_SIZES, NodeInfo, info


def needs_of(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose data it needs: its arguments, and later writes to their memory."""
    names = {node.name: node for node in graph.nodes}
    return {n: [*n.all_input_nodes, *(names[name] for name in info(n).after)] for n in graph.nodes}


def needed_for(outputs: Sequence[fx.Node], start: fx.Node | None = None) -> set[fx.Node]:
    """All nodes that the outputs need, including themselves, back to `start` (excluded)."""
    needs = needs_of(outputs[0].graph)
    found: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in found and node is not start:
            found.add(node)
            todo.extend([] if _is_batch_size(node) else needs[node])
    return found


def dominators(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that every path from the input to the output passes through, the input first.

    Each is one floating-point tensor whose first dim is the batch. The logits are not among them.
    """
    needs = {
        n: [d for d in before if info(d).from_input] for n, before in needs_of(graph).items() if info(n).from_input
    }
    order = list(needs)
    position = {node: i for i, node in enumerate(order)}
    last_use = list(range(len(order)))
    for node, before in needs.items():
        for other in before:
            last_use[position[other]] = max(last_use[position[other]], position[node])
    found, reach = [], 0
    for i, node in enumerate(order[:-2]):  # the last two are the logits and the output
        if reach <= i and _is_batch(info(node)):
            found.append(node)
        reach = max(reach, last_use[i])
    return found


def _is_batch(facts: NodeInfo) -> bool:
    if facts.shape is None or facts.shape3 is None or facts.dtype is None or not facts.dtype.is_floating_point:
        return False
    leading = (facts.shape[:1], facts.shape3[:1])
    return leading == (BATCH_SIZES[:1], BATCH_SIZES[1:]) and facts.shape[1:] == facts.shape3[1:]


def costs_before(cuts: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """(n_macs, n_params) of the part before each of some dominators, given in graph order; MACs are per sample."""
    needs = needs_of(cuts[0].graph)
    found: set[fx.Node] = set()
    n_macs, n_params, costs = 0, 0, []
    for cut in cuts:
        todo = [cut]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo.extend(needs[node])
                n_macs, n_params = n_macs + info(node).n_macs, n_params + info(node).n_params
        costs.append((n_macs, n_params))
    return costs


def subgraph(module: fx.GraphModule, start: fx.Node, outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a recorded graph that computes `outputs` from `start`, over the same modules and tensors.

    Raises:
        InputError: as `part`.
    """
    return eval_module(module, part(module.graph, start, outputs))


def part(graph: fx.Graph, start: fx.Node, outputs: Sequence[fx.Node]) -> fx.Graph:
    """The part of a recorded graph that computes `outputs` from `start`, as a separate graph.

    It returns one output as a tensor, several as a tuple. It never writes to its input, and copies an output before a
    later operation writes to it. Integers that depend on the batch size are read from its input.

    Raises:
        InputError: an output cannot be computed from `start` alone.
    """
    wanted = needed_for(outputs, start)
    if any(node.op == "placeholder" for node in wanted):
        raise InputError(f"start: {outputs[-1].name} cannot be computed from {start.name} alone")
    new = fx.Graph()
    given = new.placeholder("x")
    given.meta["pnc"] = dataclasses.replace(info(start), n_macs=0, n_params=0, after=(), writes=frozenset())
    nodes = [node for node in graph.nodes if node in wanted]
    overwritten = any(info(start).holds & info(node).writes for node in nodes)
    copies = {start: _clone(new, given) if overwritten else given}
    taps = {start: given}
    for i, node in enumerate(nodes):
        if _is_batch_size(node):
            copies[node] = new.call_method("size", (given, 0))
            copies[node].meta["pnc"] = info(node)
            continue
        copies[node] = taps[node] = new.node_copy(node, copies.__getitem__)
        if node in outputs and any(info(node).holds & info(later).writes for later in nodes[i + 1 :]):
            taps[node] = _clone(new, copies[node])
    result = new.output(taps[outputs[0]] if len(outputs) == 1 else tuple(taps[node] for node in outputs))
    result.meta["pnc"] = dataclasses.replace(info(outputs[-1]), n_macs=0, n_params=0, after=(), writes=frozenset())
    return new


def _is_batch_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size" and not info(node).is_tensor


def _clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    clone = graph.call_method("clone", (node,))
    kept = dataclasses.replace(info(node), n_macs=0, n_params=0, after=(), holds=frozenset(), writes=frozenset())
    clone.meta["pnc"] = kept
    return clone
