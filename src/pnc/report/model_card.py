"""A clone's model card: Markdown with front matter for model hubs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pnc.clones.clone import Clone
from pnc.composite.evaluation import EvaluationReport

FILE = "clone.safetensors"
"""Name of the clone file in its folder or repository."""

_MEASURES = {
    "average_accuracy": "accuracy, mean of base and new classes",
    "base_accuracy": "accuracy on base classes",
    "new_accuracy": "accuracy on new classes",
    "base_drop": "accuracy lost by base classes",
    "leak": "leak: mean probability of new classes on base images",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the clone.

    Attributes:
        repository: The ID or folder to give to `from_pretrained` in the example.
        base_models: IDs of target and source on the hub, if they are there.
        licence: Identifier, such as "mit"; None omits it.
        evaluation: From `pnc.evaluate`.
        dataset: Name of the images that were measured.
    """

    repository: str
    base_models: Sequence[str] = ()
    licence: str | None = None
    evaluation: EvaluationReport | None = None
    dataset: str | None = None


def model_card(clone: Clone, kind: str, needs_source: bool, about: CardFacts) -> str:
    """Write the card of a clone.

    Args:
        clone: The clone.
        kind: "thin" or "full", the kind of its file.
        needs_source: Whether loading its file needs the source.
        about: What else the card says.
    """
    front = _front_matter(clone, about.base_models, about.licence, about.evaluation, about.dataset)
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    text = _text(clone, kind, needs_source, about)
    return "\n\n".join([f"---\n{lines}\n---", *text, *_results(about.evaluation, about.dataset)]) + "\n"


def _front_matter(
    clone: Clone,
    base_models: Sequence[str],
    licence: str | None,
    evaluation: EvaluationReport | None,
    dataset: str | None,
) -> dict[str, Any]:
    """The front matter; its values are written as JSON, which is also YAML."""
    facts: dict[str, Any] = {
        "library_name": "pnc",
        "pipeline_tag": "image-classification",
        "tags": ["pnc", "partial-network-cloning"],
    }
    if licence is not None:
        facts["license"] = licence
    if base_models:
        facts |= {"base_model": list(base_models), "base_model_relation": "adapter"}
    if evaluation is not None:
        metrics = [
            {"type": "accuracy", "name": name, "value": getattr(evaluation, key)}
            for key, name in _MEASURES.items()
            if key.endswith("accuracy")
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": dataset or "unknown", "name": dataset or "unknown"},
            "metrics": metrics,
        }
        facts["model-index"] = [{"name": clone.name, "results": [result]}]
    return facts


def _text(clone: Clone, kind: str, needs_source: bool, about: CardFacts) -> list[str]:
    recipe = clone.recipe
    weights = "includes the weights of the source" if kind == "full" else "needs the weights of the source"
    made_for = f" Made for {' and '.join(about.base_models)}." if about.base_models else ""
    facts: Mapping[str, str] = {
        "new classes": ", ".join(clone.classes),
        "base classes": ", ".join(clone.base_classes),
        "leaves the target at": f"{clone.target_cut.name} ({_shape(clone.target_cut.shape)})",
        "enters the source at": f"{clone.source_cut.name} ({_shape(clone.source_cut.shape)})",
        "images": _shape(clone.input_shape),
        "made from": f"{recipe['n_new_samples']} new, {recipe['n_base_samples']} base images",
        "held-out score": f"{recipe['score']:.3f} ± {recipe['standard_error']:.3f}",
        "added multiply-accumulates": f"{recipe['macs_share']:.1%} of the source's",
        "target's fingerprint": clone.target.weights,
        "source's fingerprint": clone.source.weights,
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    given = ", source=source" if needs_source else ""
    call = f"pnc.from_pretrained({json.dumps(about.repository, ensure_ascii=False)}{given})"
    return [
        f"# {_cell(clone.name)}",
        f"A clone of `pnc` (partial network cloning): it gives a trained classifier {len(clone.classes)} more "
        f"{'class' if len(clone.classes) == 1 else 'classes'} without changing it, bit for bit. The file {weights}."
        f"{made_for}",
        f"```python\nimport pnc\n\nclone = {call}\nnet = pnc.attach(target, clone)\nprint(net.classes)\n"
        'for one in pnc.predict(net, "photos/"):\n    print(one)\nnet.detach(clone.name)  # exact\n```',
        f"| | |\n|---|---|\n{table}",
        "It is refused for a target or source with other fingerprints. If base and new classes look alike, images of "
        "base classes leak to new ones.",
    ]


def _results(evaluation: EvaluationReport | None, dataset: str | None) -> list[str]:
    if evaluation is None:
        return []
    on = f" of {_cell(dataset)}" if dataset else ""
    rows = "\n".join(f"| {name} | {getattr(evaluation, key):.3f} |" for key, name in _MEASURES.items())
    return [f"## Measured\n\nOn {evaluation.n_images:,} images{on}.\n\n| measure | value |\n|---|---|\n{rows}"]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _cell(text: str) -> str:
    """Escape text for Markdown, including tables."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return text
