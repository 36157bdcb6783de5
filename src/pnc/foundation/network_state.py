"""What is not ours stays as it was: guards, snapshots that prove it, and fingerprints that name a network's weights."""

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


def like_images(module: nn.Module) -> Tensor:
    """An empty tensor of the device and type that `module` takes images in: of its first real floating-point tensor.

    Its first parameter may be of integers or complex numbers; without any of floats images are float32.
    """
    tensors = [*module.parameters(), *module.buffers()]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is not None:
        return torch.empty(0, device=first.device, dtype=first.dtype)
    return torch.empty(0, device=tensors[0].device if tensors else None, dtype=torch.float32)


def images_for(module: nn.Module, shape: tuple[int, ...], n_images: int = 2) -> Tensor:
    """Random images (n_images, C, H, W) in [0, 1) that `module` takes, the same ones each time."""
    images = torch.rand(n_images, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(like_images(module))


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


def take_snapshot(module: nn.Module) -> Snapshot:
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
