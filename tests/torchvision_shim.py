"""Import torchvision also where its compiled operators do not load.

The wheel on PyPI is built for CUDA. On a CPU-only torch its library does not load, and the import stops at two
operators whose schema it would have brought. No classifier uses them, so declaring them is enough.
"""

import importlib
import sys
from types import ModuleType

import torch

_MISSING = "operator torchvision::nms does not exist"
_libraries: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def import_torchvision() -> ModuleType:
    """Import torchvision; where that fails for want of its operators, declare them and import again."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")
