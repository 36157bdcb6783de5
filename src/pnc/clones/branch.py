"""The module that a clone adds to a target: an adapter, a part of the source, a head, and calibration scalars."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pnc.clones.adapter import Stitched
from pnc.clones.heads import DiscriminantHead, Head, StackedHead
from pnc.foundation.argument_checks import came
from pnc.foundation.errors import InputError
from pnc.graph.nodes import info


@dataclass(frozen=True)
class Scalars:
    """What calibration changes in a clone. For each class, its log-odds l against the base become

        scale * l + offset + log p(own class | own class or rival; the clone's features).

    Attributes:
        scale: Above 0; 1 changes nothing.
        offsets: In nats, one for each class; None changes nothing.
        rivals: Linear discriminants on the clone's features, a row of D_s weights and a constant for each class: first
            the classes of other clones, then its own. Empty changes nothing.
    """

    scale: float = 1.0
    offsets: tuple[float, ...] | None = None
    rivals: tuple[tuple[float, ...], ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed: then the logits stay the same bit for bit."""
        return self.scale == 1 and not any(self.offsets or ()) and not self.rivals


class Branch(nn.Module):
    """Adapter, part of the source, head, and calibration scalars. It stays in eval mode: `train` changes nothing.

    Args:
        stitched: Adapter and part of the source.
        head: Gives the logits of the new classes.
    """

    def __init__(self, stitched: Stitched, head: Head) -> None:
        super().__init__()
        self.stitched, self.head = stitched, head
        nodes = cast(fx.GraphModule, stitched.body).graph.nodes
        self.n_macs = stitched.adapter.n_macs + sum(info(node).n_macs for node in nodes)
        self.register_buffer("gain", torch.zeros(1))
        self.register_buffer("offset", torch.zeros(_n_new(head)))
        self.register_buffer("rivals", torch.zeros(0, stitched.features.n_channels + 1))
        self.gain: Tensor
        self.offset: Tensor
        self.rivals: Tensor
        self.requires_grad_(False)
        for module in self.modules():
            module.training = False

    def forward(self, tensor: Tensor, target_features: Tensor, base_logits: Tensor) -> Tensor:
        """Return the logits of the new classes, (B, K_new).

        Args:
            tensor: The target's tensor at its cut.
            target_features: The target's features that the head reads, (B, D_t).
            base_logits: The target's logits, (B, K_base).
        """
        features = self.stitched(tensor)
        logits: Tensor = self.head(target_features, features, base_logits)
        moved = logits + self.gain * (logits - base_logits.logsumexp(1, keepdim=True)) + self.offset
        if len(self.rivals):
            return (moved + F.logsigmoid(against_rivals(features, self.rivals, len(self.offset)))).to(logits.dtype)
        # Without calibration, exactly the head's logits.
        return torch.where((self.gain == 0) & (self.offset == 0), logits, moved.to(logits.dtype))

    def head_logits(self, tensor: Tensor, target_features: Tensor, base_logits: Tensor) -> Tensor:
        """Return the logits of the new classes without calibration, (B, K_new); arguments as in `forward`."""
        logits: Tensor = self.head(target_features, self.stitched(tensor), base_logits)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Change nothing: running statistics must not move."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast and move; head and scalars, differences of large sums, stay in 32 bits where the rest gets 16."""
        parts: list[nn.Module] = [self, *self.head.modules()]
        kept = [(part, name, tensor) for part in parts for name, tensor in part._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part, name, before in kept:
            now = part._buffers[name]
            if before is not None and now is not None and now.element_size() < 4 <= before.element_size():
                part._buffers[name] = before.to(now.device, torch.float32)
        return self

    @property
    def scalars(self) -> Scalars:
        """The calibration scalars, as numbers."""
        rivals = tuple(map(tuple, self.rivals.tolist()))
        return Scalars(1 + float(self.gain), tuple(self.offset.tolist()), rivals)

    def rescaled(self, scalars: Scalars) -> "Branch":
        """Return a branch over the same tensors with other scalars.

        Raises:
            InputError: the scalars are not finite, the scale is not above 0, there is not one offset for each class, or
                the rows of rivals do not match this clone's features and classes.
        """
        if not isinstance(scalars, Scalars):
            raise InputError(f"scalars: expected Scalars; got {came(scalars)}")
        offsets = scalars.offsets or (0.0,) * len(self.offset)
        if len(offsets) != len(self.offset):
            raise InputError(f"offsets: expected one for each of {len(self.offset)} classes; got {len(offsets)}")
        if not (math.isfinite(scalars.scale) and scalars.scale > 0 and all(map(math.isfinite, offsets))):
            raise InputError(f"scalars: expected a finite scale above 0 and finite offsets; got {scalars}")
        width, least = self.rivals.shape[1], len(self.offset) + 1 if scalars.rivals else 0
        if len(scalars.rivals) < least or any(len(row) != width for row in scalars.rivals):
            raise InputError(
                f"rivals: expected at least {least} rows of {width} values, the last {len(self.offset)} for the "
                f"clone's own classes; got {len(scalars.rivals)} rows"
            )
        rivals = self.rivals.new_tensor(scalars.rivals).reshape(-1, width)
        if not bool(rivals.isfinite().all()):
            raise InputError("rivals: expected finite values")
        branch = copy.copy(self)
        branch._buffers = {
            "gain": self.gain.new_full((1,), scalars.scale - 1),
            "offset": self.offset.new_tensor(offsets),
            "rivals": rivals,
        }
        return branch

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take as many rivals as the state dict has, so that calibrated and other clones can load each other's."""
        rivals = state_dict.get(f"{prefix}rivals")
        if rivals is not None and rivals.dim() == 2 and rivals.shape[1] == self.rivals.shape[1]:
            self.rivals = self.rivals.new_zeros(rivals.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def against_rivals(features: Tensor, rivals: Tensor, n_own: int) -> Tensor:
    """Return the log-odds of a clone's own classes against those of other clones, (B, 1).

    Args:
        features: The clone's features, (B, D_s).
        rivals: (R + n_own, D_s + 1), as in `Scalars`.
        n_own: Number of the clone's own classes.
    """
    scores = F.linear(features.to(rivals.dtype), rivals[:, :-1], rivals[:, -1])
    return scores[:, -n_own:].logsumexp(1, keepdim=True) - scores[:, :-n_own].logsumexp(1, keepdim=True)


def _n_new(head: Head) -> int:
    """Number of new classes of a head."""
    if isinstance(head, StackedHead):
        return _n_new(head.own)
    return len(head.bias) - (head.n_base if isinstance(head, DiscriminantHead) else 0)
