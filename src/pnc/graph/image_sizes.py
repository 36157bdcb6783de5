"""Sizes that depend on the values of the images: which dims of an operation's results have such a size."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from pnc.graph.operation_tape import tensors_in

Dims = frozenset[int]
"""Open dims of a tensor: those whose sizes depend on the images' values."""

NONE: Dims = frozenset()
SIZE_READS = frozenset(
    {"shape", "size", "numel", "nelement", "__len__", "stride", "nbytes", "is_same_size", "storage", "untyped_storage"}
    | {"storage_offset"}
)
"""Names of attributes, methods and functions that read a tensor's sizes."""

_SPLITS = frozenset({"unbind", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit"})
_SCALARS_FILL = frozenset({"full", "full_like", "new_full", "select", "roll", "narrow"})
_READ_UNSEEN = {"tensor_split": 1, "_pack_padded_sequence": 1, "_pad_packed_sequence": 1}
"""Operations whose kernels read an argument's values directly from memory, and the place of that argument."""
_GROWTH = 7


def all_dims(tensor: Tensor) -> Dims:
    """All dims of a tensor."""
    return frozenset(range(tensor.dim()))


def dims_read(name: str, args: Sequence[Any], tensor: Tensor) -> Dims:
    """The dims of `tensor` whose sizes a call of one of `SIZE_READS` reads."""
    if name == "__len__":
        return frozenset({0})
    if name == "size" and len(args) > 1 and type(args[1]) is int:
        return frozenset({args[1] % max(tensor.dim(), 1)})
    return all_dims(tensor)


def keeps_sizes(name: str, args: Sequence[Any]) -> bool:
    """Whether the shape of a result does not depend on the values of scalar tensors in the arguments."""
    if name != "__getitem__":
        return name in _SCALARS_FILL
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return not any(isinstance(part, slice) and tensors_in(part) for part in index)


def deciding_tensors(kernel: Any, args: Sequence[Any]) -> list[Tensor]:
    """The arguments of a kernel whose values determine the shape of its result."""
    packet = kernel._overloadpacket
    if packet is torch.ops.aten.index:
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    if packet is torch.ops.aten.masked_select:
        return [args[1]]
    return tensors_in(args)


def open_dims(kernel: Any, args: Sequence[Any], out: Tensor) -> Dims:
    """The dims of a kernel's result whose sizes its values determine: for masks as indices, the dim in their place."""
    packet = kernel._overloadpacket
    if packet in (torch.ops.aten.nonzero, torch.ops.aten.repeat_interleave):
        return frozenset({0})
    if packet is not torch.ops.aten.index:
        return all_dims(out)
    given, indices = args[0], args[1]
    places = [place for place, index in enumerate(indices) if index is not None]
    if places[-1] - places[0] >= len(places):  # a slice between the masks changes the order of the result's dims
        return all_dims(out)
    masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
    n_used = len(indices) + sum(mask.dim() - 1 for mask in masks)
    n_behind = given.dim() - n_used
    return frozenset(range(places[0], out.dim() - n_behind))


def carried_dims(
    run: Callable[..., Any],
    args: Any,
    kwargs: Any,
    dims_of: Callable[[Tensor], Dims],
    made: Sequence[Tensor],
) -> list[Dims] | None:
    """Find which dims of an operation's results follow the open dims of its arguments, by trying other sizes.

    The operation runs on tensors without values, in which every open size is changed by the same amount.

    Returns:
        The dims for each result; None if the number of results changes, or the operation cannot run without values.
    """

    def other(tensor: Tensor) -> Tensor:
        dims = dims_of(tensor)
        if not dims:
            return tensor.detach().to("meta")
        sizes = [size + _GROWTH if dim in dims else size for dim, size in enumerate(tensor.shape)]
        return torch.empty(sizes, dtype=tensor.dtype, device="meta")

    try:
        with torch.no_grad():
            module = getattr(run, "__self__", None)
            if isinstance(module, nn.Module):
                run = copy.deepcopy(module).to("meta")
            new_args, new_kwargs = _pytree.tree_map_only(Tensor, other, (args, kwargs))
            found = tensors_in(run(*new_args, **new_kwargs))
    except Exception:  # noqa: BLE001 - any operation, which may not support tensors without values
        return None
    if len(found) != len(made) or any(a.dim() != b.dim() for a, b in zip(found, made, strict=True)):
        return None
    return [
        frozenset(dim for dim, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b)
        for one, other in zip(found, made, strict=True)
    ]


def unseen_tensors(name: str, args: Sequence[Any]) -> list[Tensor]:
    """The arguments whose values set the sizes of an operation's results, although no kernel shows it."""
    place = _READ_UNSEEN.get(name)
    return tensors_in(args[place]) if place is not None and len(args) > place else []


def is_tensors(value: object) -> bool:
    """Whether a result holds only tensors, in tuples of a length of their own."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and all(map(is_tensors, value)))


def counts_parts(
    name: str,
    args: Sequence[Any],
    kwargs: Any,
    dims_of: Callable[[Tensor], Dims],
    is_fixed: Callable[[Tensor], bool],
) -> bool:
    """Whether the number of an operation's results depends on the images, so that reading the number reads them."""
    if name not in _SPLITS or not isinstance(args[0], Tensor):
        return False
    if name == "tensor_split":  # as many parts, even empty ones, as a number or the indices ask for
        return any(dims_of(asked) if asked.dim() else not is_fixed(asked) for asked in unseen_tensors(name, args))
    position = 1 if name == "unbind" else 2
    default = {"hsplit": min(1, args[0].dim() - 1), "vsplit": 0, "dsplit": 2}.get(name, 0)
    dim = args[position] if len(args) > position else kwargs.get("dim", default)
    return dim % args[0].dim() in dims_of(args[0])
