from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pnc
from digits import BASE, NEW, held_out_images, pair, support
from pnc.composite.metrics import measure_logits
from pnc.foundation.errors import InputError, RecordingError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.recording import record
from pnc.models.exported_programs import from_exported
from pnc.models.model_specs import load_model


def export(module: nn.Module, *inputs: Tensor, batch: Any = None) -> ExportedProgram:
    dim = {0: batch or Dim("batch")}
    return torch.export.export(module, inputs, dynamic_shapes=tuple(dim for _ in inputs))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of `pair()` as an exported program on disk."""
    path = tmp_path_factory.mktemp("exported") / "source.pt2"
    torch.export.save(export(pair().source.module, torch.rand(2, 1, 8, 8)), path)
    return path


def test_a_program_gives_the_bits_of_its_network_and_is_recorded(file: Path) -> None:
    network = from_exported(torch.export.load(file))
    digits = held_out_images().images
    recording = record(network, digits[:2])
    with torch.no_grad():
        logits = network(digits)
        assert same_bits(logits, pair().source.module(digits))
        assert same_bits(recording.module(digits), logits)
        assert same_bits(network.train()(digits), network.eval()(digits))


def test_a_program_can_be_a_source_and_a_target(file: Path, tmp_path: Path) -> None:
    program = from_exported(torch.export.load(file))
    test = held_out_images()
    for source, target in ((program, pair().target.module), (pair().target.module, program)):
        names = {"source_classes": NEW, "base_classes": BASE}
        labelled = support()
        if target is program:  # it knows the new digits, so the names are swapped
            names = {"source_classes": BASE, "base_classes": NEW}
        before = take_snapshot(program)
        clone = pnc.clone(source, target, labelled, **names)
        pnc.save(clone, tmp_path / "c.safetensors")
        net = pnc.attach(target, pnc.load(tmp_path / "c.safetensors", source=source))
        with torch.no_grad():
            logits, own = net(test.images), target(test.images)
        assert same_bits(logits[:, :5], own)
        places = torch.tensor([net.classes.index(name) for name in test.classes])
        assert measure_logits(logits, places[test.labels], own).average_accuracy > 0.9
        assert not differences(program, before)


def test_a_spec_names_a_function_that_opens_the_file(file: Path, tmp_path: Path) -> None:
    code = f"import pnc, torch\ndef source(): return pnc.from_exported(torch.export.load({str(file)!r}))\n"
    (tmp_path / "mine.py").write_text(code)
    model = load_model(f"py:{tmp_path / 'mine.py'}:source", None, NEW, (1, 8, 8))
    digits = held_out_images().images
    with torch.no_grad():
        assert same_bits(model.module(digits), pair().source.module(digits))
    with pytest.raises(
        InputError, match=r"pt2:\S+ is not opened, because torch.export.load runs code .*give py:FILE.py"
    ):
        load_model(f"pt2:{file}", None, NEW, (1, 8, 8))


def test_a_bound_on_the_batch_stays(file: Path) -> None:
    network = from_exported(export(nn.Flatten().eval(), torch.rand(2, 1, 2, 2), batch=Dim("batch", max=8)))
    assert network(torch.rand(8, 1, 2, 2)).shape == (8, 4)
    with pytest.raises(AssertionError, match="<= 8"):
        network(torch.rand(9, 1, 2, 2))


class Sum(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one + other).flatten(1)


def test_programs_that_are_no_classifiers_of_images_are_refused() -> None:
    image = torch.rand(2, 1, 2, 2)
    with pytest.raises(InputError, match="program: expected a torch.export.ExportedProgram, got Flatten"):
        from_exported(nn.Flatten())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="it takes exactly 2 images at a time; export it again with dynamic_shapes="):
        from_exported(torch.export.export(nn.Flatten(), (image,)))
    with pytest.raises(InputError, match=r"expected one input, images \(B, C, H, W\); it takes 2: \("):
        from_exported(export(Sum(), image, image))
    with pytest.raises(InputError, match=r"it takes 1: \(s\d+, 4\)"):
        from_exported(export(nn.Flatten(), torch.rand(2, 4)))


def test_programs_exported_in_train_mode_are_refused_by_the_recorder() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)).train()
    program = from_exported(export(network, torch.rand(2, 1, 2, 2)))
    with pytest.raises(RecordingError, match="different logits for the same images"):
        record(program, torch.rand(2, 1, 2, 2))
