"""Common files of weights: read if complete, else refused with what they are."""

import argparse
import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pnc.foundation.errors import FileFormatError, InputError, MismatchError, PNCError
from pnc.models.model_specs import load_model
from pnc.models.weight_files import check_fit, load_tensors, read_weights


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.b(self.a(images)).mean((2, 3)))


class Inside(nn.Module):
    """A network whose only child has the name of the child in a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = plain()


class Masked(nn.Module):
    """A network with a buffer that is infinite on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def read_into(network: nn.Module, path: Path) -> nn.Module:
    load_tensors(network, read_weights(path)[0])
    return network


# --------------------------------------------------------------------------------------------------- wrappers
PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_orig_mod._orig_mod.module.",
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_in_any_order(tmp_path: Path, prefix: str, suffix: str) -> None:
    network, path = plain(), tmp_path / f"a{suffix}"
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(read_into(plain(), path), network)


def test_wrappers_themselves_and_parts_in_them(tmp_path: Path) -> None:
    network = plain()
    compiled_part = {f"0._orig_mod.{n}" if n.startswith("x") else n: t for n, t in network.state_dict().items()}
    compiled_part = {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in compiled_part.items()}
    for state in (
        nn.DataParallel(network).state_dict(),
        torch.optim.swa_utils.AveragedModel(network).state_dict(),
        compiled_part,
    ):
        torch.save(state, tmp_path / "a.pth")
        assert same(read_into(plain(), tmp_path / "a.pth"), network)
        assert same(read_into(nn.DataParallel(plain()), tmp_path / "a.pth"), nn.DataParallel(network))


def test_a_network_with_a_child_named_like_a_wrapper(tmp_path: Path) -> None:
    network = Inside()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert same(read_into(Inside(), tmp_path / "a.pth"), network)


# --------------------------------------------------------------------------------------------------- ties
def test_a_tensor_of_several_names_need_be_there_once(tmp_path: Path) -> None:
    network, path = Tied(), tmp_path / "a.safetensors"
    safetensors.torch.save_model(network, str(path))
    assert same(read_into(Tied(), path), network)
    state = network.state_dict()
    for missing in ("a.weight", "b.weight"):
        torch.save({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "a.pth")
        assert same(read_into(Tied(), tmp_path / "a.pth"), network)
    untied = Tied()
    untied.b.weight = nn.Parameter(torch.zeros(3, 3, 3, 3))
    read_into(untied, path)
    assert torch.equal(untied.b.weight, network.a.weight), "the file says that they are the same"


def test_values_that_differ_cannot_be_one_tensor() -> None:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["b.weight"] += 1
    with pytest.raises(MismatchError, match="a.weight, b.weight are one tensor in the network, but differ in the file"):
        load_tensors(Tied(), state)


# --------------------------------------------------------------------------------------------------- no weights
def write_gzip(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        torch.save(plain().state_dict(), file)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a git-lfs pointer .* `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page; download the file itself"),
        (b"\n  <html lang='en'>", "a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
        (b'{"error": "not found"}', "JSON text"),
        (gzip.compress(b"x" * 100), "a compressed file; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        (b"GGUF" + bytes(100), "a GGUF file"),
    ],
    ids=["lfs", "html", "html5", "xml", "json", "gz", "hdf5", "gguf"],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=f"weights: .* is {words}") as caught:
        read_weights(path)
    assert str(caught.value).isprintable()


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("[][1]",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, path), "contains argparse.Namespace"),
        (lambda path: torch.save({"model": {}, "loss": np.float64(1)}, path), "it also contains numpy"),
        (lambda path: torch.save(plain(), path), "it also contains torch.nn"),
        (lambda path: torch.save(Payload(), path), "it also contains (builtins.)?eval"),
        (lambda path: path.write_bytes(pickle.dumps({"a": np.zeros(3)})), "is not a checkpoint of only tensors"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "it is damaged"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"\x1b[1mred\x07" * 20), "it is damaged"),
        (lambda path: torch.jit.trace(plain().eval(), torch.rand(1, 3, 8, 8)).save(path), "TorchScript|damaged"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_checkpoints_that_are_refused_advise_nothing_dangerous(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "a.pth"
    make(path)
    with pytest.raises(FileFormatError, match=words) as caught:
        read_weights(path)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400
    assert "weights_only" not in text and "allowlist" not in text and "safe_globals" not in text


def test_suffixes_that_belong_to_the_other_kind(tmp_path: Path) -> None:
    network = plain()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "a.pth")
    assert same(read_into(plain(), tmp_path / "a.pth"), network)
    torch.save(network.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(FileFormatError, match="is a file of torch.save, not of safetensors; rename it to .pt"):
        read_weights(tmp_path / "a.safetensors")


def test_headers_of_any_length_are_not_taken_for_text(tmp_path: Path) -> None:
    for length in range(100):  # of the header; the lowest byte of its length may equal a bracket
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"x" * (length + 1): torch.zeros(1)}, path)
        assert len(read_weights(path)[0]) == 1


@pytest.mark.parametrize("path", ["a" * 5000 + ".safetensors", "a\0.pth", "missing.pth"])
def test_paths_are_checked(path: str) -> None:
    with pytest.raises(InputError, match="weights: "):
        load_model("zoo:cnn", path, ["a"], (1, 8, 8))


def test_any_damage_of_a_checkpoint_is_one_error(tmp_path: Path) -> None:
    torch.save(plain().state_dict(), tmp_path / "a.pth")
    whole, generator = (tmp_path / "a.pth").read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for place in generator.integers(0, len(whole), 6):
            broken[place] = generator.integers(0, 256)
        (tmp_path / "b.pth").write_bytes(broken)
        try:
            read_into(plain(), tmp_path / "b.pth")
        except PNCError as error:
            assert str(error).startswith("weights: ")


# --------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "1.running_mean", "4.bias"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.inf, "contain infinity, which float16 makes"),
        (-torch.inf, "contain infinity"),
        (torch.nan, "contain NaN"),
    ],
)
def test_values_that_are_not_finite_are_refused(name: str, value: float, words: str) -> None:
    network = plain()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for dtype in (torch.float32, torch.float16):
        state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in before.items()}
        state[name] = state[name].clone()
        state[name].flatten()[0] = value
        with pytest.raises(InputError, match=f"weights: {name} {words}"):
            load_tensors(network, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_masks_may_hold_infinity() -> None:
    network = Masked()
    load_tensors(network, Masked().state_dict())
    state = Masked().state_dict()
    state["mask"] = torch.tensor([torch.nan, 0])
    with pytest.raises(InputError, match="mask contain NaN"):
        load_tensors(network, state)


def test_whole_numbers_are_no_weights() -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in plain().state_dict().items()}
    with pytest.raises(MismatchError, match=r"of another kind: 0.weight \(int8, the network's is float32\)"):
        load_tensors(plain(), state)
    half = {name: tensor.half() for name, tensor in plain().state_dict().items()}
    load_tensors(plain(), half)


def test_shapes_alone_can_be_compared() -> None:
    with torch.device("meta"):
        other = plain()
    check_fit(other, plain().state_dict())
    check_fit(plain(), other.state_dict())
    with pytest.raises(MismatchError, match="unexpected: x"):
        check_fit(other, {**plain().state_dict(), "x": torch.zeros(1)})
