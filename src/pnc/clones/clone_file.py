"""Clone files: safetensors of a few kilobytes with what was fitted, and the fingerprints of both networks.

A `thin` file leaves out the source's weights; loading it takes them from the source, which must have the recorded
fingerprint. A `full` file includes the kept weights and the structure of the source's part; no source is needed.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, fx, nn

from pnc.channels.channel_masks import ChannelMasks
from pnc.clones.adapter import Stitched
from pnc.clones.branch_rebuilding import (
    BODY,
    CALIBRATION,
    HEAD,
    HIDDEN,
    MASKS,
    body_names,
    check_head,
    check_image_size,
    check_stored_body,
    described,
    empty_branch,
    fitted_tensors,
    rebuilt_adapter,
    rebuilt_body,
    stored_body,
)
from pnc.clones.clone import Clone, check_file_name
from pnc.clones.deltas import DTYPES, deltas_in
from pnc.clones.manifest import PART_VERSION, FileKind, Manifest, read_manifest
from pnc.clones.part_description import describe_part
from pnc.clones.part_structure import PartStructure
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import FileFormatError, InputError, MismatchError, PNCWarning
from pnc.foundation.fingerprints import fingerprint, first_difference
from pnc.foundation.network_state import images_for
from pnc.foundation.tensor_bits import dtype_name
from pnc.foundation.tensor_files import DIGEST_KEY, read_sealed, write_tensors
from pnc.graph.cut_points import CutPoint
from pnc.graph.forward_prints import ForwardPrint, forward_difference, forward_print
from pnc.graph.recording import record

__all__ = ["FileKind", "inspect", "load", "read_clone_file", "save"]

_DELTAS = "deltas."
_log = logging.getLogger(__name__)


def save(clone: Clone, path: str | Path, kind: FileKind = "thin") -> int:
    """Write a clone to a file, whole or not at all; the same clone gives the same bytes.

    Args:
        clone: The clone.
        path: Where to write it; an existing file is replaced.
        kind: "thin" leaves out the weights that the source has; "full" includes them, and the structure of the source's
            part, so that it loads without the source. If the part cannot be rebuilt from data alone, such as a layer
            with code of its own, a warning says why, and loading needs a network of the source's architecture.
    Returns:
        The size of the file in bytes.
    Raises:
        InputError: the kind is unknown, the path cannot be written to, a value is not finite, or a name is not
            printable.

    >>> pnc.save(clone, "pets.safetensors") < 10_000
    True
    """
    if kind not in get_args(FileKind):
        raise InputError(f"kind: expected {' or '.join(get_args(FileKind))}, got {kind!r}")
    if not isinstance(clone, Clone):
        raise InputError(f"clone: expected what pnc.clone or pnc.load returns; got {type(clone).__name__}")
    check_file_name(path)
    tensors = {name: _short(name, tensor) for name, tensor in fitted_tensors(clone.branch).items() if tensor.numel()}
    if clone.branch.scalars.is_identity:  # a file without scalars means the same
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(CALIBRATION)}
    if clone.masks is not None:
        tensors[MASKS] = torch.frombuffer(bytearray(clone.masks.to_bytes()), dtype=torch.uint8)
    if clone.deltas is not None:
        tensors |= {f"{_DELTAS}{name}": tensor for name, tensor in clone.deltas.tensors.items()}
    tensors |= {f"{BODY}{name}": tensor for name, tensor in _body_tensors(clone, kind).items()}
    part, hidden = _structure(clone) if kind == "full" else (None, {})
    tensors |= {f"{HIDDEN}{name}": tensor for name, tensor in hidden.items()}
    broken = _not_finite(tensors)
    if broken:
        raise InputError(f"clone: {broken} holds values that are not finite and could not be loaded; clone again")
    write_tensors(path, tensors, _manifest(clone, kind, part).facts())
    _log.info("%s: written, %s", path, kind)
    return Path(path).stat().st_size


def _short(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the head in half precision if that is exact; other tensors as they are."""
    short = tensor.half()
    return short if name.startswith(HEAD) and torch.equal(short.to(tensor.dtype), tensor) else tensor


def _body_tensors(clone: Clone, kind: FileKind) -> dict[str, Tensor]:
    state = clone.branch.stitched.body.state_dict()
    return {name: state[name] for name in body_names(state, kind, clone.masks is not None or clone.deltas is not None)}


def _structure(clone: Clone) -> tuple[PartStructure | None, dict[str, Tensor]]:
    """The structure of the clone's part with the tensors that its state dict lacks; warns if it cannot be described."""
    stitched = clone.branch.stitched
    sizes = {} if clone.masks is None else clone.masks.sizes
    try:
        return describe_part(cast(fx.GraphModule, stitched.body), clone.source_cut, stitched.features, sizes)
    except InputError as error:
        warnings.warn(
            f"{error}: the file holds all weights, but loading it needs a network of the source's architecture",
            PNCWarning,
            stacklevel=3,
        )
        return None, {}


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    wrong = (n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all()))
    return next(wrong, None)


def _manifest(clone: Clone, kind: FileKind, part: PartStructure | None) -> Manifest:
    return Manifest(
        kind=kind,
        name=clone.name,
        classes=clone.classes,
        base_classes=clone.base_classes,
        target_cut=clone.target_cut,
        source_cut=clone.source_cut,
        target_features=clone.target_features,
        rectify=clone.branch.stitched.adapter.rectify,
        head=clone.branch.head.kind,
        source=clone.source,
        target=clone.target,
        input_shape=clone.input_shape,
        recipe=clone.recipe,
        source_forward=clone.source_forward,
        target_forward=clone.target_forward,
        part=part,
        version=PART_VERSION - (part is None),
    )


def inspect(path: str | Path) -> dict[str, Any]:
    """Read a clone file's metadata, without any network; checks all that can be checked without one.

    Returns:
        The metadata as plain values, with `n_bytes` (size of the file), `n_values` (numbers in its tensors) and
        `needs_source` in place of the structure of the source's part.
    Raises:
        FileFormatError: the file is damaged, not a clone file, or has a newer version of the format.

    >>> _ = pnc.save(clone, "pets.safetensors")
    >>> pnc.inspect("pets.safetensors")["classes"]
    ['cat', 'dog']
    """
    tensors, manifest = read_clone_file(path)
    facts = replace(manifest, part=None, version=PART_VERSION - 1).facts()
    facts |= {"version": manifest.version, "needs_source": manifest.part is None}
    facts["n_bytes"] = Path(path).stat().st_size
    facts["n_values"] = sum(tensor.numel() for tensor in tensors.values())
    return facts


def load(
    path: str | Path,
    *,
    source: nn.Module | None = None,
    allow_mismatch: bool = False,
    input_shape: Sequence[int] | None = None,
) -> Clone:
    """Read a clone from a file.

    Args:
        path: A file that `save` wrote.
        source: The network that the clone was made from; for a full file, any network of the same architecture. It is
            not changed; the clone gets its own copies of the weights that it needs. A full file does not need it,
            unless `save` warned that it would; `pnc.inspect(path)["needs_source"]` tells.
        allow_mismatch: Accept another source too, such as a fine-tuned one, if the file's tensors fit it. The held-out
            scores say nothing about such a clone.
        input_shape: (C, H, W) of your images. A file for other images is refused at once. Without it, the source is
            recorded on images of the size in the file, up to 2^24 values: give it for files that you do not trust.
    Raises:
        FileFormatError: the file is damaged, not a clone file, or has a newer version of the format.
        InputError: the file needs a source, and none is given.
        MismatchError: `source` is not the network that the file was made from; with `allow_mismatch`, the file's
            tensors do not fit it.
        RecordingError: `source` cannot be recorded.

    >>> _ = pnc.save(clone, "pets.safetensors", kind="full")
    >>> pnc.attach(target, pnc.load("pets.safetensors")).clones
    ('cat+dog',)
    """
    if source is not None:
        check_module(source, "source")
    tensors, manifest = read_clone_file(path)
    if input_shape is not None and tuple(input_shape) != manifest.input_shape:
        raise MismatchError(f"{path} is for images {manifest.input_shape}, not {tuple(input_shape)}; use another file")
    _log.info("%s: %s, of %s", path, manifest.name, "a source" if source is not None else "its own structure")
    if source is None:
        stored = stored_body(path, manifest, tensors, deltas_in(tensors, _DELTAS))
        return _clone(path, manifest, tensors, stored)
    difference = first_difference(source, manifest.source, structure_only=manifest.kind == "full")
    if difference is not None and not allow_mismatch:
        raise MismatchError(
            f"{path} was made from another source: {difference}; load it with the source it was made from, or set "
            "allow_mismatch=True to load it anyway"
        )
    check_image_size(path, source, manifest)
    recording = record(source, images_for(source, manifest.input_shape))
    forward = forward_print(source, recording)
    if not allow_mismatch:
        _check_forward(path, manifest, forward)
    clone = _clone(
        path, manifest, tensors, rebuilt_body(path, recording, manifest, tensors, deltas_in(tensors, _DELTAS))
    )
    is_other = difference is not None and manifest.kind == "thin"  # then the clone holds this source's weights
    return replace(clone, source=fingerprint(source), source_forward=forward) if is_other else clone


def _clone(
    path: str | Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    rebuilt: tuple[nn.Module, ChannelMasks | None, CutPoint],
) -> Clone:
    """The clone from the content of its file and the rebuilt part of the source."""
    body, masks, features = rebuilt
    branch = empty_branch(path, manifest, tensors, Stitched(rebuilt_adapter(manifest, tensors), body, features)).cpu()
    for name, tensor in fitted_tensors(branch).items():
        if name in tensors:
            tensor.copy_(tensors[name])
    check_head(path, branch, manifest)
    return Clone(
        name=manifest.name,
        classes=manifest.classes,
        base_classes=manifest.base_classes,
        branch=branch,
        masks=masks,
        deltas=deltas_in(tensors, _DELTAS),
        source=manifest.source,
        target=manifest.target,
        input_shape=manifest.input_shape,
        target_features=manifest.target_features,
        recipe=manifest.recipe,
        source_forward=manifest.source_forward,
        target_forward=manifest.target_forward,
    )


def _check_forward(path: str | Path, manifest: Manifest, found: ForwardPrint) -> None:
    """Refuse a source whose forward pass differs from that of the file's source."""
    if manifest.source_forward is None:
        warnings.warn(
            f"{path} was written by an earlier version of pnc, without forward prints: only the weights were compared; "
            "save the clone again",
            PNCWarning,
            stacklevel=3,
        )
        return
    difference = forward_difference(found, manifest.source_forward, weights=manifest.kind == "thin")
    if difference is None:
        return
    if difference.is_other:
        raise MismatchError(
            f"{path} was made from another source, with the same weights but another forward pass: {difference.text}; "
            "load it with the source it was made from, or set allow_mismatch=True to load it anyway"
        )
    warnings.warn(
        f"source: {difference.text}, compared with the one that {path} was made from; its answers to a test pattern "
        "are the same",
        PNCWarning,
        stacklevel=3,
    )


def read_clone_file(path: str | Path) -> tuple[dict[str, Tensor], Manifest]:
    """Read a file and check all that needs no network: names, types and shapes before any values.

    Raises:
        FileFormatError: as in `load`.
    """
    found: list[Manifest] = []

    def check(shapes: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        found.append(_checked_shapes(path, shapes, facts))

    tensors, _, _ = read_sealed(path, check)
    broken = _not_finite(tensors)
    if broken:
        raise FileFormatError(f"{path} is damaged: {broken[:80]!r} holds values that are not finite")
    return tensors, found[0]


def _checked_shapes(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a file, after a check that its tensors (on the meta device) are those it asks for."""
    manifest = read_manifest(path, {key: value for key, value in facts.items() if key != DIGEST_KEY})
    if facts.get(DIGEST_KEY) is None:
        raise FileFormatError(f"the metadata of {path} is damaged: it has no digest of the content")
    with torch.device("meta"):
        stitched = Stitched(rebuilt_adapter(manifest, tensors), fx.GraphModule({}, fx.Graph()), manifest.source_cut)
        expected = fitted_tensors(empty_branch(path, manifest, tensors, stitched))
    for name in expected:
        optional = name.startswith(CALIBRATION) or not expected[name].numel()
        if name not in tensors and not optional:
            raise FileFormatError(f"{path} is damaged: the tensor {name!r} is missing")
    if manifest.part is not None:
        check_stored_body(path, manifest, tensors)
    for name, tensor in tensors.items():
        if name.startswith(BODY) or (name.startswith(HIDDEN) and manifest.part is not None):
            continue
        if name == MASKS:
            wanted: tuple[Any, Any] = torch.uint8, tensor.shape[:1]
        elif name.startswith(_DELTAS) and name.removeprefix(_DELTAS) in DTYPES and manifest.version > 1:
            wanted = DTYPES[name.removeprefix(_DELTAS)], tensor.shape[:1]
        elif name in expected:
            wanted = expected[name].dtype, expected[name].shape
        else:
            raise FileFormatError(f"{path} is damaged: a clone has no tensor {name[:80]!r}")
        if name.startswith(HEAD) and tensor.dtype == torch.float16:
            wanted = torch.float16, wanted[1]
        if (tensor.dtype, tensor.shape) != wanted:
            raise FileFormatError(
                f"{path} is damaged: {name!r} is {described(tensor)}, its metadata asks for "
                f"{tuple(wanted[1])} {dtype_name(wanted[0])}"
            )
    return manifest
