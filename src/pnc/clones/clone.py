"""A clone as data: the module that is attached, and how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pnc.channels.channel_masks import ChannelMasks
from pnc.clones.branch import Branch
from pnc.clones.deltas import Deltas
from pnc.clones.description import HeldOut, clone_lines, held_out_of
from pnc.foundation.argument_checks import came
from pnc.foundation.class_names import MAX_TEXT, check_class_names, class_ids, is_name
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import checked_path
from pnc.foundation.fingerprints import Fingerprint
from pnc.foundation.plain_text import facts_text, few_names
from pnc.graph.cut_points import CutPoint
from pnc.graph.forward_prints import ForwardPrint

_FOREIGN_SUFFIXES = frozenset(
    {".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pkl", ".pickle", ".npz", ".h5", ".json", ".pt2", ".gguf"}
)


@dataclass(frozen=True, eq=False)
class Clone:
    """A part of a source that gives a target new classes. `clone` makes it, `load` reads it, `attach` runs it.

    Attributes:
        name: Its name, by which it can be detached.
        classes: The new classes, in the order of its logits.
        base_classes: The classes of the target that it was made for.
        branch: The module that is attached; it holds its own copies of all weights.
        masks: The channels of the source's part that were kept; None for all.
        deltas: How tuning changed the part's weights, already merged into them; None if nothing was tuned.
        source: Fingerprint of the source.
        target: Fingerprint of the target.
        input_shape: Shape of the target's images, (C, H, W).
        target_features: The cut of the target's features that the head reads: the penultimate ones or, without base
            samples, the input of its last BatchNorm layer.
        recipe: How it was made and how it scored, as plain values.
        source_forward: Forward print of the source; None if the clone's file has none.
        target_forward: Forward print of the target; None if the clone's file has none.
    """

    name: str
    classes: tuple[str, ...]
    base_classes: tuple[str, ...]
    branch: Branch
    masks: ChannelMasks | None
    source: Fingerprint
    target: Fingerprint
    input_shape: tuple[int, ...]
    target_features: CutPoint
    recipe: Mapping[str, Any]
    deltas: Deltas | None = None
    source_forward: ForwardPrint | None = None
    target_forward: ForwardPrint | None = None

    @property
    def target_cut(self) -> CutPoint:
        """Where it leaves the target."""
        return self.branch.stitched.adapter.target_cut

    @property
    def source_cut(self) -> CutPoint:
        """Where it enters the source."""
        return self.branch.stitched.adapter.source_cut

    @property
    def held_out(self) -> HeldOut:
        """Its scores on images of the support that its head was not fitted on."""
        return held_out_of(self.recipe)

    def __str__(self) -> str:
        cuts = self.target_cut, self.source_cut
        lines = clone_lines(self.name, self.classes, self.base_classes, cuts, self.recipe)
        return facts_text("Clone", {**lines, "values": f"{self.n_params:,} added to the target"})

    def __repr__(self) -> str:
        return f"Clone({self.name!r}: {few_names(self.classes)}; {self.target_cut.name} > {self.source_cut.name})"

    @property
    def n_params(self) -> int:
        """Number of values (parameters and buffers) that it adds to the target."""
        tensors = [*self.branch.parameters(), *self.branch.buffers()]
        return sum(tensor.numel() for tensor in tensors)

    def renamed(self, name: str | None = None, classes: Mapping[str, str] | None = None) -> "Clone":
        """Return the same clone with another name or other class names; it shares all weights.

        Args:
            name: The new name; None keeps the old one.
            classes: {old: new} for the classes to rename; None renames none.
        Raises:
            ClassNameError: a class is unknown, or two would have the same name.
            InputError: the name is empty or not printable.
        """
        check_name(name)
        if not isinstance(classes, Mapping | None):
            raise InputError(f"rename: expected {{old: new}}; got {came(classes)}")
        renames = dict(classes or {})
        if name is None and not renames:
            return self
        if renames:
            class_ids(list(renames), self.classes, "rename")
        names = check_class_names([renames.get(old, old) for old in self.classes], "rename")
        return replace(self, name=self.name if name is None else name, classes=names)


def check_name(name: str | None) -> None:
    """Refuse a clone's name that no file can hold; None stands for the default name."""
    if name is not None and not is_name(name):
        raise InputError(f"name: expected printable text of 1 to {MAX_TEXT} characters; got {name!r:.100}")


def check_clones(values: Sequence[object]) -> None:
    """Refuse an empty list, and anything in it that is not a clone, such as a path."""
    if not values:
        raise InputError("clones: give at least one")
    foreign = [one for one in values if not isinstance(one, Clone)]
    if not foreign:
        return
    wrong = foreign[0]
    hint = "; write *clones" if isinstance(wrong, list | tuple) else ""
    hint = f"; read the file first: pnc.load({str(wrong)!r})" if isinstance(wrong, str | Path) else hint
    raise InputError(
        f"clones: expected what pnc.clone or pnc.load returns, one by one; got {type(wrong).__name__}{hint}"
    )


def check_file_name(path: str | Path, argument: str = "path") -> None:
    """Refuse the suffix of another format, by which other programs would misread the file; `argument` names the path.

    Raises:
        InputError: the message gives the name with the right suffix.
    """
    checked_path(path, argument)
    path = Path(path)
    if path.suffix.lower() in _FOREIGN_SUFFIXES:
        raise InputError(
            f"{argument}: clone files are safetensors, and {path.name} looks like another format; "
            f"write {path.with_suffix('.safetensors').name}"
        )
