"""Leaving a network as it was: guards around computations, and snapshots that prove it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnc.foundation.tensor_bits import same_bits

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute with torch's defaults, whatever the caller has set: no autocast, no inference mode, float32.

    Autocast's cache of cast weights is off too: it would last for the whole block, and training inside the block would
    compute with the weights of the first step.
    """
    default = torch.get_default_dtype()
    if default != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False, cache_enabled=False),
            torch.autocast("cuda", enabled=False, cache_enabled=False),
        ):
            yield
    finally:
        if default != torch.float32:
            torch.set_default_dtype(default)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Run `modules` in eval mode without gradients, then restore every training flag, also after an error."""
    flags = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for submodule, training in flags:
            submodule.training = training


def like_images(module: nn.Module) -> Tensor:
    """An empty tensor with the device and dtype in which `module` takes images.

    These are the ones of its first floating-point tensor, as the first parameter may be integer or complex; float32 if
    there is none.
    """
    tensors = [*module.parameters(), *module.buffers()]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        return torch.empty(0, device=first.device, dtype=first.dtype)
    return torch.empty(0, device=tensors[0].device if tensors else None, dtype=torch.float32)


def images_for(module: nn.Module, shape: tuple[int, ...], n_images: int = 2) -> Tensor:
    """Random images (n_images, C, H, W) in [0, 1) for `module`; the same values at every call."""
    images = torch.rand(n_images, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(like_images(module))


@dataclass(frozen=True)
class Snapshot:
    """Everything about a module that must not change: its tensors with flags and gradients, its submodules and hooks.

    Attributes:
        tensors: Copies of all parameters and buffers, including those that are not in the state dict.
        layouts: Device and memory format of each tensor.
        requires_grad: The flag of each tensor.
        gradients: A copy of each tensor's gradient.
        submodules: Type and training flag of each submodule.
        hooks: The hooks of each submodule, in order.
        images: A probe batch; None if logits are not compared.
        logits: The module's logits for it, in eval mode.
    """

    tensors: Mapping[str, Tensor]
    layouts: Mapping[str, str]
    requires_grad: Mapping[str, bool]
    gradients: Mapping[str, Tensor | None]
    submodules: Mapping[str, tuple[type, bool]]
    hooks: Mapping[str, tuple[Any, ...]]
    images: Tensor | None = None
    logits: Tensor | None = None


def take_snapshot(module: nn.Module) -> Snapshot:
    """Copy the state of `module` for a later call of `differences`; it takes the memory of one copy of the weights."""
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
    """Describe everything about `module` that differs from `before`; an empty list means equal to the last bit."""
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
