"""Clone files: safetensors of kilobytes that hold what was fitted, and say which networks they belong to.

A `thin` file leaves the source's weights out: loading it takes them from the source, whose fingerprint it names. A
`full` file carries the kept weights; loading it needs only a network of the source's architecture.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pnc.channels import channel_spaces
from pnc.cloning import Branch, Clone
from pnc.compaction import compact, own_copy
from pnc.cuts import CutPoint, cut_points, extract, find_head
from pnc.errors import FileFormatError, MismatchError
from pnc.files import read_tensors, write_tensors
from pnc.graph import record
from pnc.heads import DiscriminantHead, Head, SourceHead
from pnc.integrity import Fingerprint, fingerprint, first_difference
from pnc.masks import ChannelMasks
from pnc.stitching import Adapter, Stitched

FORMAT = "pnc-clone"
VERSION = 1
Kind = Literal["thin", "full"]
_STATISTICS = ("running_mean", "running_var")


def save(clone: Clone, path: str | Path, kind: Kind = "thin") -> int:
    """Write a clone to a file, whole or not at all; the same clone gives the same bytes.

    Args:
        clone: What to save.
        path: Where to; an existing file is replaced.
        kind: "thin" leaves out the weights that the source has; "full" carries them.
    Returns:
        The size of the file in bytes.
    Raises:
        InputError: the path cannot be written to.
    """
    stitched = clone.branch.stitched
    tensors = {f"adapter.{name}": tensor for name, tensor in stitched.adapter.state_dict().items() if tensor.numel()}
    tensors |= {f"head.{name}": tensor for name, tensor in clone.branch.head.state_dict().items()}
    if clone.masks is not None:
        tensors["masks"] = torch.frombuffer(bytearray(clone.masks.to_bytes()), dtype=torch.uint8)
    tensors |= {f"body.{name}": tensor for name, tensor in _body_tensors(clone, kind).items()}
    write_tensors(path, tensors, _metadata(clone, kind))
    return Path(path).stat().st_size


def _body_tensors(clone: Clone, kind: Kind) -> dict[str, Tensor]:
    state = clone.branch.stitched.body.state_dict()
    if kind == "full":
        return dict(state)
    if clone.masks is None:
        return {}
    return {name: tensor for name, tensor in state.items() if name.endswith(_STATISTICS)}  # re-estimated for the masks


def _metadata(clone: Clone, kind: Kind) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "name": clone.name,
        "classes": list(clone.classes),
        "base_classes": list(clone.base_classes),
        "position": {
            "target": dataclasses.asdict(clone.target_cut),
            "source": dataclasses.asdict(clone.source_cut),
            "target_features": dataclasses.asdict(clone.target_features),
            "rectify": clone.branch.stitched.adapter.rectify,
        },
        "head": clone.branch.head.kind,
        "source": {**dataclasses.asdict(clone.source), "input_shape": list(clone.source_input_shape)},
        "target": {**dataclasses.asdict(clone.target), "input_shape": list(clone.input_shape)},
        "recipe": dict(clone.recipe),
    }


def inspect(path: str | Path) -> dict[str, Any]:
    """Say what a clone file holds, without any network.

    Returns:
        The metadata of the file as plain values, with `n_bytes`, and `n_values`: how many numbers its tensors hold.
    Raises:
        FileFormatError: the file is damaged, no clone file, or of a newer version of the format.
    """
    tensors, facts = _read(path)
    facts["n_bytes"] = Path(path).stat().st_size
    facts["n_values"] = sum(tensor.numel() for tensor in tensors.values())
    return facts


def load(path: str | Path, *, source: nn.Module) -> Clone:
    """Read a clone from a file.

    Args:
        path: A file that `save` wrote.
        source: The network that the clone was made from; for a full file any network of the same architecture. It
            stays as it is, and the clone gets its own copies of the weights that it needs.
    Raises:
        FileFormatError: the file is damaged, no clone file, or of a newer version of the format.
        MismatchError: `source` is another network than the one that the file names.
        RecordingError: `source` cannot be recorded.
    """
    tensors, facts = _read(path)
    try:
        expected = _fingerprint(facts["source"])
        shape = tuple(int(size) for size in facts["source"]["input_shape"])
        target_cut, source_cut = (_cut(facts["position"][side]) for side in ("target", "source"))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the metadata of {path} is damaged: {error!r}") from error
    difference = first_difference(source, expected)
    if difference is not None and (facts["kind"] == "thin" or fingerprint(source).structure != expected.structure):
        raise MismatchError(
            f"{path} was made from another source: {difference}; load it with the source it was made from"
        )
    body, masks, features = _body(path, source, shape, source_cut, facts, tensors)
    try:
        adapter = Adapter(target_cut, source_cut, rectify=bool(facts["position"]["rectify"]))
        _fill(adapter, "adapter.", tensors)
        head = _head(facts, tensors)
        return Clone(
            name=str(facts["name"]),
            classes=tuple(map(str, facts["classes"])),
            base_classes=tuple(map(str, facts["base_classes"])),
            branch=Branch(Stitched(adapter, body, features), head),
            masks=masks,
            source=expected,
            target=_fingerprint(facts["target"]),
            input_shape=tuple(int(size) for size in facts["target"]["input_shape"]),
            source_input_shape=shape,
            target_features=_cut(facts["position"]["target_features"]),
            recipe=facts["recipe"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"the metadata of {path} is damaged: {error!r}") from error


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        raise FileFormatError(f"{path} is no clone file: its format is {facts.get('format')!r}, expected {FORMAT!r}")
    version = facts.get("version")
    if not isinstance(version, int) or version < 1:
        raise FileFormatError(f"the metadata of {path} is damaged: version {version!r}")
    if version > VERSION:
        raise FileFormatError(
            f"{path} has format version {version}; this pnc reads up to {VERSION}: install a newer one"
        )
    if facts.get("kind") not in ("thin", "full"):
        raise FileFormatError(f"the metadata of {path} is damaged: kind {facts.get('kind')!r}")
    return tensors, facts


def _body(
    path: str | Path,
    source: nn.Module,
    shape: tuple[int, ...],
    cut: CutPoint,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[nn.Module, ChannelMasks | None, CutPoint]:
    """Rebuild the source's part: recorded anew, cut, compacted, with the file's own tensors for the source's."""
    parameter = next(source.parameters(), torch.empty(0))
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    recording = record(source, example.to(parameter.device, parameter.dtype))
    if cut not in cut_points(recording):
        raise MismatchError(
            f"{path} enters the source at {cut.name!r} with shape {cut.shape}, which this source does not have; "
            "load it with the source it was made from"
        )
    features = find_head(recording).features
    segment = extract(recording, cut, [features])
    masks = None
    if "masks" in tensors:
        spaces = channel_spaces(segment)
        masks = ChannelMasks.from_bytes(tensors["masks"].numpy().tobytes(), spaces)
        body = compact(segment, spaces, masks)
    else:
        body = own_copy(segment)
    own = {name.removeprefix("body."): tensor for name, tensor in tensors.items() if name.startswith("body.")}
    expected = body.state_dict()
    for name, tensor in own.items():
        if name not in expected or expected[name].shape != tensor.shape or expected[name].dtype != tensor.dtype:
            raise MismatchError(
                f"{path} carries a tensor {name!r} {tuple(tensor.shape)} that does not fit to this source"
            )
        expected[name].copy_(tensor)
    return body, masks, features


def _head(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    head: Head
    weight = tensors["head.weight"]
    if facts["head"] == DiscriminantHead.kind:
        head = DiscriminantHead(len(facts["base_classes"]), *weight.shape)
    elif facts["head"] == SourceHead.kind:
        head = SourceHead(*weight.shape)
    else:
        raise ValueError(f"head {facts['head']!r}")
    _fill(head, "head.", tensors)
    return head


def _fill(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors under `prefix` into `module`; a tensor that does not fit is a ValueError."""
    for name, buffer in module.state_dict().items():
        if not buffer.numel():
            continue
        tensor = tensors[prefix + name]
        if tensor.shape != buffer.shape or tensor.dtype != buffer.dtype:
            raise ValueError(f"{prefix}{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(buffer.shape)}")
        buffer.copy_(tensor)


def _cut(facts: Mapping[str, Any]) -> CutPoint:
    return CutPoint(**{**facts, "shape": tuple(facts["shape"])})


def _fingerprint(facts: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(str(facts["structure"]), tuple(map(str, facts["tensors"])))
