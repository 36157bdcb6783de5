import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pnc
from digits import BASE, NEW, held_out_images, network, pair, support
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet
from pnc.data.support import Support
from pnc.foundation.errors import InputError, MismatchError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import LOGITS, cut_points, extract
from pnc.graph.recording import Recording, record
from pnc.models.preprocessing import Preprocessed
from pnc.models.reference_networks import cnn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def small(input_shape: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return cnn(input_shape, 3, width=0.25).eval()


def operations(recording: Recording) -> list[str]:
    """The recorded operations before the network itself."""
    found = []
    for node in recording.module.graph.nodes:
        if str(node.target).startswith("network."):
            return found
        if node.op.startswith("call"):
            found.append(getattr(node.target, "__name__", str(node.target)))
    raise AssertionError("the network is not in its recording")


# ------------------------------------------------------------------------------------------------ what it does
def test_normalisation_is_that_of_torchvision_bit_for_bit() -> None:
    x = images(2, 3, 8, 8)
    expected = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(Preprocessed(nn.Identity(), (3, 8, 8), MEAN, STD)(x), expected)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (5, 7)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_sizes_change_as_in_pillow(size: tuple[int, int], interpolation: Any) -> None:
    x = images(1, 1, 16, 24)
    wrapped = Preprocessed(nn.Identity(), (1, *size), interpolation=interpolation)
    resample = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(x[0, 0].numpy()).resize(size[::-1], resample)).copy()
    # Pillow's weights are in double precision, torch's in single.
    assert torch.allclose(wrapped(x)[0, 0], torch.from_numpy(expected).clamp(0, 1), atol=3e-6, rtol=0)


def test_bicubic_overshoot_is_clamped() -> None:
    steps = torch.zeros(1, 1, 8, 8)
    steps[..., 4:] = 1
    found = Preprocessed(nn.Identity(), (1, 32, 32), interpolation="bicubic")(steps)
    assert (found.min(), found.max()) == (0, 1)


def test_grey_and_colour() -> None:
    colour, grey = images(2, 3, 8, 8), images(2, 1, 8, 8)
    to_grey = Preprocessed(nn.Identity(), (1, 8, 8))
    by_pillow = [
        np.asarray(Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).convert("L")) for x in colour
    ]
    # Pillow rounds to whole numbers from 0 to 255, before and after.
    assert torch.allclose(to_grey(colour)[:, 0] * 255, torch.from_numpy(np.stack(by_pillow)).float(), atol=1.5, rtol=0)
    assert torch.equal(Preprocessed(nn.Identity(), (3, 8, 8))(grey), grey.expand(-1, 3, -1, -1))
    shifted = Preprocessed(nn.Identity(), (3, 8, 8), mean=MEAN)(grey)
    assert torch.equal(shifted, grey - torch.tensor(MEAN)[:, None, None])


def test_blue_comes_first_before_normalisation() -> None:
    x = images(2, 3, 8, 8)
    found = Preprocessed(nn.Identity(), (3, 8, 8), mean=MEAN, blue_first=True)(x)
    assert torch.equal(found, x[:, [2, 1, 0]] - torch.tensor(MEAN)[:, None, None])


def test_pixels_from_0_to_255() -> None:
    x = torch.arange(256.0).reshape(1, 1, 16, 16) / 255
    found = Preprocessed(nn.Identity(), (1, 16, 16), mean=127 / 255, std=128 / 255)(x)
    # (255 x - 127) / 128, with the same float32 operations in another order.
    assert torch.allclose(found, (x * 255 - 127) / 128, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_numbers_have_the_type_of_the_network(dtype: torch.dtype) -> None:
    wrapped = Preprocessed(small((3, 8, 8)).to(dtype), (3, 8, 8), MEAN, STD)
    assert wrapped(images(2, 3, 8, 8).to(dtype)).dtype == dtype
    assert wrapped.mean is not None and wrapped.mean.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "net"}, "network: expected a torch.nn.Module, got str"),
        ({"input_shape": (8, 8)}, r"expected three positive whole numbers \(C, H, W\), got \(8, 8\)"),
        ({"mean": (0.5, 0.5)}, r"mean: expected one number, or one for each of 3 channels; got \(0.5, 0.5\)"),
        ({"mean": float("nan")}, "mean: expected one number"),
        ({"std": (1, 1, "1")}, "std: expected one number"),
        ({"std": 0}, "std: expected numbers above 0, got 0"),
        ({"interpolation": "lanczos"}, "expected one of nearest, bilinear, bicubic; got 'lanczos'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessed(**{"network": nn.Identity(), "input_shape": (3, 8, 8), **arguments})


@pytest.mark.parametrize(("given", "taken"), [(2, 3), (4, 3), (4, 1), (3, 4)])
def test_channels_that_cannot_be_made_are_refused(given: int, taken: int) -> None:
    with pytest.raises(InputError, match=f"{given} channels cannot be turned into the network's {taken}"):
        Preprocessed(nn.Identity(), (taken, 8, 8))(images(1, given, 8, 8))


# ------------------------------------------------------------------------------------------------ normalized before
def test_the_normalization_of_another_loader_is_undone_first() -> None:
    theirs = pnc.Normalization((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    batch = images(2, 3, 8, 8)
    inner = Preprocessed(nn.Identity(), (3, 5, 5), MEAN, STD)
    outer = Preprocessed(nn.Identity(), (3, 5, 5), MEAN, STD, given=theirs)
    normalized = theirs.apply(batch)
    assert torch.equal(outer(normalized), inner(theirs.undo(normalized)))
    assert torch.allclose(outer(normalized), inner(batch), atol=1e-5)  # x - m and back rounds


def test_grey_images_of_another_loader_become_colour_after_it_is_undone() -> None:
    theirs = pnc.Normalization(0.5, 0.25)
    normalized = theirs.apply(images(2, 1, 8, 8))
    outer = Preprocessed(nn.Identity(), (3, 8, 8), MEAN, STD, given=theirs)
    assert torch.equal(outer(normalized), Preprocessed(nn.Identity(), (3, 8, 8), MEAN, STD)(theirs.undo(normalized)))


@pytest.mark.parametrize("theirs", [pnc.Normalization(MEAN, STD), pnc.Normalization(0.5, 0.25)])
def test_images_normalized_as_the_network_wants_them_pass_as_they_are(theirs: pnc.Normalization) -> None:
    own = (MEAN, STD) if isinstance(theirs.mean, tuple) else ((0.5,) * 3, 0.25)
    batch = images(2, 3, 8, 8)
    wrapped = Preprocessed(nn.Identity(), (3, 8, 8), *own, given=theirs)
    assert wrapped(batch) is batch
    assert wrapped(images(2, 3, 9, 8)).shape == (2, 3, 8, 8)
    other = Preprocessed(nn.Identity(), (3, 8, 8), MEAN, 1.0, given=theirs)
    assert not torch.equal(other(batch), batch)


def test_without_given_state_and_fingerprint_are_as_before() -> None:
    plain = Preprocessed(small((3, 8, 8)), (3, 8, 8), MEAN, STD)
    assert set(plain.state_dict()) == {"mean", "std", "pipeline", *(f"network.{n}" for n in plain.network.state_dict())}
    given = Preprocessed(plain.network, (3, 8, 8), MEAN, STD, given=pnc.Normalization(0.5))
    assert set(given.state_dict()) - set(plain.state_dict()) == {"given_mean", "given_std"}


def test_a_normalization_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"given: expected pnc.Normalization\(mean, std\), got float"):
        Preprocessed(nn.Identity(), (3, 8, 8), given=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="images: they have 1 channels, but given= normalizes 3"):
        Preprocessed(nn.Identity(), (3, 8, 8), given=pnc.Normalization(MEAN, STD))(images(1, 1, 8, 8))


# ------------------------------------------------------------------------------------------------ recorded
@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ((3, 8, 8), ["sub", "div"]),
        ((1, 8, 8), ["repeat", "sub", "div"]),
        ((3, 16, 8), ["interpolate", "sub", "div"]),
        ((1, 5, 5), ["interpolate", "repeat", "sub", "div"]),
    ],
)
def test_the_recording_holds_the_steps_that_are_needed(given: tuple[int, int, int], steps: list[str]) -> None:
    wrapped = Preprocessed(small((3, 8, 8)), (3, 8, 8), MEAN, STD)
    assert operations(record(wrapped, images(2, *given))) == steps


def test_nothing_is_recorded_where_nothing_is_to_be_done() -> None:
    wrapped = Preprocessed(small((3, 8, 8)), (3, 8, 8))
    assert operations(record(wrapped, images(2, 3, 8, 8))) == []
    assert sorted(set(wrapped.state_dict()) - {f"network.{n}" for n in wrapped.network.state_dict()}) == ["pipeline"]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("given", [(1, 8, 8), (3, 32, 32), (3, 64, 48), (1, 97, 50)])
def test_recording_and_cuts_are_exact(interpolation: Any, given: tuple[int, int, int]) -> None:
    wrapped = Preprocessed(
        small((3, 32, 32)), (3, 32, 32), MEAN, STD, interpolation=interpolation, blue_first=True
    ).eval()
    before = take_snapshot(wrapped)
    recording = record(wrapped, images(2, *given))
    assert not differences(wrapped, before)
    assert recording.input_shape == given
    assert find_head(recording).module == "network.classifier"
    for batch in (1, 5):
        x = images(batch, *given)
        with torch.no_grad():
            logits = wrapped(x)
            assert same_bits(recording.module(x.clone()), logits)
            for cut in {*cut_points(recording)[:6], *candidate_cuts(recording)}:
                (tap,) = [extract(recording, None, [cut])(x)] if cut.index else [x]
                assert same_bits(extract(recording, cut, [LOGITS])(tap), logits), cut.name


# ------------------------------------------------------------------------------------------------ cloned
COLOURED = (3, 16, 16)


def coloured(images: Tensor) -> Tensor:
    """Digits at twice their size, in three equal channels."""
    return F.interpolate(images, COLOURED[1:], mode="bilinear", antialias=True).repeat(1, 3, 1, 1)


def bare(classes: tuple[str, ...]) -> tuple[nn.Module, float, float]:
    """A trained network for normalised digits, with the mean and standard deviation of the normalisation."""
    module = copy.deepcopy(network(classes).module)
    normalize = module.get_submodule("normalize")
    mean, std = (normalize.get_buffer(name).item() for name in ("mean", "std"))
    normalize.get_buffer("mean").zero_()
    normalize.get_buffer("std").fill_(1)
    return module, mean, std


def wrapped(classes: tuple[str, ...], **changes: Any) -> Preprocessed:
    """A network for normalised coloured digits, with its preprocessing."""
    module, mean, std = bare(classes)
    mix = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(mix.weight, 1 / 3)
    whole = nn.Sequential(mix, nn.AvgPool2d(2), module).eval()
    return Preprocessed(whole, COLOURED, **{"mean": mean, "std": std, **changes})


@dataclass(frozen=True)
class Case:
    source: nn.Module
    target: nn.Module
    support: Support
    test: ImageSet


def case(name: str) -> Case:
    """Networks of different sizes, colours and normalisations, and images that suit one of them or neither."""
    grey, test = support(), held_out_images()
    colour = Support(coloured(grey.images), grey.labels, grey.names)
    coloured_test = ImageSet(coloured(test.images), test.labels, test.classes)
    plain = pair()
    return {
        "coloured source, grey images": Case(wrapped(NEW), plain.target.module, grey, test),
        "coloured target, grey images": Case(plain.source.module, wrapped(BASE), grey, test),
        "grey source, coloured images": Case(
            Preprocessed(plain.source.module, (1, 8, 8)), wrapped(BASE), colour, coloured_test
        ),
        "grey target, coloured images": Case(
            wrapped(NEW), Preprocessed(plain.target.module, (1, 8, 8)), colour, coloured_test
        ),
    }[name]


@cache
def made(name: str) -> tuple[Case, pnc.Clone]:
    """A case and its clone; its networks must not change."""
    nets = case(name)
    before = [take_snapshot(nets.source), take_snapshot(nets.target)]
    clone = pnc.clone(nets.source, nets.target, nets.support, source_classes=NEW, base_classes=BASE)
    assert not differences(nets.source, before[0])
    assert not differences(nets.target, before[1])
    return nets, clone


CASES = (
    "coloured source, grey images",
    "coloured target, grey images",
    "grey source, coloured images",
    "grey target, coloured images",
)


@pytest.mark.parametrize("name", CASES)
def test_networks_with_other_preprocessing_clone_into_each_other(name: str, tmp_path: Path) -> None:
    nets, clone = made(name)
    before = take_snapshot(nets.target)
    net = pnc.attach(nets.target, clone)
    with torch.no_grad():
        logits, own = net(nets.test.images), nets.target(nets.test.images)
    assert same_bits(logits[:, :5], own)
    found = measure_logits(logits, nets.test.labels, own)
    assert found.average_accuracy > 0.85
    assert found.base_drop < 0.15

    pnc.save(clone, tmp_path / "c.safetensors")
    again = pnc.attach(nets.target, pnc.load(tmp_path / "c.safetensors", source=nets.source))
    with torch.no_grad():
        assert same_bits(again(nets.test.images), logits)
        net.detach(clone.name)
        assert same_bits(net(nets.test.images), own)
    assert not differences(nets.target, before)


def test_a_clone_belongs_to_networks_with_their_preprocessing(tmp_path: Path) -> None:
    clone = made("coloured source, grey images")[1]
    pnc.save(clone, tmp_path / "c.safetensors")
    assert fingerprint(wrapped(NEW)) == clone.source
    assert pnc.load(tmp_path / "c.safetensors", source=wrapped(NEW)).source == clone.source
    for changes in ({"mean": 0.4}, {"interpolation": "nearest"}, {"blue_first": True}):
        with pytest.raises(MismatchError, match="was made from another source: the values of '(mean|pipeline)' differ"):
            pnc.load(tmp_path / "c.safetensors", source=wrapped(NEW, **changes))
    with pytest.raises(MismatchError, match="another architecture"):
        pnc.load(tmp_path / "c.safetensors", source=wrapped(NEW, mean=0.0))


def test_the_other_target_is_refused() -> None:
    clone = made("coloured target, grey images")[1]
    pnc.attach(wrapped(BASE), clone)
    with pytest.raises(MismatchError, match="pipeline"):
        pnc.attach(wrapped(BASE, interpolation="bicubic"), clone)


def test_a_network_without_its_normalisation_gets_it_back_bit_for_bit() -> None:
    module, mean, std = bare(NEW)
    digits = held_out_images().images
    with torch.no_grad():
        assert same_bits(Preprocessed(module, (1, 8, 8), mean, std)(digits), pair().source.module(digits))


def test_a_target_stays_as_it_is_and_the_source_alone_is_wrapped() -> None:
    """The target gets images from its own loader; the clone is as good as if both networks were wrapped."""
    target, mean, std = bare(BASE)
    source, source_mean, source_std = bare(NEW)
    theirs = pnc.Normalization(mean, std)
    given, test = support(), held_out_images()
    names = {"source_classes": NEW, "base_classes": BASE}
    both = pnc.clone(
        Preprocessed(source, (1, 8, 8), source_mean, source_std),
        Preprocessed(target, (1, 8, 8), mean, std),
        given,
        **names,
    )
    labels = [given.names[label] for label in given.labels]
    wrapped = Preprocessed(source, (1, 8, 8), source_mean, source_std, given=theirs)
    made = pnc.clone(wrapped, target, (theirs.apply(given.images), labels), **names)
    net = pnc.attach(target, made)
    with torch.no_grad():
        assert torch.equal(net(theirs.apply(test.images))[:, : len(BASE)], target(theirs.apply(test.images)))
        found = measure_logits(net(theirs.apply(test.images)), test.labels, target(theirs.apply(test.images)))
    assert found.average_accuracy > 0.9
    assert abs(made.recipe["score"] - both.recipe["score"]) < 0.03  # undoing rounds, so ties are broken differently
