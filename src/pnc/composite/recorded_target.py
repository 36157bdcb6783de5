"""The target as a composite runs it: recorded, watched, and cut at the tensors that clones read."""

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import Tensor, fx, nn

from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.composite.clone_checks import Places, check_forward, check_places, check_target
from pnc.composite.direct_calls import called_directly, flattened
from pnc.composite.forward_plan import Plan
from pnc.composite.target_watch import TargetWatch
from pnc.foundation.fingerprints import KnownFingerprint
from pnc.foundation.network_state import images_for
from pnc.graph.cut_points import LOGITS, extract
from pnc.graph.forward_prints import ForwardPrint, forward_print
from pnc.graph.recording import record, unwrapped


class RecordedTarget:
    """A recording of a target, its watch, and the plans that run it.

    Args:
        target: The network.
        input_shape: Shape of one image.
        known: Caches the target's fingerprint.
    Raises:
        RecordingError: the target cannot be recorded.
    """

    def __init__(self, target: nn.Module, input_shape: tuple[int, ...], known: KnownFingerprint) -> None:
        self._target, self._known = target, known
        self._recording = record(target, images_for(target, input_shape))
        self._places = Places.of(self._recording)
        self.watch = TargetWatch(unwrapped(target), self._recording.module.graph)
        self._trunks: dict[tuple[str, ...], fx.GraphModule] = {}

    @property
    def probe(self) -> Tensor:
        """The images that it was recorded with."""
        return self._recording.probe

    @cached_property
    def forward_print(self) -> ForwardPrint:
        """Print of the target's forward pass."""
        return forward_print(self._target, self._recording)

    def check(self, clones: Iterable[Clone], allow_mismatch: bool) -> None:
        """Compare the target with the one that each clone was made for.

        Raises:
            MismatchError: a clone was made for another target; with `allow_mismatch`, it does not fit this one. Or the
                target has changed since it was recorded.
        """
        clones = list(clones)
        self.watch.check()
        if not allow_mismatch:
            check_target(self._target, clones, self._known)
            check_forward(self.forward_print, clones)
        for clone in clones:
            check_places(self._places, clone)

    def plan(self, base_classes: tuple[str, ...], pairs: Sequence[tuple[Clone, Branch]], base_priority: float) -> Plan:
        """Plan the forward pass of the target with some clones.

        Args:
            base_classes: Names of the target's logits.
            pairs: Each clone with the composite's copy of its branch, in the order of their logits.
            base_priority: Nats subtracted from the new logits.
        """
        taps, views = [clone.target_cut for clone, _ in pairs], [clone.target_features for clone, _ in pairs]
        cuts, features = tuple(dict.fromkeys(taps)), tuple(dict.fromkeys(views))
        return Plan(
            trunk=self._trunk(tuple(cut.name for cut in (*cuts, *features))),
            features=features,
            taps=tuple(map(cuts.index, taps)),
            views=tuple(map(features.index, views)),
            names=tuple(clone.name for clone, _ in pairs),
            branches=tuple(branch for _, branch in pairs),
            calibrated=tuple(not branch.scalars.is_identity for _, branch in pairs),
            classes=(*base_classes, *(name for clone, _ in pairs for name in clone.classes)),
            base_priority=base_priority,
            clones=tuple(clone for clone, _ in pairs),
            probe=self.probe,
            watch=self.watch,
        )

    def _trunk(self, cuts: tuple[str, ...]) -> fx.GraphModule:
        """The target up to the tensors at `cuts` and its logits; cached, so that compiled code can be reused."""
        if cuts not in self._trunks:
            self._trunks[cuts] = called_directly(flattened(extract(self._recording, None, [*cuts, LOGITS])))
        return self._trunks[cuts]
