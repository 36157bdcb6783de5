"""Files with forged metadata and a recomputed digest: detectable changes are refused, others reported as unproven."""

import json

import pytest

import pnc
from digits import pair, support
from pnc.clones.clone_file import read_clone_file
from pnc.composite.file_proof import prove
from pnc.foundation.errors import ClassNameError
from pnc.foundation.tensor_files import read_tensors, write_tensors


def changed(path, change):
    """Rewrite the file with other metadata and a matching digest."""
    tensors, facts = read_tensors(path)
    facts = json.loads(json.dumps(facts))
    change(facts)
    write_tensors(path, tensors, facts)
    read_clone_file(path)  # still valid
    return path


@pytest.fixture
def file(tmp_path):
    nets = pair()
    made = pnc.clone(nets.source.module, nets.target.module, support(5, 5), **nets.names())
    pnc.save(made, tmp_path / "clone.safetensors")
    return tmp_path / "clone.safetensors"


def other_names(facts):
    facts["base_classes"][0] = "zero"


@pytest.mark.parametrize("change", [lambda facts: facts["base_classes"].reverse(), other_names])
def test_names_of_the_targets_outputs_are_compared_with_its_own(file, change):
    nets = pair()
    clone = pnc.load(changed(file, change), source=nets.source.module)
    with pytest.raises(ClassNameError, match=r"calls the target's outputs .*, here they are 0, 1, 2, 3, 4; clone with"):
        pnc.attach(nets.target, clone)
    failed = prove(file, nets.target.module, nets.source.module, base_classes=nets.target.classes)[-1]
    assert (failed.what, failed.ok) == ("names", False) and "the file calls the target's outputs" in failed.found
    assert pnc.attach(nets.target.module, clone).verify().ok, "a network alone has no names"


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: None,
        lambda facts: facts["classes"].reverse(),
        lambda facts: facts["recipe"].update(score=1.0),
        lambda facts: facts["base_classes"].reverse(),
    ],
)
def test_verify_says_what_is_not_proven(file, change):
    nets = pair()
    net = pnc.attach(nets.target.module, pnc.load(changed(file, change), source=nets.source.module))
    report = net.verify()
    assert report.ok and len(report.unproven) == 1
    assert "not proven: class names, position and scores come from the file" in str(report)
    assert pnc.verify(nets.target.module, pnc.snapshot(nets.target.module)).unproven == ()


def test_what_load_model_gives_is_a_target(file):
    nets = pair()
    clone = pnc.load(file, source=nets.source.module)
    assert pnc.attach(nets.target, clone).target is nets.target.module
