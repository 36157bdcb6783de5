"""What is not ours stays as it was: guards, snapshots that prove it, and fingerprints that name a network's weights."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Types of values that files hold, and that fingerprints can name where they differ."""

_BYTES_FOR_THREADS = 1 << 24
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as if torch had its defaults: no autocast, no inference mode, float32, whatever the caller has set."""
    default = torch.get_default_dtype()
    if default != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        if default != torch.float32:
            torch.set_default_dtype(default)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Run `modules` in eval mode without gradients; every submodule's training flag comes back, also after an error."""
    flags = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@dataclass(frozen=True)
class Snapshot:
    """Everything of a module that must not change: copies of its tensors, their flags and gradients, submodules, hooks.

    Attributes:
        tensors: Copies of all parameters and buffers, also those that no state dict holds.
        layouts: Device and memory format of each.
        requires_grad: The flag of each.
        gradients: Copies of their gradients.
        submodules: Type and training flag of each submodule.
        hooks: The hooks of each submodule, in order.
        images: A probe batch; None where answers are not compared.
        logits: What the module answered to it, in eval mode.
    """

    tensors: Mapping[str, Tensor]
    layouts: Mapping[str, str]
    requires_grad: Mapping[str, bool]
    gradients: Mapping[str, Tensor | None]
    submodules: Mapping[str, tuple[type, bool]]
    hooks: Mapping[str, tuple[Any, ...]]
    images: Tensor | None = None
    logits: Tensor | None = None


def snapshot(module: nn.Module) -> Snapshot:
    """Copy the state of `module` that `differences` compares later: costs one copy of its weights."""
    tensors = dict(_named_tensors(module))
    submodules = dict(module.named_modules(remove_duplicate=False))
    return Snapshot(
        tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
        layouts={name: _layout(tensor) for name, tensor in tensors.items()},
        requires_grad={name: tensor.requires_grad for name, tensor in tensors.items()},
        gradients={name: None if t.grad is None else t.grad.detach().clone() for name, t in tensors.items()},
        submodules={name: (type(part), part.training) for name, part in submodules.items()},
        hooks={name: _hooks(part) for name, part in submodules.items()},
    )


def differences(module: nn.Module, before: Snapshot) -> list[str]:
    """List in words what of `module` is no longer as in `before`; an empty list means equal to the last bit."""
    found = []
    tensors = dict(_named_tensors(module))
    for name in sorted(before.tensors.keys() | tensors.keys()):
        if name not in tensors or name not in before.tensors:
            found.append(f"tensor {name} was {'removed' if name not in tensors else 'added'}")
        elif not same_bits(tensors[name], before.tensors[name]):
            found.append(f"values of {name} changed")
        elif _layout(tensors[name]) != before.layouts[name]:
            found.append(f"{name} is {_layout(tensors[name])}, was {before.layouts[name]}")
        elif tensors[name].requires_grad != before.requires_grad[name]:
            found.append(f"requires_grad of {name} changed")
        elif not _same_gradient(tensors[name].grad, before.gradients[name]):
            found.append(f"gradient of {name} changed")
    submodules = dict(module.named_modules(remove_duplicate=False))
    for name in sorted(before.submodules.keys() | submodules.keys()):
        part = submodules.get(name)
        if part is None or name not in before.submodules:
            found.append(f"submodule {name} was {'removed' if part is None else 'added'}")
        elif (type(part), part.training) != before.submodules[name]:
            found.append(f"type or training flag of submodule {name or '(root)'} changed")
        elif _hooks(part) != before.hooks[name]:
            found.append(f"hooks of submodule {name or '(root)'} changed")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same shape, dtype and bits; unlike `torch.equal`, NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(as_bytes(a), as_bytes(b.to(a.device)))


@dataclass(frozen=True)
class Fingerprint:
    """Names the structure and the weights of one network: the entries of its state dict, in the order of sorted names.

    It does not depend on device, memory format, version of torch, or wrappers such as `DataParallel` and
    `torch.compile`. All digests are the first hex digits of SHA-256.

    Attributes:
        structure: Of names, dtypes and shapes, 32 digits.
        weights: Of the structure and all values, 32 digits.
        tensors: For each entry 4 digits of its name, 4 of its dtype and shape, 8 of its values: these only say where
            two networks begin to differ.
    """

    structure: str
    weights: str
    tensors: tuple[str, ...]


def fingerprint(module: nn.Module) -> Fingerprint:
    """Compute the fingerprint of the state dict of `module`: parameters and persistent buffers."""
    state = _plain_state(module)
    texts = [_structure_text(tensor.dtype, tensor.shape) for tensor in state.values()]
    values = value_digests(list(state.values()))
    structure = _hex("".join(f"{name}:{text};" for name, text in zip(state, texts, strict=True)), 32)
    entries = zip(state, texts, values, strict=True)
    return Fingerprint(
        structure,
        _hex(structure + "".join(values), 32),
        tuple(_hex(name, 4) + _hex(text, 4) + value[:8] for name, text, value in entries),
    )


class KnownFingerprint:
    """The fingerprint of one network, computed anew only where something speaks for a change of its tensors.

    Compared are their memory, torch's count of changes in place, and the sum of their bits, which also sees what was
    written past that count.
    """

    def __init__(self) -> None:
        self._seen: tuple[object, ...] | None = None
        self._found: Fingerprint | None = None

    def of(self, module: nn.Module) -> Fingerprint:
        """Give the fingerprint of a network, the same one each time."""
        seen = tuple(_trace(name, tensor) for name, tensor in _plain_state(module).items())
        if self._found is None or seen != self._seen:
            self._found, self._seen = fingerprint(module), seen
        return self._found


def _trace(name: str, tensor: Tensor) -> tuple[object, ...]:
    """What changes with a tensor, at the cost of reading it once."""
    data = as_bytes(tensor)
    data = data.clone() if data.storage_offset() % 8 else data
    whole, rest = data[: len(data) // 8 * 8], data[len(data) // 8 * 8 :]
    version = None if tensor.is_inference() else tensor._version
    sums = int(whole.view(torch.int64).sum()), int(rest.sum())
    return name, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), version, sums


def first_difference(
    module: nn.Module, expected: Fingerprint, found: Fingerprint | None = None, *, structure_only: bool = False
) -> str | None:
    """Say in words where `module` first departs from `expected`; None where it does not.

    Args:
        module: A network.
        expected: Fingerprint of the network that it should be.
        found: Its own fingerprint, if that was just computed.
        structure_only: Let the values differ.
    """
    found = found or fingerprint(module)
    if found == expected or (structure_only and found.structure == expected.structure):
        return None
    if found.structure != expected.structure:
        return f"another architecture: {_first_in_structure(_plain_state(module), found, expected)}"
    for name, ours, theirs in zip(_plain_state(module), found.tensors, expected.tensors, strict=False):
        if ours != theirs:
            return f"the values of {name!r} differ"
    return "the values differ"


def _first_in_structure(state: Mapping[str, Tensor], found: Fingerprint, expected: Fingerprint) -> str:
    """Say which entry is the first that only one of two networks has, or has in another dtype or shape."""
    theirs = expected.tensors
    previous = ""
    for index, (name, ours) in enumerate(zip(state, found.tensors, strict=True)):
        if index == len(theirs) or (ours[:4] != theirs[index][:4] and _is_later(theirs[index], found.tensors[index:])):
            return f"{name!r} is a tensor that it should not have"
        if ours[:4] != theirs[index][:4]:
            return f"a tensor is missing {f'behind {previous!r}' if previous else 'in front'}, where it has {name!r}"
        if ours[4:8] != theirs[index][4:8]:
            return _other_dtype_or_shape(name, state[name], theirs[index][4:8])
        previous = name
    if len(theirs) > len(state):
        return f"{len(theirs) - len(state)} tensors are missing {f'behind {previous!r}' if previous else ''}".rstrip()
    return "names, dtypes or shapes differ"


def _is_later(entry: str, entries: Sequence[str]) -> bool:
    return any(entry[:4] == other[:4] for other in entries)


def _other_dtype_or_shape(name: str, tensor: Tensor, expected: str) -> str:
    """Say which of the two differs: the dtype can be found by trying, as there are few."""
    for dtype in DTYPES:
        if _hex(_structure_text(dtype, tensor.shape), 4) == expected:
            return f"{name!r} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}"
    return f"{name!r} has the shape {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}, expected another one"


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as in "float32"."""
    return str(dtype).removeprefix("torch.")


def value_digests(tensors: Sequence[Tensor]) -> list[str]:
    """SHA-256 of the bytes of each tensor, row by row whatever its memory format, little-endian; 64 hex digits.

    Large ones are digested by several threads, as hashing releases Python's lock.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < _BYTES_FOR_THREADS:
        return [_value_digest(tensor) for tensor in tensors]
    n_threads = min(8, os.cpu_count() or 1)
    largest_first = sorted(
        range(len(tensors)), key=lambda place: -tensors[place].numel() * tensors[place].element_size()
    )
    shares = [largest_first[first::n_threads] for first in range(n_threads)]
    digests = [""] * len(tensors)

    def digest(share: Sequence[int]) -> None:
        for place in share:
            digests[place] = _value_digest(tensors[place])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(digest, shares))  # a task for each tensor would cost more than most tensors
    return digests


def _value_digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor.cpu()).numpy().data).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its indices, (n_bytes,) uint8; shares its memory where that is possible."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, sorted by name, with the names that it has outside of wrappers."""
    wrapped = {
        f"{name}.{child}".lstrip(".")
        for name, part in module.named_modules(remove_duplicate=False)
        if (child := _wrapped_child(part))
    }
    state = {_plain_name(name, wrapped): value for name, value in module.state_dict().items()}
    return {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}


def _wrapped_child(module: nn.Module) -> str | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None  # what torch.compile returns


def _plain_name(name: str, wrapped: Set[str]) -> str:
    if not wrapped:
        return name
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped)


def _structure_text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _same_gradient(now: Tensor | None, before: Tensor | None) -> bool:
    if now is None or before is None:
        return now is before
    return same_bits(now, before)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _layout(tensor: Tensor) -> str:
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    order = "channels last" if channels_last and tensor.is_contiguous(memory_format=torch.channels_last) else "strided"
    return f"{'contiguous' if tensor.is_contiguous() else order} on {tensor.device}"


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return tuple(hook for table in _HOOKS for hook in (getattr(module, table) or {}).values())
