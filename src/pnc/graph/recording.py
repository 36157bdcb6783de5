"""Records a classifier: `record` turns a network into a graph over its own weights, verified bit for bit.

It runs the network's real forward at two batch sizes (`recorder.py`), merges the two tapes into one `torch.fx` graph
(`graph_builder.py`), and compares graph and network on new images at two other batch sizes. A network that cannot be
reproduced exactly is refused with the reason.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pnc.data.image_range import values_unchecked
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import InputError, RecordingError
from pnc.foundation.process_lock import ProcessLock
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.graph_builder import bind, merge
from pnc.graph.logits import pick_logits
from pnc.graph.nodes import BATCH_SIZES, NodeInfo, info
from pnc.graph.operation_tape import Tape
from pnc.graph.recorder import Recorder
from pnc.graph.subgraphs import dominators, part

__all__ = ["BATCH_SIZES", "NodeInfo", "Recording", "info", "record", "unwrapped"]

_PROBE_SIZE = 4  # differs from both batch sizes, and is even, so that code that rounds half the batch shows too
_LOCK = ProcessLock()  # recording temporarily changes flags and attributes of the network: one at a time


@dataclass(frozen=True, eq=False)
class Recording:
    """A network as a graph.

    Attributes:
        module: The network's eval-mode forward, from a batch of images to logits (B, K). It has its own module objects,
            in eval mode, and its own parameter objects over the network's memory: it needs no memory and follows
            changes of the network's weights, while flags, gradients, hooks and moves to another device are separate.
            (In-place writes, such as BatchNorm's in train mode, do reach the network; an optimizer must work on a deep
            copy.) Each node has a `NodeInfo`.
        input_shape: Shape of one image, without batch.
        n_classes: K.
        probe: New images on which graph and network were compared, (4, C, H, W).
        probe_logits: The network's own logits for them, (4, K).
    """

    module: fx.GraphModule
    input_shape: tuple[int, ...]
    n_classes: int
    probe: Tensor
    probe_logits: Tensor

    @property
    def input(self) -> fx.Node:
        """The node of the images."""
        first: fx.Node = next(iter(self.module.graph.nodes))
        return first

    @property
    def output(self) -> fx.Node:
        """The node that computes the logits."""
        return self.module.graph.output_node().all_input_nodes[0]


@values_unchecked()
def record(model: nn.Module, example: Tensor) -> Recording:
    """Record a classifier as a graph that gives the same bits.

    The network runs several times in eval mode, without gradients. Afterwards everything is as before: weights,
    buffers, flags, hooks, cached values, and the global random state. `DataParallel` and `torch.compile` wrappers are
    removed; of compiled code, the eager definition is recorded.

    Args:
        model: A network that maps images to logits (B, K), or to an object, mapping or tuple with them.
        example: Images for the network, (B, C, H, W), floating point, any B >= 1. Their shape, dtype, device and memory
            format matter, and so do their mean and spread.

    Raises:
        InputError: `example` is not a batch of images.
        RecordingError: the network fails on the example, or cannot be reproduced exactly; the message says why.
    """
    network = unwrapped(model)
    _check(network, example)
    probe = _fresh_images(example)
    with (
        _LOCK,
        torch.inference_mode(False),
        torch.no_grad(),
        _random_state(example.device),
        _eager(),
        values_unchecked(),
    ):
        state = _State(network)
        changed: list[str] = []
        try:
            with _in_eval_mode(network, state):
                single = _run_single(network, probe)  # first, so that lazy caches are filled before the tapes are made
                tapes = [_tape(network, _rows(example, size)) for size in BATCH_SIZES]
                module = bind(network, merge(network, *tapes), tapes[0].constants)
                logits = _run(network, probe)
            recording = Recording(module, tuple(example.shape[1:]), logits.shape[1], probe, logits)
            _verify(network, state, recording, single)
        finally:
            changed += state.restore()
        if changed:
            raise RecordingError(f"the network's forward writes to its own weights or buffers: {', '.join(changed)}")
    return recording


# -------------------------------------------------------------------------------------- leaving the network unchanged


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without wrappers of `DataParallel` and `torch.compile`; a recording uses its names of layers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", ()):  # what torch.compile returns
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _check(network: nn.Module, example: Tensor) -> None:
    check_module(network, "model")
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point() or not len(example):
        what = f"{tuple(example.shape)} {example.dtype}" if isinstance(example, Tensor) else type(example).__name__
        raise InputError(f"example: expected a floating-point batch of images (B, C, H, W) with B >= 1, got {what}")
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise RecordingError(f"{name} has no values yet (lazy or on the meta device); initialize the network first")
    scripted = [name or "the network" for name, m in network.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise RecordingError(
            f"TorchScript cannot be recorded ({scripted[0]} is a ScriptModule); give the network without "
            "torch.jit.script or torch.jit.trace"
        )


class _State:
    """A copy of everything in a network that its forward could change, to restore it."""

    def __init__(self, network: nn.Module) -> None:
        self._containers = [(container, _content(container)) for container in _containers_of(network)]
        tensors = [*network.named_buffers(), *network.named_parameters()]
        self._tensors = [(name, tensor, tensor.detach().clone()) for name, tensor in tensors]
        self._gradients = [
            (p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in network.parameters()
        ]

    def restore(self, parameters: bool = True) -> list[str]:
        """Restore what differs, and touch nothing else; return the names of the tensors whose values had changed."""
        for container, content in self._containers:
            if container or content:  # most are empty
                _put_back(container, content)
        for parameter, requires_grad, gradient, saved in self._gradients:
            _put_back_gradient(parameter, requires_grad, gradient, saved)
        changed = []
        for name, tensor, values in self._tensors:
            if isinstance(tensor, nn.Parameter) and not parameters:
                continue
            # The first comparison is fast, the second treats equal NaN as equal.
            if not torch.equal(tensor, values) and not same_bits(tensor, values):
                changed.append(name)
                with torch.no_grad():
                    tensor.copy_(values)
        return changed


def _put_back_gradient(
    parameter: nn.Parameter, requires_grad: bool, gradient: Tensor | None, saved: Tensor | None
) -> None:
    """Restore a parameter's flag and gradient: the same object, with its former values."""
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not gradient:
        parameter.grad = gradient
    if gradient is not None and saved is not None and not same_bits(gradient, saved):
        with torch.no_grad():
            gradient.copy_(saved)


def _containers_of(network: nn.Module) -> list[Any]:
    """The attributes of all modules, and all dictionaries, lists and sets nested in them."""
    found: dict[int, Any] = {}
    todo: list[Any] = [module.__dict__ for module in network.modules()]
    while todo:
        container = todo.pop()
        if container and id(container) not in found:
            values = container.values() if isinstance(container, dict) else container
            todo += [value for value in values if isinstance(value, (dict, list, set))]
        found[id(container)] = container
    return list(found.values())


def _content(container: Any) -> Any:
    """A shallow copy of a dictionary, list or set."""
    kind: Any = next(kind for kind in (dict, list, set) if isinstance(container, kind))
    return kind(container)


def _put_back(container: Any, content: Any) -> None:
    """Restore the content of a dictionary, list or set; entries that are still the same objects are not touched."""
    if isinstance(container, dict):
        for key in [key for key in container if key not in content]:
            del container[key]
        for key, value in content.items():
            if key not in container or container[key] is not value:
                container[key] = value
    elif isinstance(container, list):
        if [id(value) for value in container] != [id(value) for value in content]:
            container[:] = content
    else:
        container &= content
        container |= content


@contextlib.contextmanager
def _in_eval_mode(network: nn.Module, state: _State) -> Iterator[None]:
    """Set eval mode by the flags only, as a network's own `train` may do more; at the end restore all but weights."""
    try:
        for module in network.modules():
            if module.training:
                module.training = False
        yield
    finally:
        state.restore(parameters=False)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as plain Python. If the compiler is not loaded, there are none (loading takes seconds)."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------ images and runs


def _rows(example: Tensor, size: int) -> Tensor:
    """A batch of `size` images from the example, repeated if there are too few."""
    return _laid_out(example.detach()[torch.arange(size, device=example.device) % len(example)], example)


def _fresh_images(example: Tensor) -> Tensor:
    """Noise with the example's mean and spread per channel, in its dtype and memory format."""
    images = example.detach().double()
    mean = images.mean((0, 2, 3), keepdim=True)
    spread = images.std((0, 2, 3), keepdim=True, correction=0).clamp_min(1e-3)
    shape = (_PROBE_SIZE, *example.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(example.device)
    return _laid_out((noise * spread + mean).to(example.dtype), example)


def _laid_out(images: Tensor, example: Tensor) -> Tensor:
    """The images in the memory format of the example, on which kernels, and so bits, depend."""
    channels_last = example.is_contiguous(memory_format=torch.channels_last) and not example.is_contiguous()
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _run(forward: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """The logits of a forward on a copy of `x`; any error of the user's code becomes a RecordingError."""
    try:
        return pick_logits(forward(x.clone()))
    except RecordingError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        raise RecordingError(
            f"the network cannot process images of shape {tuple(x.shape)}, {x.dtype}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _run_single(network: nn.Module, images: Tensor) -> Tensor | None:
    """The logits of the first image alone; None for networks that need several images (some squeeze the batch)."""
    try:
        return _run(network, images[:1])
    except RecordingError:
        _run(network, images[: BATCH_SIZES[0]])
        return None


def _tape(network: nn.Module, x: Tensor) -> Tape:
    recorder = Recorder(network)
    logits = _run(lambda images: recorder.run(images, pick_logits), x)
    if recorder.data_reads:
        raise RecordingError(
            f"the network's Python code reads values that depend on the images ({recorder.data_reads[0]}), "
            "so its path may differ from image to image"
        )
    if logits.shape[0] != x.shape[0]:
        raise RecordingError(f"the network returns {logits.shape[0]} rows of logits for {x.shape[0]} images")
    return recorder.tape


# -------------------------------------------------------------------------------------------------------- verification


def _verify(network: nn.Module, state: _State, recording: Recording, single: Tensor | None) -> None:
    """Compare graph and network; if they differ, check whether the network is deterministic."""
    try:
        _check_recording(recording, single)
    except RecordingError:
        state.restore()  # the recording works on the network's own memory
        with _in_eval_mode(network, state):
            if not same_bits(_run(network, recording.probe), recording.probe_logits):
                raise RecordingError(
                    "the network gives different logits for the same images in eval mode: it draws random numbers or "
                    "keeps state between calls"
                ) from None
        raise


def _check_recording(recording: Recording, single: Tensor | None) -> None:
    """Compare graph and network on the probe, and on its first image as prefix and suffix of the middle cut."""
    module, probe, logits = recording.module, recording.probe, recording.probe_logits
    _compare(_output(module, module.graph, probe.clone()), logits, "its recording")
    if single is not None:
        probe, logits = probe[:1], single
    cuts = dominators(module.graph)
    cut = cuts[len(cuts) // 2]
    tensor = _output(module, part(module.graph, recording.input, [cut]), probe)
    kept = tensor.clone()
    found = _output(module, part(module.graph, cut, [recording.output]), tensor)
    _compare(found, logits, f"its recording at batch size {len(probe)}, cut at {cut.name}")
    assert same_bits(tensor, kept), f"the suffix from {cut.name} wrote to its input"


def _output(module: fx.GraphModule, graph: fx.Graph, x: Tensor) -> Tensor:
    """The output of a graph over the module's layers; a failure means that the graph does not fit this batch size."""
    try:
        out: Tensor = fx.Interpreter(module, graph=graph).run(x)  # for one run faster than compiling the graph to code
    except Exception as error:  # noqa: BLE001 - any operation may raise anything
        raise RecordingError(
            f"the network is not reproduced by its recording, which fails at batch size {len(x)}: {_reason(error)}"
        ) from error
    return out


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    if same_bits(found, expected):
        return
    difference = f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.shape == expected.shape:
        difference = f"a largest difference of {(found - expected).abs().max().item():.3g}"
    raise RecordingError(
        f"the network is not reproduced by {what}: {difference} on new images; its output depends on something that a "
        "recording does not see, such as the batch size, the values of the images or code outside of PyTorch"
    )
