"""Cut points as metadata of a file, and back."""

import dataclasses
import math
from typing import Any, cast

from pnc.clones.metadata_object import MAX_COUNT, MetadataObject
from pnc.graph.cut_points import CHANNEL_DIMS, CutPoint


def cut_facts(cut: CutPoint) -> dict[str, Any]:
    """A cut point as JSON values."""
    return {**dataclasses.asdict(cut), "shape": list(cut.shape)}


def read_cut(holder: MetadataObject, key: str) -> CutPoint:
    """Read the cut point at a key of an object."""
    facts = holder.object(key, tuple(field.name for field in dataclasses.fields(CutPoint)))
    kind = facts.choice("kind", tuple(CHANNEL_DIMS))
    shape = facts.sizes("shape", {"vector": 1, "tokens": 2, "map": 3}[kind])
    channel_dim = facts.number("channel_dim", 1, 3, whole=True)
    if channel_dim not in CHANNEL_DIMS[kind] or math.prod(shape) > MAX_COUNT:
        facts.fail(f"channel_dim {channel_dim} or shape {list(shape)} does not fit the kind {kind!r}")
    n_tokens = shape[2 - channel_dim] if kind == "tokens" else 1
    return CutPoint(
        name=facts.text("name"),
        index=facts.number("index", 0, MAX_COUNT, whole=True),
        scope=facts.text("scope", least=0),
        kind=cast(Any, kind),
        shape=shape,
        channel_dim=channel_dim,
        n_prefix_tokens=facts.number("n_prefix_tokens", 0, n_tokens - 1, whole=True),
        n_macs=facts.number("n_macs", 0, MAX_COUNT, whole=True),
        n_params=facts.number("n_params", 0, MAX_COUNT, whole=True),
    )
