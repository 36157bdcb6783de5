"""A target as a composite runs it: recorded, watched, and cut at the tensors that clones read."""

from collections.abc import Iterable
from functools import cached_property

from torch import Tensor, fx, nn

from pnc.clones.clone import Clone
from pnc.composite.clone_checks import Places, check_forward, check_places, check_target
from pnc.composite.direct_calls import called_directly, flattened
from pnc.composite.target_watch import TargetWatch
from pnc.foundation.fingerprints import KnownFingerprint
from pnc.foundation.network_state import images_for
from pnc.graph.cut_points import LOGITS, extract
from pnc.graph.forward_prints import ForwardPrint, forward_print
from pnc.graph.recording import record, unwrapped


class RecordedTarget:
    """A recording of a target, and what is made of it.

    Args:
        target: The network.
        input_shape: Of one of its images.
        known: Its fingerprint, if that was computed before.
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
        """Images like those that it was recorded with."""
        return self._recording.probe

    @cached_property
    def forward_print(self) -> ForwardPrint:
        """What the target does with its weights."""
        return forward_print(self._target, self._recording)

    def check(self, clones: Iterable[Clone], allow_mismatch: bool) -> None:
        """Compare the target with what clones were made for.

        Raises:
            MismatchError: a clone was made for another target; with `allow_mismatch`, it does not fit to this one. Or
                the target has changed since it was recorded.
        """
        clones = list(clones)
        self.watch.check()
        if not allow_mismatch:
            check_target(self._target, clones, self._known)
            check_forward(self.forward_print, clones)
        for clone in clones:
            check_places(self._places, clone)

    def trunk(self, cuts: tuple[str, ...]) -> fx.GraphModule:
        """The target up to its logits, with the tensors at `cuts`; kept, so that compiled code of it stays of use."""
        if cuts not in self._trunks:
            self._trunks[cuts] = called_directly(flattened(extract(self._recording, None, [*cuts, LOGITS])))
        return self._trunks[cuts]
