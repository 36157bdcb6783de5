"""Partial network cloning: give a trained PyTorch classifier classes of another one, without changing a bit of it.

clone = pnc.clone(source, target, support, source_classes=[...], base_classes=[...])
net = pnc.attach(target, clone)         # logits: the target's own, then the clone's
pnc.save(clone, "clone.safetensors")    # kilobytes
net.detach(clone.name)                  # and the target is alone again, bit for bit

Every name is loaded when it is first asked for: importing the package takes no time, and where clones only run, the
code that makes them stays out of the process.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnc.clones.branch import Scalars
    from pnc.clones.clone import Clone
    from pnc.clones.clone_file import inspect, load, save
    from pnc.composite.composite import Composite, attach
    from pnc.composite.forward_plan import CloneStatus
    from pnc.composite.fused_composite import FusedComposite
    from pnc.composite.verification import Report, snapshot, verify
    from pnc.data.image_set import ImageSet
    from pnc.data.readers import load_data
    from pnc.data.support import Support, draw_support
    from pnc.foundation.errors import (
        ClassNameError,
        FileFormatError,
        InputError,
        MismatchError,
        PNCError,
        PNCWarning,
        RecordingError,
    )
    from pnc.foundation.process_team import Team, joined
    from pnc.method.calibration import Calibration, calibrate
    from pnc.method.pipeline import clone, fit
    from pnc.method.positions import Position, Scan, scan
    from pnc.method.task import CloneTask, prepare_task
    from pnc.models.exported_programs import from_exported
    from pnc.models.model_specs import LoadedModel, load_model
    from pnc.models.preprocessing import Preprocessed

__all__ = [
    "Calibration",
    "ClassNameError",
    "Clone",
    "CloneStatus",
    "CloneTask",
    "Composite",
    "FileFormatError",
    "FusedComposite",
    "ImageSet",
    "InputError",
    "LoadedModel",
    "MismatchError",
    "PNCError",
    "PNCWarning",
    "Position",
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
    "fit",
    "from_exported",
    "inspect",
    "joined",
    "load",
    "load_data",
    "load_model",
    "prepare_task",
    "save",
    "scan",
    "snapshot",
    "verify",
]

_PLACES = {
    "pnc.clones.branch": ("Scalars",),
    "pnc.clones.clone": ("Clone",),
    "pnc.clones.clone_file": (
        "inspect",
        "load",
        "save",
    ),
    "pnc.composite.composite": (
        "Composite",
        "attach",
    ),
    "pnc.composite.forward_plan": ("CloneStatus",),
    "pnc.composite.fused_composite": ("FusedComposite",),
    "pnc.composite.verification": (
        "Report",
        "snapshot",
        "verify",
    ),
    "pnc.data.image_set": ("ImageSet",),
    "pnc.data.readers": ("load_data",),
    "pnc.data.support": (
        "Support",
        "draw_support",
    ),
    "pnc.foundation.errors": (
        "ClassNameError",
        "FileFormatError",
        "InputError",
        "MismatchError",
        "PNCError",
        "PNCWarning",
        "RecordingError",
    ),
    "pnc.foundation.process_team": (
        "Team",
        "joined",
    ),
    "pnc.method.calibration": (
        "Calibration",
        "calibrate",
    ),
    "pnc.method.pipeline": (
        "clone",
        "fit",
    ),
    "pnc.method.positions": (
        "Position",
        "Scan",
        "scan",
    ),
    "pnc.method.task": (
        "CloneTask",
        "prepare_task",
    ),
    "pnc.models.exported_programs": ("from_exported",),
    "pnc.models.model_specs": (
        "LoadedModel",
        "load_model",
    ),
    "pnc.models.preprocessing": ("Preprocessed",),
}
_LOADED_WHEN_ASKED = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_ASKED:
        raise AttributeError(f"module 'pnc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LOADED_WHEN_ASKED[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
