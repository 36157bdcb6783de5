"""A network run without values: the shapes of all that it computes, at the cost of neither memory nor arithmetic."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnc.foundation.network_state import undisturbed


def shapes_without_values(module: nn.Module, input_shape: tuple[int, ...]) -> set[tuple[int, ...]] | None:
    """Shapes, without batch, of the images and of every tensor that a network makes of them, in eval mode.

    The network runs on the meta device, as a copy without weights; it stays as it is.

    Args:
        module: A network.
        input_shape: (C, H, W) of the images.
    Returns:
        The shapes; None where the network cannot run like this, because it reads values, for one.
    """
    tensors = [*module.parameters(), *module.buffers()]
    emptied: dict[int, Any] = {id(tensor): _emptied(tensor) for tensor in tensors}
    seen = _Shapes()
    try:
        with undisturbed(), torch.no_grad():
            twin = copy.deepcopy(module, emptied).eval()
            images = torch.empty(_BATCH, *input_shape, device="meta")
            with seen:
                twin(images)
    except Exception:  # noqa: BLE001 - networks of others, on tensors without values: this says nothing about them
        return None
    return {tuple(input_shape), *seen.found}


_BATCH = 3


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Shapes(TorchDispatchMode):
    """Collects the shapes of what operations give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.found |= {tuple(one.shape[1:]) for one in tree_leaves(made) if isinstance(one, Tensor) and one.dim()}
        return made
