"""Partial network cloning: give a trained PyTorch classifier classes of another one, without changing a bit of it.

clone = pnc.clone(source, target, support, source_classes=[...], base_classes=[...])
net = pnc.attach(target, clone)         # logits: the target's own, then the clone's
pnc.save(clone, "clone.safetensors")    # kilobytes
net.detach(clone.name)                  # and the target is alone again, bit for bit

Everything is loaded when it is first asked for: where clones only run, the code that makes them stays out of the
process, and `OnnxComposite` runs without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnc.clones.branch import Scalars
    from pnc.clones.clone import Clone
    from pnc.clones.clone_file import inspect, load, save
    from pnc.composite.answering import Prediction, predict
    from pnc.composite.composite import Composite, attach
    from pnc.composite.evaluation import EvaluationReport, evaluate
    from pnc.composite.export import Exported, export, export_split
    from pnc.composite.forward_plan import CloneStatus
    from pnc.composite.fused_composite import FusedComposite
    from pnc.composite.onnx_composite import OnnxComposite
    from pnc.composite.verification import Report, snapshot, verify
    from pnc.data.image_set import ImageSet
    from pnc.data.normalization import Normalization
    from pnc.data.readers import load_data
    from pnc.data.support import Support, draw_support
    from pnc.foundation.errors import (
        ClassNameError,
        ExportError,
        FileFormatError,
        InputError,
        MismatchError,
        PNCError,
        PNCWarning,
        RecordingError,
        ServerError,
    )
    from pnc.foundation.process_team import Team, joined
    from pnc.method.calibration import Calibration, calibrate
    from pnc.method.pipeline import clone, fit
    from pnc.method.positions import Position, Scan, scan
    from pnc.method.task import CloneTask, prepare_task
    from pnc.models.exported_programs import from_exported
    from pnc.models.model_specs import LoadedModel, load_model
    from pnc.models.outputs import Output
    from pnc.models.preprocessing import Preprocessed
    from pnc.report.hub import from_pretrained, push_to_hub, save_pretrained
    from pnc.report.page import write_report
    from pnc.serving.client import Client
    from pnc.zoo.model_zoo import Zoo
    from pnc.zoo.rank import rank
    from pnc.zoo.ranking import Ranking

__all__ = [
    "Calibration",
    "ClassNameError",
    "Client",
    "Clone",
    "CloneStatus",
    "CloneTask",
    "Composite",
    "EvaluationReport",
    "ExportError",
    "Exported",
    "FileFormatError",
    "FusedComposite",
    "ImageSet",
    "InputError",
    "LoadedModel",
    "MismatchError",
    "Normalization",
    "OnnxComposite",
    "Output",
    "PNCError",
    "PNCWarning",
    "Position",
    "Prediction",
    "Preprocessed",
    "Ranking",
    "RecordingError",
    "Report",
    "Scalars",
    "Scan",
    "ServerError",
    "Support",
    "Team",
    "Zoo",
    "attach",
    "calibrate",
    "clone",
    "draw_support",
    "evaluate",
    "export",
    "export_split",
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
    "rank",
    "save",
    "save_pretrained",
    "scan",
    "snapshot",
    "verify",
    "write_report",
]

_NAMES_OF = {
    "clones.branch": "Scalars",
    "clones.clone": "Clone",
    "clones.clone_file": "inspect load save",
    "composite.answering": "Prediction predict",
    "composite.composite": "Composite attach",
    "composite.evaluation": "EvaluationReport evaluate",
    "composite.export": "Exported export export_split",
    "composite.forward_plan": "CloneStatus",
    "composite.fused_composite": "FusedComposite",
    "composite.onnx_composite": "OnnxComposite",
    "composite.verification": "Report snapshot verify",
    "data.image_set": "ImageSet",
    "data.normalization": "Normalization",
    "data.readers": "load_data",
    "data.support": "Support draw_support",
    "foundation.errors": "ClassNameError ExportError FileFormatError InputError MismatchError PNCError PNCWarning "
    "RecordingError ServerError",
    "foundation.process_team": "Team joined",
    "method.calibration": "Calibration calibrate",
    "method.pipeline": "clone fit",
    "method.positions": "Position Scan scan",
    "method.task": "CloneTask prepare_task",
    "models.exported_programs": "from_exported",
    "models.model_specs": "LoadedModel load_model",
    "models.outputs": "Output",
    "models.preprocessing": "Preprocessed",
    "report.hub": "from_pretrained push_to_hub save_pretrained",
    "report.page": "write_report",
    "zoo.model_zoo": "Zoo",
    "zoo.rank": "rank",
    "zoo.ranking": "Ranking",
    "serving.client": "Client",
}
_LOADED_WHEN_ASKED = {name: f"pnc.{module}" for module, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_ASKED:
        raise AttributeError(f"module 'pnc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LOADED_WHEN_ASKED[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
