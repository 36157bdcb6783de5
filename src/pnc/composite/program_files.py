"""Modules as the bytes of ONNX and `.pt2` files: for any number of images, with no trace of the machine."""

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
"""Name of the extra file in a `.pt2` that holds what the metadata of an ONNX file holds."""

BATCH_SIZES = (1, 2, 5)
"""Numbers of images at which everything is run that was exported."""

TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest one or to 1: other kernels sum in other orders."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Import what writes and runs ONNX files.

    Raises:
        InputError: a package is missing.
    """
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f'the package {package} is needed for ONNX files; pip install "pnc[export]"') from error


def as_program(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """Export a module whose inputs all have the batch in front, for any size of it.

    Args:
        module: Only its tensors that are registered become weights of the program.
        example: Two or more samples of each input.
    Raises:
        ExportError: torch cannot export it.
    """
    with _reasons("torch.export cannot read it"), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in example))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def pt2_bytes(program: ExportedProgram, facts: Mapping[str, Any]) -> bytes:
    """Write a program as `torch.export.load` reads it; the facts go along as the extra file `FACTS_FILE`."""
    buffer = io.BytesIO()
    with _reasons("torch.export cannot save it"):
        torch.export.save(program, buffer, extra_files={FACTS_FILE: canonical_json(facts)})
    return buffer.getvalue()


def pt2_runner(data: bytes) -> Callable[[Tensor], Tensor]:
    """Give what runs the bytes of a `.pt2` that we have just written: loading those of others can run code."""
    with _reasons("torch.export cannot load what it saved"):
        module = torch.export.load(io.BytesIO(data)).module()
    run: Callable[[Tensor], Tensor] = module
    return run


def onnx_bytes(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], facts: Mapping[str, Any]
) -> bytes:
    """Write a program as an ONNX model, in the opset that this torch thinks best.

    Args:
        program: As `as_program` gives it.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        facts: Go into its metadata, as JSON.
    Raises:
        ExportError: an operation has no counterpart in ONNX, or the model has more than 2 GB.
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
    """In ONNX; the exporter's own is the logarithm of the sigmoid, which is -inf below -100."""
    operators = importlib.import_module("onnxscript").opset18
    return operators.Neg(operators.Softplus(operators.Neg(values)))


def _strip(graph: Any) -> None:
    """Take off the exporter's notes on where each node comes from: paths of this machine, and half of a small file."""
    for name in ("value_info", "metadata_props", "doc_string"):
        graph.ClearField(name)
    tables = ("node", "input", "output", "initializer")
    for part in (part for table in tables for part in getattr(graph, table, ()) if not isinstance(part, str)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
        for attribute in getattr(part, "attribute", ()):
            if attribute.HasField("g"):
                _strip(attribute.g)


def largest_difference(run: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Run what was exported, at every one of `BATCH_SIZES`.

    Args:
        run: From images to logits.
        expected: From images to the logits that there should be.
        images: As many as the largest batch has.
    Returns:
        The largest difference of a logit, relative to the largest logit or to 1.
    Raises:
        ExportError: it fails, or differs by more than `TOLERANCE`.
    """
    worst = 0.0
    with torch.no_grad():
        for size in BATCH_SIZES:
            wanted = expected(images[:size])
            with _reasons(f"what was exported cannot be run on a batch of {size}"):
                found = run(images[:size].contiguous())
            if found.shape != wanted.shape:
                raise _failure(f"on a batch of {size} it gives logits {tuple(found.shape)}, not {tuple(wanted.shape)}")
            difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1))
            if not difference <= TOLERANCE:
                raise _failure(
                    f"on a batch of {size} its logits differ by {difference:.2g} of the largest one, more than "
                    f"{TOLERANCE:g}"
                )
            worst = max(worst, difference)
    return worst


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in the exporters into one line, and keep their warnings to themselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # noqa: BLE001 - operations of the user's choice in three libraries
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        line = next(iter(str(error).strip().splitlines()), "no message")
        raise _failure(f"{what}: {type(error).__name__}: {line[:200]}") from error


def _failure(reason: str) -> ExportError:
    return ExportError(
        f"net cannot be exported: {reason}; nothing was written. Please report the networks, and run it in PyTorch "
        "meanwhile"
    )
