"""A clone's branch rebuilt from its file and, unless the file holds the structure of the part, a recorded source."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, own_copy
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.branch import Branch
from pnc.clones.deltas import Deltas, check_fit, merge
from pnc.clones.heads import DiscriminantHead, Head, SourceHead, StackedHead
from pnc.clones.manifest import FileKind, Manifest
from pnc.clones.part_structure import FAILURES, dry_run, empty_part, fill, first_dtype, misfit
from pnc.foundation.errors import FileFormatError, InputError, MismatchError
from pnc.foundation.network_state import undisturbed
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import CutPoint, cut_points, extract
from pnc.graph.dry_run import shapes_without_values
from pnc.graph.recording import Recording

STATISTICS = ("running_mean", "running_var")
ADAPTER, HEAD, BODY, HIDDEN, CALIBRATION, MASKS = "adapter.", "head.", "body.", "hidden.", "calibration.", "masks"
"""How the names of a file's tensors begin."""
RIVALS = f"{CALIBRATION}rivals"
_LARGE_IMAGE = 1 << 18
"""Images with more values than this, about 3x295x295, are tried in a dry run before the source is recorded."""


def rebuilt_adapter(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter, without values yet: the identity if the cuts are alike and the file has no weights for it."""
    cuts = manifest.target_cut, manifest.source_cut
    may_be = cuts[0].is_alike(cuts[1]) and not manifest.rectify
    is_identity = may_be and not any(name.startswith(ADAPTER) for name in tensors)
    return Adapter(*cuts, manifest.rectify, is_identity)


def empty_branch(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor], stitched: Stitched) -> Branch:
    """A branch without values yet: its head is the one that the metadata names, in the sizes of the file's tensors."""
    branch = Branch(stitched, _head(path, manifest, tensors))
    rivals = tensors.get(RIVALS)
    if rivals is not None:
        n_new = len(manifest.classes)
        if rivals.dim() != 2 or len(rivals) <= n_new:
            raise FileFormatError(
                f"{path} is damaged: {RIVALS!r} must be a matrix of more than {n_new} rows; it is {described(rivals)}"
            )
        branch.rivals = torch.zeros(rivals.shape)
    return branch


def _head(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> Head:
    n_base, n_new = len(manifest.base_classes), len(manifest.classes)

    def sizes(prefix: str, n_rows: int) -> tuple[int, int]:
        name = f"{HEAD}{prefix}weight"
        weight = tensors.get(name)
        if weight is None or weight.dim() != 2:
            raise FileFormatError(f"{path} is damaged: the tensor {name!r} is missing or not a matrix")
        if len(weight) != n_rows:
            raise FileFormatError(f"{path} is damaged: {name!r} has {len(weight)} rows; its class names need {n_rows}")
        return n_rows, weight.shape[1]

    def discriminants(prefix: str) -> DiscriminantHead:
        return DiscriminantHead(n_base, *sizes(prefix, n_base + n_new))

    def own(prefix: str) -> SourceHead:
        return SourceHead(*sizes(prefix, n_new))

    if manifest.head == StackedHead.kind:
        return StackedHead(discriminants("discriminants."), own("own."))
    return discriminants("") if manifest.head == DiscriminantHead.kind else own("")


def fitted_tensors(branch: Branch) -> dict[str, Tensor]:
    """All tensors of a branch except the source's part, by their names in the file."""
    return {
        **{f"{ADAPTER}{name}": tensor for name, tensor in branch.stitched.adapter.state_dict().items()},
        **{f"{HEAD}{name}": tensor for name, tensor in branch.head.state_dict().items()},
        **{f"{CALIBRATION}{name}": tensor for name, tensor in branch.named_buffers(recurse=False)},
    }


def check_head(path: str | Path, branch: Branch, manifest: Manifest) -> None:
    """Run the head once, on zeros of the right sizes."""
    n_base, n_features = len(manifest.base_classes), manifest.target_features.n_channels
    sizes = n_features, branch.stitched.features.n_channels, n_base
    if branch.rivals.shape[1] != sizes[1] + 1:
        raise FileFormatError(
            f"{path} is damaged: {RIVALS!r} has rows of {branch.rivals.shape[1]} values; {sizes[1] + 1} are needed"
        )
    try:
        branch.head(*(torch.zeros(1, size) for size in sizes))
    except RuntimeError as error:
        raise FileFormatError(
            f"{path} is damaged: its head does not fit {sizes[0]} features of the target and {sizes[1]} of the source"
        ) from error


def described(tensor: Tensor) -> str:
    """Shape and type of a tensor, for messages."""
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"


def check_image_size(path: str | Path, source: nn.Module, manifest: Manifest) -> None:
    """Dry-run the source on large images, and refuse the file if no tensor has the shape of its cut."""
    if math.prod(manifest.input_shape) <= _LARGE_IMAGE:
        return
    shapes = shapes_without_values(source, manifest.input_shape)
    cut = manifest.source_cut
    if shapes is not None and cut.shape not in shapes:
        raise MismatchError(
            f"{path} enters the source at {cut.name!r} with shape {cut.shape}, but on images {manifest.input_shape} "
            "this source has no tensor of that shape; load it with the source it was made from"
        )


def rebuilt_body(
    path: str | Path, recording: Recording, manifest: Manifest, tensors: Mapping[str, Tensor], deltas: Deltas | None
) -> tuple[nn.Module, ChannelMasks | None, CutPoint]:
    """Rebuild the source's part: cut it from the recording, compact it, add deltas, copy the tensors of the file."""
    cut = manifest.source_cut
    if not any(cut.is_same_place(other) for other in cut_points(recording)):
        raise MismatchError(
            f"{path} enters the source at {cut.name!r} with shape {cut.shape}, which this source does not have; "
            "load it with the source it was made from"
        )
    features = find_head(recording).features
    segment = extract(recording, cut, [features])
    masks = None
    if MASKS in tensors:
        spaces = channel_spaces(segment)
        masks = ChannelMasks.from_bytes(tensors[MASKS].numpy().tobytes(), spaces.sizes)
        body: nn.Module = compact(segment, spaces, masks)
    else:
        body = own_copy(segment)
    if deltas is not None:
        (merge if manifest.kind == "thin" else check_fit)(body, deltas, str(path))
    state = body.state_dict()
    own = {name.removeprefix(BODY): tensor for name, tensor in tensors.items() if name.startswith(BODY)}
    wanted = body_names(state, manifest.kind, masks is not None or deltas is not None)
    for name in sorted(own.keys() ^ set(wanted)):
        what = "has a tensor {!r} that is not in" if name in own else "lacks the tensor {!r} of"
        raise MismatchError(f"{path} {what.format(name[:80])} this source; load it with the one it was made from")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise MismatchError(
                f"{path} has {name!r} as {described(tensor)}, this source as {described(state[name])}; "
                "load it with the source it was made from"
            )
        state[name].copy_(tensor)
    return body, masks, features


def check_stored_body(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Build the part that a file describes from tensors on the meta device, and try it: nothing takes memory.

    Raises:
        FileFormatError: the tensors do not fit the structure, or an operation cannot run.
    """
    assert manifest.part is not None
    own = _own_tensors(tensors)
    try:
        part = empty_part(manifest.part)
    except FAILURES as error:
        raise FileFormatError(f"{path} is damaged: its part cannot be built: {_first_line(error)}") from error
    reason = misfit(manifest.part, part, own)
    if reason is None:
        fill(part, own)
        reason = dry_run(part, manifest.source_cut.shape, manifest.part.features.shape)
    if reason is not None:
        raise FileFormatError(f"{path} is damaged: {reason}")


def stored_body(
    path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor], deltas: Deltas | None
) -> tuple[nn.Module, ChannelMasks | None, CutPoint]:
    """Rebuild the source's part from what its file holds, without the source.

    Raises:
        InputError: the file does not hold the part.
        MismatchError, FileFormatError: masks or deltas do not fit it, or it cannot run.
    """
    if manifest.part is None:
        why = "a thin file, which leaves the source's weights in the source"
        way_out = "give the network that it was made from, or save the clone with kind='full'"
        if manifest.kind == "full":
            why = "a full file without the structure of the source's part"
            way_out = "give a network of the source's architecture"
        raise InputError(f"source: {path} is {why}; {way_out}")
    body = empty_part(manifest.part)
    fill(body, _own_tensors(tensors))
    try:
        with undisturbed(), torch.no_grad():
            body(torch.zeros(1, *manifest.source_cut.shape, dtype=first_dtype(body)))
    except FAILURES as error:
        raise FileFormatError(f"{path} is damaged: its part cannot run: {_first_line(error)}") from error
    masks = None
    if MASKS in tensors:
        masks = ChannelMasks.from_bytes(tensors[MASKS].numpy().tobytes(), manifest.part.spaces)
    if deltas is not None:
        check_fit(body, deltas, str(path))
    return body, masks, manifest.part.features


def _own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the source's part by their names in it."""
    named = ((name.partition("."), tensor) for name, tensor in tensors.items())
    return {name: tensor for (prefix, dot, name), tensor in named if prefix + dot in (BODY, HIDDEN)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def body_names(state: Mapping[str, Tensor], kind: FileKind, changed: bool) -> list[str]:
    """The tensors of the source's part that a file includes: all, or only recomputed statistics."""
    return [name for name in state if kind == "full" or (changed and name.endswith(STATISTICS))]
