"""Clone files: safetensors of kilobytes that hold what was fitted, and say which networks they belong to.

A `thin` file leaves the source's weights out: loading it takes them from the source, whose fingerprint it names. A
`full` file carries the kept weights; loading it needs only a network of the source's architecture.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, own_copy
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.branch import Branch
from pnc.clones.clone import Clone, check_file_name
from pnc.clones.deltas import DTYPES, Deltas, check_fit, deltas_in, merge
from pnc.clones.heads import DiscriminantHead, Head, SourceHead, StackedHead
from pnc.clones.manifest import FileKind, Manifest, read_manifest
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import FileFormatError, InputError, MismatchError, PNCWarning
from pnc.foundation.fingerprints import fingerprint, first_difference
from pnc.foundation.network_state import images_for
from pnc.foundation.tensor_bits import dtype_name
from pnc.foundation.tensor_files import DIGEST_KEY, read_sealed, write_tensors
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import CutPoint, cut_points, extract
from pnc.graph.dry_run import shapes_without_values
from pnc.graph.forward_prints import ForwardPrint, forward_difference, forward_print
from pnc.graph.recording import Recording, record

__all__ = ["FileKind", "inspect", "load", "read_clone_file", "save"]

_STATISTICS = ("running_mean", "running_var")
_ADAPTER, _HEAD, _BODY, _CALIBRATION, _MASKS = "adapter.", "head.", "body.", "calibration.", "masks"
_LARGE_IMAGE = 1 << 18
"""Values of an image, about 3x295x295, from which on the source is tried without values before it is recorded."""
_RIVALS = f"{_CALIBRATION}rivals"
_DELTAS = "deltas."


def save(clone: Clone, path: str | Path, kind: FileKind = "thin") -> int:
    """Write a clone to a file, whole or not at all; the same clone gives the same bytes.

    Args:
        clone: What to save.
        path: Where to; an existing file is replaced.
        kind: "thin" leaves out the weights that the source has; "full" carries them.
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
    check_file_name(path)
    tensors = {name: _short(name, tensor) for name, tensor in _fitted(clone.branch).items() if tensor.numel()}
    if clone.branch.scalars.is_identity:  # which is what a file without them stands for
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_CALIBRATION)}
    if clone.masks is not None:
        tensors[_MASKS] = torch.frombuffer(bytearray(clone.masks.to_bytes()), dtype=torch.uint8)
    if clone.deltas is not None:
        tensors |= {f"{_DELTAS}{name}": tensor for name, tensor in clone.deltas.tensors.items()}
    tensors |= {f"{_BODY}{name}": tensor for name, tensor in _body_tensors(clone, kind).items()}
    broken = _not_finite(tensors)
    if broken:
        raise InputError(f"clone: {broken} holds values that are not finite, and no reader would take it; clone again")
    write_tensors(path, tensors, _manifest(clone, kind).facts())
    return Path(path).stat().st_size


def _short(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the head in half precision, where that holds its values exactly."""
    short = tensor.half()
    return short if name.startswith(_HEAD) and torch.equal(short.to(tensor.dtype), tensor) else tensor


def _body_tensors(clone: Clone, kind: FileKind) -> dict[str, Tensor]:
    state = clone.branch.stitched.body.state_dict()
    return {name: state[name] for name in _body_names(state, kind, clone.masks is not None or clone.deltas is not None)}


def _body_names(state: Mapping[str, Tensor], kind: FileKind, changed: bool) -> list[str]:
    """Which tensors of the source's part a file carries: all, or the statistics that were estimated anew."""
    return [name for name in state if kind == "full" or (changed and name.endswith(_STATISTICS))]


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    wrong = (n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all()))
    return next(wrong, None)


def _manifest(clone: Clone, kind: FileKind) -> Manifest:
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
    )


def inspect(path: str | Path) -> dict[str, Any]:
    """Say what a clone file holds, without any network; checks all that can be checked without one.

    Returns:
        The metadata of the file as plain values, with `n_bytes`, and `n_values`: how many numbers its tensors hold.
    Raises:
        FileFormatError: the file is damaged, no clone file, or of a newer version of the format.

    >>> _ = pnc.save(clone, "pets.safetensors")
    >>> pnc.inspect("pets.safetensors")["classes"]
    ['cat', 'dog']
    """
    tensors, manifest = read_clone_file(path)
    facts = manifest.facts()
    facts["n_bytes"] = Path(path).stat().st_size
    facts["n_values"] = sum(tensor.numel() for tensor in tensors.values())
    return facts


def load(
    path: str | Path,
    *,
    source: nn.Module,
    allow_mismatch: bool = False,
    input_shape: Sequence[int] | None = None,
) -> Clone:
    """Read a clone from a file.

    Args:
        path: A file that `save` wrote.
        source: The network that the clone was made from; for a full file any network of the same architecture. It
            stays as it is, and the clone gets its own copies of the weights that it needs.
        allow_mismatch: Take another source too, such as a fine-tuned one, if the file's tensors fit to it. Nobody has
            measured what comes out.
        input_shape: (C, H, W) of your images. A file for others is refused before any work; without it the source is
            recorded on images as large as the file says, of up to 2^24 values: give it for files of strangers.
    Raises:
        FileFormatError: the file is damaged, no clone file, or of a newer version of the format.
        MismatchError: `source` is another network than the one that the file names; with `allow_mismatch`, the file's
            tensors do not fit to it.
        RecordingError: `source` cannot be recorded.

    >>> _ = pnc.save(clone, "pets.safetensors")
    >>> pnc.attach(target, pnc.load("pets.safetensors", source=source)).clones
    ('cat+dog',)
    """
    check_module(source, "source")
    tensors, manifest = read_clone_file(path)
    if input_shape is not None and tuple(input_shape) != manifest.input_shape:
        raise MismatchError(f"{path} is for images {manifest.input_shape}, not {tuple(input_shape)}; take another file")
    difference = first_difference(source, manifest.source, structure_only=manifest.kind == "full")
    if difference is not None and not allow_mismatch:
        raise MismatchError(
            f"{path} was made from another source: {difference}; load it with the source it was made from, or with "
            "allow_mismatch=True to accept this"
        )
    _check_size(path, source, manifest)
    recording = record(source, images_for(source, manifest.input_shape))
    forward = forward_print(source, recording)
    if not allow_mismatch:
        _check_forward(path, manifest, forward)
    deltas = deltas_in(tensors, _DELTAS)
    body, masks, features = _body(path, recording, manifest, tensors, deltas)
    branch = _skeleton(path, manifest, tensors, Stitched(_adapter(manifest, tensors), body, features)).cpu()
    for name, tensor in _fitted(branch).items():
        if name in tensors:
            tensor.copy_(tensors[name])
    _check_head(path, branch, manifest)
    is_other = difference is not None and manifest.kind == "thin"  # its weights are in the clone then
    return Clone(
        name=manifest.name,
        classes=manifest.classes,
        base_classes=manifest.base_classes,
        branch=branch,
        masks=masks,
        deltas=deltas,
        source=fingerprint(source) if is_other else manifest.source,
        target=manifest.target,
        input_shape=manifest.input_shape,
        source_input_shape=manifest.input_shape,
        target_features=manifest.target_features,
        recipe=manifest.recipe,
        source_forward=forward if is_other else manifest.source_forward,
        target_forward=manifest.target_forward,
    )


def _check_forward(path: str | Path, manifest: Manifest, found: ForwardPrint) -> None:
    """Refuse a source that does something else with the weights than the one that the file names."""
    if manifest.source_forward is None:
        warnings.warn(
            f"{path} is of an earlier version of pnc and says nothing of what its networks do with their weights: only "
            "the weights were compared; save the clone again",
            PNCWarning,
            stacklevel=3,
        )
        return
    difference = forward_difference(found, manifest.source_forward, weights=manifest.kind == "thin")
    if difference is None:
        return
    if difference.is_other:
        raise MismatchError(
            f"{path} was made from another source, with the same weights and another forward pass: {difference.text}; "
            "load it with the source it was made from, or with allow_mismatch=True to accept this"
        )
    warnings.warn(
        f"source: {difference.text}, compared with the one that {path} was made from; its answers to a test pattern "
        "are the same",
        PNCWarning,
        stacklevel=3,
    )


def read_clone_file(path: str | Path) -> tuple[dict[str, Tensor], Manifest]:
    """Read a file and check all that needs no network: names, types and shapes first, before values are read.

    Raises:
        FileFormatError: as `load`.
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
    """The manifest of a file whose tensors, on the meta device, are those that it asks for."""
    manifest = read_manifest(path, {key: value for key, value in facts.items() if key != DIGEST_KEY})
    if facts.get(DIGEST_KEY) is None:
        raise FileFormatError(f"the metadata of {path} is damaged: it names no digest of the content")
    with torch.device("meta"):
        stitched = Stitched(_adapter(manifest, tensors), fx.GraphModule({}, fx.Graph()), manifest.source_cut)
        expected = _fitted(_skeleton(path, manifest, tensors, stitched))
    for name in expected:
        optional = name.startswith(_CALIBRATION) or not expected[name].numel()
        if name not in tensors and not optional:
            raise FileFormatError(f"{path} is damaged: the tensor {name!r} is missing")
    for name, tensor in tensors.items():
        if name.startswith(_BODY):
            continue
        if name == _MASKS:
            wanted: tuple[Any, Any] = torch.uint8, tensor.shape[:1]
        elif name.startswith(_DELTAS) and name.removeprefix(_DELTAS) in DTYPES and manifest.version > 1:
            wanted = DTYPES[name.removeprefix(_DELTAS)], tensor.shape[:1]
        elif name in expected:
            wanted = expected[name].dtype, expected[name].shape
        else:
            raise FileFormatError(f"{path} is damaged: there is no place for a tensor {name[:80]!r} in a clone")
        if name.startswith(_HEAD) and tensor.dtype == torch.float16:
            wanted = torch.float16, wanted[1]
        if (tensor.dtype, tensor.shape) != wanted:
            raise FileFormatError(
                f"{path} is damaged: {name!r} is {_described(tensor)}, its metadata asks for "
                f"{tuple(wanted[1])} {dtype_name(wanted[0])}"
            )
    return manifest


def _adapter(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter, with no values yet: between cuts that are alike, one without weights in the file is the identity."""
    cuts = manifest.target_cut, manifest.source_cut
    may_be = cuts[0].is_alike(cuts[1]) and not manifest.rectify
    is_identity = may_be and not any(name.startswith(_ADAPTER) for name in tensors)
    return Adapter(*cuts, manifest.rectify, is_identity)


def _skeleton(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor], stitched: Stitched) -> Branch:
    """A branch with the head that the metadata names, as large as the file's tensors say, and no values yet."""
    branch = Branch(stitched, _head(path, manifest, tensors))
    rivals = tensors.get(_RIVALS)
    if rivals is not None:
        n_new = len(manifest.classes)
        if rivals.dim() != 2 or len(rivals) <= n_new:
            raise FileFormatError(
                f"{path} is damaged: {_RIVALS!r} must be a matrix of more than {n_new} rows; it is {_described(rivals)}"
            )
        branch.rivals = torch.zeros(rivals.shape)
    return branch


def _head(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> Head:
    n_base, n_new = len(manifest.base_classes), len(manifest.classes)

    def sizes(prefix: str, n_rows: int) -> tuple[int, int]:
        name = f"{_HEAD}{prefix}weight"
        weight = tensors.get(name)
        if weight is None or weight.dim() != 2:
            raise FileFormatError(f"{path} is damaged: the tensor {name!r} is missing or no matrix")
        if len(weight) != n_rows:
            raise FileFormatError(
                f"{path} is damaged: {name!r} has {len(weight)} rows; its class names ask for {n_rows}"
            )
        return n_rows, weight.shape[1]

    def discriminants(prefix: str) -> DiscriminantHead:
        return DiscriminantHead(n_base, *sizes(prefix, n_base + n_new))

    def own(prefix: str) -> SourceHead:
        return SourceHead(*sizes(prefix, n_new))

    if manifest.head == StackedHead.kind:
        return StackedHead(discriminants("discriminants."), own("own."))
    return discriminants("") if manifest.head == DiscriminantHead.kind else own("")


def _fitted(branch: Branch) -> dict[str, Tensor]:
    """What a file holds of a branch beside the source's part, by name in the file."""
    return {
        **{f"{_ADAPTER}{name}": tensor for name, tensor in branch.stitched.adapter.state_dict().items()},
        **{f"{_HEAD}{name}": tensor for name, tensor in branch.head.state_dict().items()},
        **{f"{_CALIBRATION}{name}": tensor for name, tensor in branch.named_buffers(recurse=False)},
    }


def _check_head(path: str | Path, branch: Branch, manifest: Manifest) -> None:
    """Run the head once, on zeros of the sizes that it will meet."""
    n_base, n_features = len(manifest.base_classes), manifest.target_features.n_channels
    sizes = n_features, branch.stitched.features.n_channels, n_base
    if branch.rivals.shape[1] != sizes[1] + 1:
        raise FileFormatError(
            f"{path} is damaged: {_RIVALS!r} has rows of {branch.rivals.shape[1]} values; {sizes[1] + 1} are needed"
        )
    try:
        branch.head(*(torch.zeros(1, size) for size in sizes))
    except RuntimeError as error:
        raise FileFormatError(
            f"{path} is damaged: its head does not fit to {sizes[0]} and {sizes[1]} features of target and source"
        ) from error


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"


def _check_size(path: str | Path, source: nn.Module, manifest: Manifest) -> None:
    """Refuse large images of which the source makes nothing of the shape that the file names, before it runs on any."""
    if math.prod(manifest.input_shape) <= _LARGE_IMAGE:
        return
    shapes = shapes_without_values(source, manifest.input_shape)
    cut = manifest.source_cut
    if shapes is not None and cut.shape not in shapes:
        raise MismatchError(
            f"{path} enters the source at {cut.name!r} with shape {cut.shape}, but of images {manifest.input_shape} "
            "this source makes nothing of that shape; load it with the source it was made from"
        )


def _body(
    path: str | Path, recording: Recording, manifest: Manifest, tensors: Mapping[str, Tensor], deltas: Deltas | None
) -> tuple[nn.Module, ChannelMasks | None, CutPoint]:
    """Rebuild the source's part: recorded anew, cut, compacted, changed by deltas; some tensors are the file's own."""
    cut = manifest.source_cut
    if not any(cut.is_same_place(other) for other in cut_points(recording)):
        raise MismatchError(
            f"{path} enters the source at {cut.name!r} with shape {cut.shape}, which this source does not have; "
            "load it with the source it was made from"
        )
    features = find_head(recording).features
    segment = extract(recording, cut, [features])
    masks = None
    if _MASKS in tensors:
        spaces = channel_spaces(segment)
        masks = ChannelMasks.from_bytes(tensors[_MASKS].numpy().tobytes(), spaces)
        body: nn.Module = compact(segment, spaces, masks)
    else:
        body = own_copy(segment)
    if deltas is not None:
        (merge if manifest.kind == "thin" else check_fit)(body, deltas, str(path))
    state = body.state_dict()
    own = {name.removeprefix(_BODY): tensor for name, tensor in tensors.items() if name.startswith(_BODY)}
    wanted = _body_names(state, manifest.kind, masks is not None or deltas is not None)
    for name in sorted(own.keys() ^ set(wanted)):
        what = "carries a tensor {!r} that has no place in" if name in own else "lacks the tensor {!r} of"
        raise MismatchError(f"{path} {what.format(name[:80])} this source; load it with the one it was made from")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise MismatchError(
                f"{path} carries {name!r} as {_described(tensor)}, this source has it as {_described(state[name])}; "
                "load it with the source it was made from"
            )
        state[name].copy_(tensor)
    return body, masks, features
