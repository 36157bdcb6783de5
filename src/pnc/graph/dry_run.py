"""A run of a network without values, which finds the shapes of all its tensors without memory or arithmetic."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnc.foundation.network_state import like_images, undisturbed
from pnc.graph.logits import pick_logits


def shapes_without_values(module: nn.Module, input_shape: tuple[int, ...]) -> set[tuple[int, ...]] | None:
    """Shapes, without batch, of the images and of every tensor that a network computes from them, in eval mode.

    A copy of the network without weights runs on the meta device; the network itself is not changed.

    Args:
        module: A network.
        input_shape: (C, H, W) of the images.
    Returns:
        The shapes; None if the network cannot run like this, for example because it reads values.
    """
    seen = _Shapes()
    try:
        with undisturbed(), torch.no_grad():
            twin = _twin(module)
            images = torch.empty(_BATCH, *input_shape, device="meta")
            with seen:
                twin(images)
    except Exception:  # noqa: BLE001 - any network may fail on tensors without values, which does not make it wrong
        return None
    return {tuple(input_shape), *seen.found}


def logits_without_values(module: nn.Module, images: Tensor) -> int | None:
    """The number of a network's logits, found without computing them; None if the network cannot run like this.

    Args:
        module: A network; it is not changed.
        images: (B, C, H, W); only their shape and dtype count.
    """
    try:
        with undisturbed(), torch.no_grad():
            twin = _twin(module)
            example = torch.empty(_BATCH, *images.shape[1:], dtype=like_images(module).dtype, device="meta")
            return pick_logits(twin(example)).shape[1]
    except Exception:  # noqa: BLE001 - as above
        return None


_BATCH = 3


def _twin(module: nn.Module) -> nn.Module:
    """A copy without values, in eval mode."""
    tensors = [*module.parameters(), *module.buffers()]
    emptied: dict[int, Any] = {id(tensor): _emptied(tensor) for tensor in tensors}
    return copy.deepcopy(module, emptied).eval()


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Shapes(TorchDispatchMode):
    """Collects the shapes of the results of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {tuple(one.shape[1:]) for one in tree_leaves(out) if isinstance(one, Tensor) and one.dim()}
        return out
