"""Records the operations of a network while it runs.

The network's own Python code runs, so its control flow (keyword arguments, dataclasses, loops over blocks, shape
arithmetic) cannot confuse the recorder; only tensor operations and calls of leaf modules reach the tape. Sizes that the
code reads are plain integers; those that depend on the batch size are found by comparing two runs. If a size depends on
the values of the images (`x[mask]`, `x.nonzero()`), reading it counts as reading a value.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pnc.foundation.errors import RecordingError
from pnc.graph import image_sizes
from pnc.graph.image_sizes import Dims
from pnc.graph.nodes import operation_name
from pnc.graph.operation_tape import Op, OperationKind, Tape, TapeWriter, is_plain, refused_types, tensors_in

_CALLED = "_compiled_call_impl"
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.DataParallel,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_DATA_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__complex__"}
    | {"__index__", "__contains__", "__array__", "__dlpack__", "_local_scalar_dense"}
    | {"__repr__", "__format__"}
)
_NAMESPACES = "aten", "prim", "prims"
_Opened = tuple[tuple[int, ...], Dims]
_SCALAR: _Opened = (-1,), image_sizes.NONE
_ANY: _Opened = (-2,), image_sizes.NONE
_METHODS: dict[Any, str] = {
    getattr(Tensor, name): name
    for name in dir(Tensor)
    if callable(getattr(Tensor, name)) and not name.startswith(("__class", "__init", "__sub"))
}


def is_leaf(module: nn.Module) -> bool:
    """Whether calls of a module are recorded as one operation.

    True for the layers of `torch.nn`, for BatchNorm-like layers of any library (so that they still switch between batch
    and running statistics) and for modules without children. Containers are opened, including `nn.TransformerEncoder`
    and similar ones; `nn.TransformerEncoderLayer` is not, because its fused kernel gives other bits than its parts.
    """
    if isinstance(module, _CONTAINERS):
        return False
    layer_type = parametrize.type_before_parametrizations(module)
    if layer_type.__module__.startswith(("torch.nn.", "torch.ao.nn.")) or isinstance(module, _NormBase):
        return True
    return all(name == "parametrizations" for name, _ in module.named_children())


class _Kernels(TorchDispatchMode):
    """Sees every kernel within the block: counts floating-point operations, and reports reads and open sizes.

    It reports scalars that are read, and results whose shape depends, or may depend, on values.

    `torch.utils.flop_counter.FlopCounterMode` does not fit: it hooks every module call of the process, also in other
    threads, and does not know the CPU's fused attention.
    """

    def __init__(self, on_read: Callable[[Tensor], None], on_open: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._on_read, self._on_open = on_read, on_open

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise PyTorch imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kernel = func._overloadpacket
        formula = flop_registry.get(kernel)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif kernel is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            queries, keys, values = args[:3]
            n_scores = queries.numel() // queries.shape[-1] * keys.shape[-2]
            self.flops += 2 * n_scores * (queries.shape[-1] + values.shape[-1])
        elif kernel is torch.ops.aten._local_scalar_dense:
            self._on_read(args[0])
        elif torch.Tag.dynamic_output_shape in func.tags or func.namespace not in _NAMESPACES:
            self._on_open(func, args, out)
        return out


class Recorder(TorchFunctionMode):
    """Writes the `Tape` of one forward run of a network; each instance records one run."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.data_reads: list[str] = []
        self._network, self._writer = network, TapeWriter(network)
        self._modules = {id(module): name for name, module in network.named_modules()}
        self._looks = {id(module): _look(module) for module in network.modules() if is_leaf(module)}
        self._scopes = [""]
        self._paused = False
        self._kernels = _Kernels(self._note_read, self._note_open)
        self._opened: list[_Opened] = []  # results of this operation's kernels: shapes, and their open dims
        self._has_custom_kernel = False  # whether one of these kernels is from another library
        self._autocast = False

    @property
    def tape(self) -> Tape:
        """What has been recorded so far."""
        return self._writer.tape

    def run(self, x: Tensor, pick_logits: Callable[[object], Tensor]) -> Tensor:
        """Run the network on `x`, record what it does, and return its logits."""
        self._autocast = torch.is_autocast_enabled(x.device.type)
        self._writer.add_input(x)
        with self._calls_seen(), self._kernels, self:
            out = self._network(x)
        logits = pick_logits(out)
        self._writer.add_output(logits)
        return logits

    @contextlib.contextmanager
    def _calls_seen(self) -> Iterator[None]:
        """Intercept the calls of the network's modules, only in this thread; no other module is touched.

        This uses the attribute in which `Module.compile` stores the function to call instead of the forward.
        """
        thread, modules = threading.get_ident(), list(self._network.modules())
        before = [module.__dict__.get(_CALLED, self) for module in modules]  # self stands for a missing entry

        def seen(module: nn.Module) -> Callable[..., Any]:
            otherwise: Callable[..., Any] = module._compiled_call_impl or module._call_impl

            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread:
                    return otherwise(*args, **kwargs)
                # Not the function of `module.compile()`, whose operations could not be seen.
                return module._call_impl(*args, **kwargs) if self._paused else self._call(module, args, kwargs)

            return call

        try:
            for module in modules:
                module.__dict__[_CALLED] = seen(module)
            yield
        finally:
            for module, value in zip(modules, before, strict=True):
                if value is self:
                    module.__dict__.pop(_CALLED, None)
                else:
                    module.__dict__[_CALLED] = value

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._modules[id(module)]
        forward: Callable[..., Any] = module._call_impl
        self._scopes.append(name)
        try:
            # A leaf that gets other weights or hooks for this call is opened, as a graph could not express that.
            as_before = self._looks.get(id(module)) == _look(module)
            if module is self._network or not as_before or not is_plain((args, kwargs)):
                return forward(*args, **kwargs)
            kept = dict(module.__dict__)
            out = self._execute("call_module", name, forward, args, kwargs)
            if not type(module).__module__.startswith("torch.nn."):
                self._note_leaf(module, kept, (args, kwargs), out)
            return out
        finally:
            self._scopes.pop()

    def _note_leaf(self, module: nn.Module, before: dict[str, Any], given: Any, out: object) -> None:
        """Note what a layer of the user's, which ran as one operation, lets the rest of the network see of the images.

        Its own code may read values and sizes; but then its results must be tensors, as the recording keeps any other
        result, and any attribute that it sets, as it was in this run.
        """
        self._paused = True  # our own reads of tensors
        try:
            set_values = [value for key, value in module.__dict__.items() if before.get(key, self) is not value]
            scope, shapes = self._scopes[-1], {shape for shape, _ in self._opened}
            self._writer.add_results(tensors_in(given), tensors_in(set_values), scope)
            plain = [value for value in set_values if not isinstance(value, Tensor) or tuple(value.shape) in shapes]
            if self._opened and (plain or not image_sizes.is_tensors(out)):
                self.data_reads.append(f"{scope}, which {'keeps' if plain else 'returns'} more than tensors")
        finally:
            self._paused = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._paused:  # in a layer's own code
            if name in _DATA_READS and not all(map(self._writer.is_fixed, tensors_in(args))):
                self._opened.append(_SCALAR)
            return func(*args, **kwargs)
        if name == "__get__":  # x.T
            return self._execute("call_function", getattr, func, args, kwargs, (args[0], func.__self__.__name__))
        if name == "set_" or (name == "__set__" and func.__self__.__name__ == "data"):
            raise RecordingError(
                f"{self._scopes[-1] or 'the network'} gives a tensor other memory (x.data = y, x.set_(y)), which a "
                "graph cannot express; compute a new tensor instead"
            )
        if func in _METHODS:
            return self._execute("call_method", _METHODS[func], func, args, kwargs)
        return self._execute("call_function", func, func, args, kwargs)

    def _execute(
        self,
        kind: OperationKind,
        target: Any,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        noted_args: tuple[Any, ...] | None = None,
    ) -> Any:
        """Run an operation, and append it to the tape unless it only read something of a tensor.

        `noted_args` are the positional arguments for the tape, if they differ from those of the call.
        """
        self._paused = True  # neither inner operations nor our own reads of tensors are the network's operations
        try:
            inputs, scope = tensors_in((args, kwargs)), self._scopes[-1]
            versions = [_version(tensor) for tensor in inputs]
            reads = self._writer.storages(inputs, scope)
            known = {id(tensor): (tuple(tensor.shape), self._writer.open_dims(tensor)) for tensor in inputs}
            flops = self._kernels.flops
            self._opened, self._has_custom_kernel = [], False
            if not all(map(self._writer.is_fixed, image_sizes.unseen_tensors(operation_name(target), args))):
                self._opened.append(_ANY)
            try:
                out = run(*args, **kwargs)
            except Exception:
                if any(dims for _, dims in known.values()):  # the network's code may catch it
                    self.data_reads.append(f"{self._where(target)}, failing on a tensor whose size depends on them")
                raise
            n_flops, made = self._kernels.flops - flops, tensors_in(out)
            written = [t for t, version in zip(inputs, versions, strict=True) if _version(t) != version]
            noted = (args if noted_args is None else noted_args, kwargs)
            self._note_look(target, noted, inputs, reads, bool(made))
            if not written and not made:
                return out
            if not is_plain(noted):
                if written or self._writer.depends_on_input(reads):
                    raise RecordingError(
                        f"{self._where(target)} takes an argument that a graph cannot hold: {refused_types(noted)}"
                    )
                return out  # such as torch.tensor(numpy array): a constant, if anything uses it
            self._check_context(inputs, target)
            if kind == "call_module" and isinstance(out, Tensor) and not written and any(out is t for t in inputs):
                out = out.view_as(out)  # dropout returns its argument: a new object tells before from after
                made = [out]
            opened = self._open_dims(target, run, args, kwargs, known, made)
            refs: tuple[Any, Any] = self._writer.ref(noted, scope)
            op = Op(kind, target, refs[0], refs[1], scope, reads, self._writer.storages(written, scope))
            op.flops = n_flops
            self._writer.append(op, out)
            for tensor, dims in zip(made, opened, strict=True):
                self._writer.set_open_dims(tensor, dims)
            return out
        finally:
            self._paused = False

    def _note_look(
        self,
        target: Any,
        noted: tuple[tuple[Any, ...], dict[str, Any]],
        inputs: Sequence[Tensor],
        reads: frozenset[int],
        makes_tensors: bool,
    ) -> None:
        """Note whether an operation gives the network's code values of the images, or sizes that depend on them."""
        (args, kwargs), name = noted, operation_name(target)
        if not makes_tensors and name in _DATA_READS and self._writer.depends_on_input(reads):
            self.data_reads.append(self._where(target))
        name = str(args[1]) if target is getattr else name
        is_size = name in image_sizes.SIZE_READS and any(
            self._writer.open_dims(tensor) & image_sizes.dims_read(name, args, tensor) for tensor in inputs
        )
        counts = image_sizes.counts_parts(name, args, kwargs, self._writer.open_dims, self._writer.is_fixed)
        if is_size or counts:
            where = self._scopes[-1] or "the network"
            self.data_reads.append(f"{name} in {where}, of a tensor whose size depends on them")

    def _open_dims(
        self,
        target: Any,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[int, tuple[tuple[int, ...], Dims]],
        made: Sequence[Tensor],
    ) -> list[Dims]:
        """For each result of an operation that just ran, the dims whose sizes depend on the images' values.

        Args:
            target: Its target on the tape.
            run: The function that ran, on `args` and `kwargs`.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            known: Shape and open dims, before the run, of each tensor in its arguments, by id.
            made: Its results.
        """
        opened = self._opened
        if image_sizes.keeps_sizes(operation_name(target), args):
            opened = [one for one in opened if one is not _SCALAR]
        has_open = any(dims for _, dims in known.values())
        if not opened and not has_open and not self._has_custom_kernel:
            return [image_sizes.NONE] * len(made)

        def dims_of(tensor: Tensor) -> Dims:
            return known[id(tensor)][1] if id(tensor) in known else image_sizes.NONE

        found = None if opened else image_sizes.carried_dims(run, args, kwargs, dims_of, made)
        dims = []
        for place, tensor in enumerate(made):
            shape = tuple(tensor.shape)
            if known.get(id(tensor), ((-1,),))[0] == shape:  # written in place
                dims.append(dims_of(tensor))
            elif found is not None:
                dims.append(found[place])
            elif opened and opened[-1][0] == shape and not has_open:
                dims.append(opened[-1][1])
            else:
                dims.append(image_sizes.all_dims(tensor))
        return dims

    def _where(self, target: Any) -> str:
        return f"{operation_name(target)} in {self._scopes[-1] or 'the network'}"

    def _check_context(self, inputs: Sequence[Tensor], target: Any) -> None:
        if not self._autocast and any(torch.is_autocast_enabled(tensor.device.type) for tensor in inputs):
            raise RecordingError(
                f"{self._where(target)} runs under autocast that the network's forward turned on; cast the network and "
                "its input to the wanted type instead, and leave autocast to the caller"
            )
        if torch.is_inference_mode_enabled():
            raise RecordingError(
                f"{self._where(target)} runs under inference_mode that the network's forward turned on, where writes "
                "to memory cannot be followed; use torch.no_grad there"
            )

    def _note_read(self, tensor: Tensor) -> None:
        """A value is read: by compiled code, such as a TorchScript function, or within an operation."""
        if self._paused:
            if not self._writer.is_fixed(tensor):
                self._opened.append(_SCALAR)  # as in x[:n], where n is a tensor
        elif self._writer.depends_on_input(self._writer.storages([tensor], self._scopes[-1])):
            self.data_reads.append(f"compiled code in {self._scopes[-1] or 'the network'}")

    def _note_open(self, kernel: Any, args: Sequence[Any], out: Any) -> None:
        """A kernel has made a result whose shape depends on values, or it is from another library and may have."""
        if kernel.namespace not in _NAMESPACES:
            self._has_custom_kernel = True
            return
        deciding = image_sizes.deciding_tensors(kernel, args)
        if all(self._writer.is_fixed(tensor) for tensor in deciding):
            return
        if not self._paused:
            where = self._scopes[-1] or "the network"
            self.data_reads.append(f"compiled code in {where}, which makes tensors whose size depends on them")
        elif isinstance(out, Tensor):
            self._opened.append((tuple(out.shape), image_sizes.open_dims(kernel, args, out)))
        else:
            self._opened.append(_ANY)


def _look(module: nn.Module) -> tuple[object, ...]:
    """The weights and hooks that a call of a module uses."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return (*map(id, tensors), *module._forward_hooks, *module._forward_pre_hooks)


def _version(tensor: Tensor) -> int:
    """How often a tensor's memory was written to (0 for parameters made under `inference_mode`, which do not count)."""
    return 0 if tensor.is_inference() else tensor._version
