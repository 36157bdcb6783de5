"""What is not ours stays as it was: guards, snapshots that prove it, and fingerprints that name a network's weights."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


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
    """Everything of a module that must not change: copies of its tensors, their flags and gradients, submodules."""

    tensors: Mapping[str, Tensor]
    requires_grad: Mapping[str, bool]
    gradients: Mapping[str, Tensor | None]
    submodules: Mapping[str, tuple[type, bool, tuple[int, ...]]]


def snapshot(module: nn.Module) -> Snapshot:
    """Copy the state of `module` that `differences` compares later: costs one copy of its weights."""
    tensors = dict(_named_tensors(module))
    return Snapshot(
        tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
        requires_grad={name: tensor.requires_grad for name, tensor in tensors.items()},
        gradients={name: None if t.grad is None else t.grad.detach().clone() for name, t in tensors.items()},
        submodules=_submodule_states(module),
    )


def differences(module: nn.Module, before: Snapshot) -> list[str]:
    """List in words what of `module` is no longer as in `before`; an empty list means equal to the last bit."""
    found = []
    tensors, submodules = dict(_named_tensors(module)), _submodule_states(module)
    for name in sorted(before.tensors.keys() | tensors.keys()):
        if name not in tensors or name not in before.tensors:
            found.append(f"tensor {name} was {'removed' if name not in tensors else 'added'}")
        elif not same_bits(tensors[name], before.tensors[name]):
            found.append(f"values of {name} changed")
        elif tensors[name].requires_grad != before.requires_grad[name]:
            found.append(f"requires_grad of {name} changed")
        elif not _same_gradient(tensors[name].grad, before.gradients[name]):
            found.append(f"gradient of {name} changed")
    for name in sorted(before.submodules.keys() | submodules.keys()):
        if submodules.get(name) != before.submodules.get(name):
            found.append(f"type, training flag or hooks of submodule {name or '(root)'} changed")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same shape, dtype and bits; unlike `torch.equal`, NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_as_bytes(a), _as_bytes(b.to(a.device)))


@dataclass(frozen=True)
class Fingerprint:
    """Names the weights of one network, independent of device and of wrappers such as `DataParallel`.

    Attributes:
        structure: Digest of the names, shapes and dtypes of all entries of the state dict.
        tensors: One short digest of the values for each entry, in the order of the sorted names.
    """

    structure: str
    tensors: tuple[str, ...]


def fingerprint(module: nn.Module) -> Fingerprint:
    """Compute the fingerprint of the state dict of `module`: parameters and persistent buffers."""
    state = _plain_state(module)
    structure = hashlib.sha256()
    for name, tensor in state.items():
        structure.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
    return Fingerprint(structure.hexdigest()[:16], tuple(_tensor_digest(tensor) for tensor in state.values()))


def first_difference(module: nn.Module, expected: Fingerprint) -> str | None:
    """Say in words where `module` first departs from `expected`; None where it does not."""
    found = fingerprint(module)
    if found.structure != expected.structure:
        return f"another architecture ({len(found.tensors)} tensors, expected {len(expected.tensors)}, or other shapes)"
    for name, ours, theirs in zip(_plain_state(module), found.tensors, expected.tensors, strict=True):
        if ours != theirs:
            return f"the values of {name!r} differ"
    return None


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            while name.startswith(_WRAPPER_PREFIXES):
                name = name.split(".", 1)[1]
            state[name] = value
    return dict(sorted(state.items()))


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(_as_bytes(tensor.cpu()).numpy().tobytes()).hexdigest()[:8]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _same_gradient(now: Tensor | None, before: Tensor | None) -> bool:
    if now is None or before is None:
        return now is before
    return same_bits(now, before)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _submodule_states(module: nn.Module) -> dict[str, tuple[type, bool, tuple[int, ...]]]:
    return {
        name: (type(sub), sub.training, tuple(len(getattr(sub, hooks) or ()) for hooks in _HOOKS))
        for name, sub in module.named_modules(remove_duplicate=False)
    }
