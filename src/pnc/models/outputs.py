"""A network of which one output is chosen as the logits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import InputError


class Output(nn.Module):
    """A network of which one output is chosen as the logits, for networks that return several tensors.

    Use it as a source or a target in place of the network: `pnc.Output(network, output=-1)`. Its fingerprint is that of
    the network; a clone's file recognizes another choice of output by the logits.

    Args:
        network: Returns a tuple, list, mapping or object of tensors. It becomes a submodule, unchanged.
        output: Index in a tuple or list, key of a mapping, or name of an attribute; a tuple of these if nested.
    Raises:
        InputError: `output` is none of these. When called: the network's output has no such part.

    >>> network = nn.Identity()
    >>> network.forward = lambda x: (x, 2 * x)
    >>> Output(network, output=1)(Tensor([[1.0]]))
    tensor([[2.]])
    """

    WRAPS = "network"
    """Name of the submodule whose fingerprint counts."""

    def __init__(self, network: nn.Module, output: int | str | tuple[int | str, ...]) -> None:
        super().__init__()
        check_module(network, "network")
        steps = output if isinstance(output, tuple) else (output,)
        if not steps or not all(isinstance(step, int | str) and not isinstance(step, bool) for step in steps):
            raise InputError(f"output: expected an index, a key, or a tuple of these; got {output!r}")
        self.network, self.output = network, steps
        self.training = network.training

    def forward(self, images: Tensor) -> Any:
        """Return the chosen output of the network for images (B, C, H, W)."""
        out = self.network(images)
        for step in self.output:
            out = _part(out, step)
        return out

    def extra_repr(self) -> str:
        """Show the chosen output."""
        return f"output={self.output[0] if len(self.output) == 1 else self.output!r}"


def _part(out: Any, step: int | str) -> Any:
    if isinstance(step, str) and not isinstance(out, Mapping):
        if hasattr(out, step):
            return getattr(out, step)
    elif isinstance(out, Mapping):
        if step in out:
            return out[step]
    elif isinstance(out, tuple | list) and isinstance(step, int) and -len(out) <= step < len(out):
        return out[step]
    came = f"the keys {', '.join(map(repr, out))}" if isinstance(out, Mapping) else f"a {type(out).__name__}"
    if isinstance(out, tuple | list):
        came += f" of {len(out)}"
    raise InputError(f"output: the network returns {came}, without a part {step!r}; choose another one")
