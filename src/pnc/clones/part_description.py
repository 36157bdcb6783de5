"""Describes a clone's part as data, and proves the description: the rebuilt part must give the same bits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pnc.channels.module_inlining import opened_but
from pnc.clones.allowed_operations import LAYERS, layer_arguments, settings_of
from pnc.clones.metadata_object import MetadataObject
from pnc.clones.part_graph import is_path
from pnc.clones.part_structure import (
    FAILURES,
    PART_KEYS,
    PartStructure,
    dry_run,
    empty_part,
    fill,
    misfit,
    read_structure,
)
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import evaluating, undisturbed
from pnc.foundation.tensor_bits import DTYPES, dtype_name, same_bits
from pnc.graph.cut_points import CutPoint

_BATCHES = (2, 5)
"""Batch sizes at which the rebuilt part is compared."""


def describe_part(
    body: fx.GraphModule, start: CutPoint, features: CutPoint, spaces: Mapping[str, int]
) -> tuple[PartStructure, dict[str, Tensor]]:
    """Describe a part of a source, so that it can be rebuilt from data alone.

    Layers of other libraries are replaced by the operations that they consist of.

    Args:
        body: The part.
        start: The cut whose tensor it takes.
        features: The cut that it computes.
        spaces: Size of each channel space of its masks.
    Returns:
        The structure, and the tensors by name that the part's state dict does not have.
    Raises:
        InputError: it cannot be rebuilt from data alone; the message says why.
    """
    state = body.state_dict()
    parameters = dict(body.named_parameters(remove_duplicate=False))
    inlined = opened_but(body, lambda module: type(module) is LAYERS.get(type(module).__name__))
    layers: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for node in inlined.graph.nodes:
        if node.op == "call_module":
            layers[str(node.target)] = _layer(str(node.target), inlined.get_submodule(str(node.target)))
    every = {**dict(inlined.named_parameters(remove_duplicate=False)), **_buffers(inlined)}
    hidden = {name: tensor for name, tensor in every.items() if name not in state}
    kinds = {name: "parameter" if name in parameters else "buffer" for name in state} | dict.fromkeys(hidden, "hidden")
    outside = {name: kind for name, kind in kinds.items() if not _is_inside(name, layers)}
    wrong = next((name for name in (*layers, *kinds) if not is_path(name)), None)
    strange = next((name for name, tensor in {**state, **hidden}.items() if tensor.dtype not in DTYPES), None)
    if wrong is not None:
        raise InputError(f"clone: its part has a layer or tensor named {wrong!r}, which files cannot name")
    if strange is not None:
        raise InputError(f"clone: its part has the tensor {strange}, {dtype_name({**state, **hidden}[strange].dtype)}")
    structure = PartStructure(features, spaces, layers, outside, inlined.graph)
    _prove(structure, body, start, {**state, **hidden})
    return structure, hidden


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _is_inside(name: str, layers: Mapping[str, Any]) -> bool:
    scopes = name.split(".")
    return any(".".join(scopes[:length]) in layers for length in range(1, len(scopes)))


def _layer(name: str, layer: nn.Module) -> tuple[str, Mapping[str, Any]]:
    """A layer's class and arguments.

    Raises:
        InputError: it is not a layer of torch.nn, or has hooks or attributes that its constructor does not set.
    """
    arguments = layer_arguments(layer)
    kind = type(layer)
    if arguments is None:
        whose = f"{kind.__module__}.{kind.__qualname__}"
        raise InputError(f"clone: its layer {name} is a {whose}, which only its own code can build")
    try:
        with undisturbed(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = kind(**arguments)
    except FAILURES as error:
        raise InputError(f"clone: its layer {name}, a {kind.__name__}, cannot be built from {arguments}") from error
    if settings_of(twin) != settings_of(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        raise InputError(f"clone: its layer {name}, a {kind.__name__}, has hooks or settings of its own")
    return kind.__name__, arguments


def _prove(structure: PartStructure, body: fx.GraphModule, start: CutPoint, tensors: Mapping[str, Tensor]) -> None:
    """Rebuild the part from its description as a file holds it, and compare.

    Raises:
        InputError: it cannot be rebuilt, or gives other bits.
    """

    def fail(reason: str) -> Any:
        raise InputError(f"clone: {reason}")

    found = read_structure(MetadataObject(structure.facts(), "part", PART_KEYS, fail), fail)
    try:
        rebuilt = empty_part(found)
        reason = misfit(found, rebuilt, tensors)
        if reason is None:
            fill(rebuilt, {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()})
            reason = dry_run(rebuilt, start.shape, structure.features.shape)
        if reason is not None:
            fail(reason)
        fill(rebuilt, {name: tensor.contiguous() for name, tensor in tensors.items()})
        generator = torch.Generator().manual_seed(0)
        first = next((one for one in tensors.values() if one.is_floating_point()), torch.zeros(1))
        with undisturbed(), evaluating(body):
            for batch in _BATCHES:
                x = torch.randn(batch, *start.shape, generator=generator).to(first.device, first.dtype)
                if not same_bits(rebuilt(x.clone()), body(x.clone())):
                    fail("its part gives other bits when it is rebuilt from its layers and operations")
    except FAILURES as error:
        if isinstance(error, InputError):
            raise
        fail(f"its part cannot be rebuilt: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
