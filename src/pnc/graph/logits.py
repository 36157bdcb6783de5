"""Picks the logits from a network's output."""

from collections.abc import Mapping

from torch import Tensor

from pnc.foundation.errors import RecordingError
from pnc.graph.operation_tape import parts, tensors_in


def pick_logits(out: object) -> Tensor:
    """The logits in a network's output: the tensor itself, `.logits`, ["logits"], or the only tensor (B, K).

    Raises:
        RecordingError: no tensor has the shape (B, K), or several could be the logits.
    """
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, Mapping):
        logits = out.get("logits")
    if logits is None:
        found = _named_tensors(out)
        fitting = {name: tensor for name, tensor in found.items() if _may_be_logits(tensor)}
        if len(fitting) > 1:
            shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in fitting.items())
            raise RecordingError(
                f"the network returns several tensors that could be the logits ({shapes}); choose one with "
                f"pnc.Output(network, output={next(iter(fitting))})"
            )
        logits = next(iter((fitting or found).values()), None)
    if not isinstance(logits, Tensor) or not _may_be_logits(logits):
        what = type(out).__name__
        if isinstance(logits, Tensor):
            what = f"a tensor {tuple(logits.shape)} of {logits.dtype}"
        raise RecordingError(f"the network must return logits (B, K), but returns {what}")
    return logits


def _may_be_logits(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


def _named_tensors(out: object) -> dict[str, Tensor]:
    """The tensors of an output, each by the value of `output=` that would choose it."""
    found: dict[str, Tensor] = {}
    for key, value in parts(out) or [(0, out)]:
        inside = tensors_in(value)
        for place, tensor in enumerate(inside):
            found[repr(key) if len(inside) == 1 else f"({key!r}, {place})"] = tensor
    return found
