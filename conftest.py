"""Names for the examples in docstrings: two tiny networks, a support, and a clone attached to one of them."""

import re
from typing import Any

import pytest
import torch

import pnc
from pnc.models.model_specs import build_model


@pytest.fixture(scope="session")
def example() -> dict[str, Any]:
    """Untrained networks for 8x8 images and a clone; shared, so no example may change them."""
    names = {"source_classes": ["cat", "dog"], "base_classes": ["ant", "bee"]}
    source, target = (
        build_model("zoo:cnn?width=0.25", one, (1, 8, 8), seed=seed).module for seed, one in enumerate(names.values())
    )
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(4, 1, 8, 8, generator=generator).repeat_interleave(6, 0)
    images = 0.8 * patterns + 0.2 * torch.rand(24, 1, 8, 8, generator=generator)
    support = images, [name for name in ("ant", "bee", "cat", "dog") for _ in range(6)]
    clone = pnc.clone(source, target, support, effort="seconds", **names)
    net = pnc.attach(target, clone)
    return {"source": source, "target": target, "support": support, "names": names, "clone": clone, "net": net}


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest) -> None:
    """Give doctests these names, and an empty working directory; make the clone only for examples that need it."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    namespace = request.getfixturevalue("doctest_namespace")
    namespace.update(pnc=pnc, torch=torch)
    assert request.node.dtest is not None
    code = "".join(one.source for one in request.node.dtest.examples)
    if re.search(r"\b(source|target|support|names|clone|net)\b", code):
        namespace.update(request.getfixturevalue("example"))
