"""Modules as bytes of ONNX and `.pt2` files, for any batch size and without paths of the machine."""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from pnc.composite.onnx_composite import METADATA_KEY
from pnc.foundation.errors import ExportError, InputError
from pnc.foundation.tensor_files import canonical_json

FACTS_FILE = "pnc.json"
"""Name of the extra file in a `.pt2` for the facts that an ONNX file has in its metadata."""

BATCH_SIZES = (1, 2, 5)
"""Batch sizes at which every export is tested."""

TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest one or to 1: kernels differ in the order of sums."""

OWN_ERRORS = 2.0
"""A larger difference is accepted up to so many times the original's own rounding error in float32: other kernels round
as much, in other directions."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Import the packages that write and run ONNX files.

    Raises:
        InputError: a package is missing.
    """
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f'the package {package} is needed for ONNX files; pip install "pnc[export]"') from error


def as_program(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """Export a module for any batch size; the first axis of every input is the batch.

    Args:
        module: Its registered tensors become weights of the program.
        example: One tensor per input, with at least two samples.
    Raises:
        ExportError: torch cannot export it.
    """
    with _reasons("torch.export cannot read it"), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in example))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program


def pt2_bytes(program: ExportedProgram, facts: Mapping[str, Any]) -> bytes:
    """Serialize a program for `torch.export.load`, with the facts as extra file `FACTS_FILE`."""
    buffer = io.BytesIO()
    with _reasons("torch.export cannot save it"):
        torch.export.save(program, buffer, extra_files={FACTS_FILE: canonical_json(facts)})
    return buffer.getvalue()


def pt2_runner(data: bytes) -> Callable[[Tensor], Tensor]:
    """Return a function that runs a `.pt2` that we have just written. Loading one of unknown origin can run code."""
    with _reasons("torch.export cannot load what it saved"):
        module = torch.export.load(io.BytesIO(data)).module()
    run: Callable[[Tensor], Tensor] = module
    return run


def onnx_bytes(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], facts: Mapping[str, Any]
) -> bytes:
    """Serialize a program as an ONNX model, in torch's default opset.

    Args:
        program: From `as_program`.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        facts: Stored in its metadata as JSON.
    Raises:
        ExportError: an operation has no counterpart in ONNX, or the model exceeds 2 GB.
    """
    with _reasons("it cannot be written as ONNX"):
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table={torch.ops.aten.log_sigmoid.default: _log_sigmoid},
        )
        assert made is not None
        model = made.model_proto
        _strip(model.graph)
        for function in model.functions:
            _strip(function)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        model.metadata_props.add(key=METADATA_KEY, value=json.dumps(facts, sort_keys=True))
        data: bytes = model.SerializeToString()
    return data


def _log_sigmoid(values: Any) -> Any:
    """logsigmoid for ONNX; the exporter's own takes the logarithm of the sigmoid, which is -inf below -100."""
    operators = importlib.import_module("onnxscript").opset18
    return operators.Neg(operators.Softplus(operators.Neg(values)))


def _strip(graph: Any) -> None:
    """Remove the exporter's notes on the origin of each node: paths of this machine, half of a small file."""
    for name in ("value_info", "metadata_props", "doc_string"):
        graph.ClearField(name)
    tables = ("node", "input", "output", "initializer")
    for part in (part for table in tables for part in getattr(graph, table, ()) if not isinstance(part, str)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
        for attribute in getattr(part, "attribute", ()):
            if attribute.HasField("g"):
                _strip(attribute.g)


def largest_difference(
    run: Callable[[Tensor], Tensor],
    expected: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Tensor],
    images: Tensor,
) -> float:
    """Compare an export with the original at each of `BATCH_SIZES`.

    Args:
        run: The export, from images to logits.
        expected: The original, from images to logits.
        exact: The original in float64; called only if it matters.
        images: As many as the largest batch.
    Returns:
        The largest difference of a logit, relative to the largest logit or to 1.
    Raises:
        ExportError: the export cannot be run, or differs by more than `TOLERANCE` and `OWN_ERRORS` allow.
    """
    worst = 0.0
    with torch.no_grad():
        for size in BATCH_SIZES:
            wanted = expected(images[:size])
            with _reasons(f"the export cannot be run on a batch of {size}"):
                found = run(images[:size].contiguous())
            if found.shape != wanted.shape:
                raise _failure(f"on a batch of {size} it gives logits {tuple(found.shape)}, not {tuple(wanted.shape)}")
            scale = wanted.abs().max().clamp_min(1)
            difference = float((found - wanted).abs().max() / scale)
            if not difference <= TOLERANCE:
                own = float((exact(images[:size]) - wanted).abs().max() / scale)
                if not difference <= OWN_ERRORS * own:
                    raise _failure(
                        f"on a batch of {size} its logits differ by {difference:.2g} of the largest one, more than "
                        f"{TOLERANCE:g}, and those in PyTorch by {own:.2g} from exact ones"
                    )
            worst = max(worst, difference)
    return worst


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Turn any error of the exporters into an `ExportError` of one line, and suppress their warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # noqa: BLE001 - any operation of the user's network, in three libraries
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        line = next(iter(str(error).strip().splitlines()), "no message")
        raise _failure(f"{what}: {type(error).__name__}: {line[:200]}") from error


def _failure(reason: str) -> ExportError:
    return ExportError(
        f"net cannot be exported: {reason}; nothing was written. Run it in PyTorch for now, and please report the "
        "networks"
    )
