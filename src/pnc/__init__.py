"""Partial network cloning: give a trained PyTorch classifier classes of another one, without changing a bit of it.

clone = pnc.clone(source, target, support, source_classes=[...], base_classes=[...])
net = pnc.attach(target, clone)         # logits: the target's own, then the clone's
pnc.save(clone, "clone.safetensors")    # kilobytes
net.detach(clone.name)                  # and the target is alone again, bit for bit

What makes clones is loaded when it is first asked for: where clones only run, that code stays out of the process.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pnc.clones.branch import Scalars
from pnc.clones.clone import Clone
from pnc.clones.clone_file import inspect, load, save
from pnc.composite.answering import Prediction, predict
from pnc.composite.composite import Composite, attach
from pnc.composite.evaluation import EvaluationReport, evaluate
from pnc.composite.forward_plan import CloneStatus
from pnc.composite.fused_composite import FusedComposite
from pnc.composite.verification import Report, snapshot, verify
from pnc.data.image_set import ImageSet
from pnc.data.normalization import Normalization
from pnc.data.readers import load_data
from pnc.data.support import Support, draw_support
from pnc.foundation.errors import (
    ClassNameError,
    FileFormatError,
    InputError,
    MismatchError,
    PNCError,
    RecordingError,
)
from pnc.foundation.process_team import Team, joined

if TYPE_CHECKING:
    from pnc.method.calibration import Calibration, calibrate
    from pnc.method.pipeline import clone, fit
    from pnc.method.positions import Position, Scan, scan
    from pnc.method.task import CloneTask, prepare_task
    from pnc.models.exported_programs import from_exported
    from pnc.models.model_specs import LoadedModel, load_model
    from pnc.models.preprocessing import Preprocessed
    from pnc.report.hub import from_pretrained, push_to_hub, save_pretrained
    from pnc.report.page import write_report

__all__ = [
    "Calibration",
    "ClassNameError",
    "Clone",
    "CloneStatus",
    "CloneTask",
    "Composite",
    "EvaluationReport",
    "FileFormatError",
    "FusedComposite",
    "ImageSet",
    "InputError",
    "LoadedModel",
    "MismatchError",
    "Normalization",
    "PNCError",
    "Position",
    "Prediction",
    "Preprocessed",
    "RecordingError",
    "Report",
    "Scalars",
    "Scan",
    "Support",
    "Team",
    "attach",
    "calibrate",
    "clone",
    "draw_support",
    "evaluate",
    "fit",
    "from_exported",
    "from_pretrained",
    "inspect",
    "joined",
    "load",
    "load_data",
    "load_model",
    "predict",
    "prepare_task",
    "push_to_hub",
    "save",
    "save_pretrained",
    "scan",
    "snapshot",
    "verify",
    "write_report",
]

_LOADED_WHEN_ASKED = {
    **dict.fromkeys(("Calibration", "calibrate"), "pnc.method.calibration"),
    **dict.fromkeys(("clone", "fit"), "pnc.method.pipeline"),
    **dict.fromkeys(("Position", "Scan", "scan"), "pnc.method.positions"),
    **dict.fromkeys(("CloneTask", "prepare_task"), "pnc.method.task"),
    "from_exported": "pnc.models.exported_programs",
    **dict.fromkeys(("LoadedModel", "load_model"), "pnc.models.model_specs"),
    "Preprocessed": "pnc.models.preprocessing",
    **dict.fromkeys(("from_pretrained", "push_to_hub", "save_pretrained"), "pnc.report.hub"),
    "write_report": "pnc.report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_ASKED:
        raise AttributeError(f"module 'pnc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LOADED_WHEN_ASKED[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
