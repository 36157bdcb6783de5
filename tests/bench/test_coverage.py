import json

import pytest
import torch
from torch import nn

from channel_zoo import Chain
from pnc.bench import coverage, library_classifiers
from pnc.bench.library_classifiers import CLASSIFIERS, chosen, family, prepared
from pnc.bench.result_files import Cells
from pnc.channels.channel_spaces import channel_spaces
from pnc.cli.app import app
from pnc.foundation.errors import InputError
from pnc.models.reference_networks import resnet
from segments import network, segment_of

HARD = {
    "timm:test_resnet": "residual streams",
    "timm:test_vit": "class token, fused attention",
    "timm:test_efficientnet": "depthwise convolutions, squeeze-excite",
    "timm:test_convnext": "layer scale, channels last",
    "transformers:Swin": "shifted windows, dataclass outputs",
}


@pytest.mark.parametrize("model", HARD)
def test_a_model_is_exact_shrinks_is_cloned_and_exported(model, torchvision):
    row = coverage.measure(model)
    assert row["reason"] == ""
    assert row["recorded"] and row["exact"] and row["shrunk_equals_masked"] and row["clone_runs"] and row["export_ok"]
    assert row["unchanged"] and row["cuts"] > 2 and 0 < row["largest_gap"] < 1
    assert 0.5 < row["prunable_share"] <= 1 and 0 < row["kept_at_half"] < 0.8


def test_what_the_recorder_refuses_has_its_reason(monkeypatch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, library_classifiers.N_CLASSES)

        def forward(self, x):
            x = x.flatten(1)
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    monkeypatch.setattr(coverage, "build", lambda model: (Branching().eval(), torch.randn(3, 3, 2, 2)))
    row = coverage.measure("mine:branching")
    assert not row["recorded"] and not row["exact"] and not row["clone_runs"] and row["unchanged"]
    assert row["reason"].startswith("record: ") and "reads values that depend on the images" in row["reason"]
    assert [claim.holds for claim in coverage.claims([row])][1:4] == [True, False, False]


def test_a_failing_stage_leaves_the_others(monkeypatch):
    def broken(*_):
        raise ValueError("no such thing\nmore")

    shape = (3, 16, 16)
    small = lambda _: (prepared(resnet(shape, 4, 1, width=0.25), torch.randn(4, *shape)), torch.randn(3, *shape))  # noqa: E731
    monkeypatch.setattr(coverage, "build", small)
    monkeypatch.setattr(coverage, "compact", broken)
    row = coverage.measure("mine:resnet")
    assert row["reason"] == "shrink: ValueError: no such thing. "
    assert row["recorded"] and row["exact"] and row["clone_runs"] and not row["shrunk_equals_masked"]


def test_time_and_memory_are_measured_again_once_for_each_commit(monkeypatch, tmp_path):
    images = torch.randn(4, 3, 16, 16)
    monkeypatch.setattr(coverage, "build", lambda _: (prepared(resnet((3, 16, 16), 4, 1), images), images))
    monkeypatch.setitem(coverage.CLASSIFIERS, "mine:resnet", 16)
    cells = Cells(tmp_path / "rows.jsonl", {}, coverage.KEYS)
    cells.add(
        {"model": "mine:resnet", "size": 16, "recorded": True, "seconds": 1e9, "cuts": 0, "clone_runs": "as it was"}
    )
    coverage.measure_again(["mine:resnet"], cells)
    (row,) = cells.rows
    assert 0 < row["seconds"] < 1e9 and row["cuts"] > 3 and row["clone_runs"] == "as it was"
    coverage.measure_again(["mine:resnet"], cells)
    assert cells.rows == [row]


def test_prunable_parameters_are_those_of_removable_channels():
    segment = segment_of(network(Chain))
    first, last = 8 * 3 * 9 + 8, 5 * 8  # the second convolution's own channels are the features, which stay
    assert coverage.prunable_params(channel_spaces(segment)) == first + last


def test_prepared_networks_hide_nothing():
    fresh = resnet((3, 16, 16), 4, 1, width=0.5)
    for norm in (m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.zeros_(norm.weight)
    images = torch.randn(8, 3, 16, 16)
    logits = prepared(fresh, images)(images)
    assert not fresh.training and all(not m.training for m in fresh.modules())
    assert all(parameter.std() > 0 for parameter in fresh.parameters())
    assert logits.std(0).min() > 1e-3, "the logits follow the images"
    assert next(m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)).momentum == 0.1


def test_models_are_chosen_by_patterns():
    assert len(chosen(None)) == len(CLASSIFIERS) >= 200
    assert chosen("timm:vit_tiny_*, torchvision:resnet18") == (
        *sorted(name for name in CLASSIFIERS if name.startswith("timm:vit_tiny_")),
        "torchvision:resnet18",
    )
    with pytest.raises(InputError, match=r"models: 'resnet18' is none of the \d+ models"):
        chosen("resnet18")
    assert (family("timm:resnet26d"), family("transformers:Swinv2"), family("timm:xcit_nano_12_p16_224")) == (
        "ResNet",
        "Swin",
        None,
    )


def test_every_model_of_the_list_is_built_by_a_library_that_knows_it(torchvision):
    import timm
    import transformers

    for model in CLASSIFIERS:
        library, _, name = model.partition(":")
        if library == "timm":
            assert timm.is_model(name), model
        elif library == "torchvision":
            assert name in torchvision.models.list_models(), model
        else:
            stem = library_classifiers.TRANSFORMERS[name][0].partition("ForImage")[0]
            assert hasattr(transformers, f"{stem}Config"), model


def test_the_command_writes_results_and_goes_on(tmp_path, monkeypatch, capsys, torchvision):
    measured = []

    def measure(model):
        measured.append(model)
        row = dict.fromkeys(coverage.COLUMNS)
        return {**row, "model": model, "recorded": True, "exact": True, "clone_runs": True, "unchanged": True,
                "seconds": 0.1, "kept_at_half": 0.5, "shrunk_equals_masked": True, "reason": ""}  # fmt: skip

    monkeypatch.setattr(coverage, "measure", measure)
    command = ["bench", "coverage", "--models", "timm:resnet18,timm:vit_tiny_patch16_224", "--json"]
    for _ in range(2):
        app([*command, str(tmp_path / "coverage.json")], standalone_mode=False)
    assert measured == ["timm:resnet18", "timm:vit_tiny_patch16_224"], "the second run has nothing left to do"
    facts = json.loads((tmp_path / "coverage.json").read_text())
    assert [row["model"] for row in facts["rows"]] == measured
    held = {claim["claim"]: claim["holds"] for claim in facts["claims"]}
    assert held["share of parameters left with half of the channels, ResNet, worst"] is False
    assert held["share of parameters left with half of the channels, ViT, worst"] is True
    assert "| timm:resnet18 | 64 |" in (tmp_path / "coverage.md").read_text()


def test_a_library_that_is_missing_is_an_error_and_no_row(tmp_path, monkeypatch):
    def no_library(module):
        raise InputError(f"model: the package {module} is needed for this")

    monkeypatch.setattr(library_classifiers, "load_library", no_library)
    with pytest.raises(InputError, match="the package torchvision is needed"):
        coverage.bench(["timm:resnet18"]).measure(cells := Cells(tmp_path / "rows.jsonl", {}, coverage.KEYS), None)
    assert cells.rows == []
