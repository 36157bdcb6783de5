"""Exported programs of `torch.export` as networks."""

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pnc.foundation.errors import InputError
from pnc.graph.graph_modules import RecordedModule


def from_exported(program: ExportedProgram) -> nn.Module:
    """Turn an exported program into a network that can be a source or a target.

    Neither this function nor ``load_model`` opens files of exported programs: `torch.export.load` unpickles their
    content (constants, example inputs, weights of older files, with ``weights_only=False``), calls functions by name
    and evaluates Python expressions. Such a file can run any code, so open only your own:
    ``pnc.from_exported(torch.export.load("net.pt2"))``.

    Args:
        program: Exported from a classifier in eval mode, with one input, images (B, C, H, W), whose B is dynamic:
            ``torch.export.export(net.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))``.

    Returns:
        A network over the program's own parameters and buffers. Its mode is fixed at export: `train` and `eval` have no
        effect.

    Raises:
        InputError: `program` is not an exported program, has other inputs, or takes a fixed number of images.

    >>> import torch
    >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
    >>> program = torch.export.export(net.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    >>> from_exported(program)(torch.rand(5, 1, 2, 2)).shape
    torch.Size([5, 2])
    """
    if not isinstance(program, ExportedProgram):
        raise InputError(
            f"program: expected a torch.export.ExportedProgram, got {type(program).__name__}; "
            "give what torch.export.export or torch.export.load returns"
        )
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    if len(names) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        came = ", ".join(str(tuple(shape)) for shape in shapes) or "no tensor"
        raise InputError(f"program: expected one input, images (B, C, H, W); it takes {len(names)}: {came}")
    if isinstance(shapes[0][0], int):
        raise InputError(
            f"program: it takes exactly {shapes[0][0]} images at a time; export it again with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    unwrapped = program.module()
    assert isinstance(unwrapped, fx.GraphModule)  # true of every program
    return RecordedModule(unwrapped, unwrapped.graph).eval()  # train() and eval() of `unwrapped` itself raise
