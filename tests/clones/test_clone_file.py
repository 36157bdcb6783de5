import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pnc
from digits import NEW, held_out_images, network, pair, support
from pnc.bench.file_attacks import material
from pnc.clones.branch import Scalars
from pnc.foundation.errors import FileFormatError, InputError, MismatchError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_files import METADATA_KEY, read_tensors, write_tensors

MADE = {}


def made(**settings):
    key = tuple(sorted(settings.items()))
    if key not in MADE:
        nets = pair()
        n_base = settings.pop("n_base", 5)
        data = support(n_base=n_base)
        if "density" not in settings:
            settings["effort"] = "seconds"
        MADE[key] = pnc.clone(nets.source.module, nets.target.module, data, **nets.names(), **settings)
    return MADE[key]


def logits(clone):
    with torch.no_grad():
        return pnc.attach(pair().target.module, clone)(held_out_images().images[:50])


@pytest.mark.parametrize("settings", [{"max_macs": 0.9}, {"density": 0.5}, {"n_base": 0}], ids=str)
@pytest.mark.parametrize("kind", ["thin", "full"])
def test_a_loaded_clone_gives_the_same_bits_and_saves_to_the_same_file(tmp_path, settings, kind):
    clone = made(**settings)
    n_bytes = pnc.save(clone, tmp_path / "a", kind)
    assert n_bytes == (tmp_path / "a").stat().st_size
    loaded = pnc.load(tmp_path / "a", source=pair().source.module)
    assert torch.equal(logits(loaded), logits(clone))
    pnc.save(loaded, tmp_path / "b", kind)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert loaded.classes == NEW


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["thin", "full"])
@pytest.mark.parametrize("settings", [{"max_macs": 0.9}, {"density": 0.5}], ids=str)
def test_a_clone_of_a_composite_that_was_cast_can_be_saved_and_read(tmp_path, settings, kind, dtype):
    clone = made(**settings)
    net = pnc.attach(copy.deepcopy(pair().target.module), clone).to(dtype)
    pnc.save(net.clone(clone.name), tmp_path / "a", kind)
    loaded = pnc.load(tmp_path / "a", source=pair().source.module)
    # Half precision keeps 8 or 11 bits of each weight, and every layer rounds again.
    scale = logits(clone).abs().max()
    assert float((logits(loaded) - logits(clone)).abs().max() / scale) <= (1e-6 if dtype == torch.float64 else 0.1)


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="kind: expected thin or full, got 'small'"):
        pnc.save(made(), tmp_path / "a", "small")
    assert not any(tmp_path.iterdir())


def test_thin_files_are_small_and_full_ones_include_the_weights(tmp_path):
    clone = made()
    thin, full = (pnc.save(clone, tmp_path / kind, kind) for kind in ("thin", "full"))
    assert thin < 128 * 1024  # adapter and head alone
    body = sum(t.numel() * t.element_size() for t in clone.branch.stitched.body.state_dict().values())
    assert full >= thin + body
    assert pnc.inspect(tmp_path / "thin")["classes"] == list(NEW)
    assert pnc.inspect(tmp_path / "thin")["n_bytes"] == thin


def test_an_identity_adapter_takes_no_space_in_the_file(tmp_path):
    clone = made(n_base=0)  # the clone is the whole source
    assert clone.branch.stitched.adapter.is_identity
    pnc.save(clone, tmp_path / "f")
    assert not any(name.startswith("adapter.") for name in load_file(tmp_path / "f"))
    loaded = pnc.load(tmp_path / "f", source=pair().source.module)
    assert loaded.branch.stitched.adapter.is_identity
    edited(tmp_path / "f", lambda _, facts: facts["position"].update(rectify=True))
    with pytest.raises(FileFormatError, match="'adapter.weight' is missing"):
        pnc.inspect(tmp_path / "f")


def test_same_seed_twice_gives_the_same_file(tmp_path):
    nets = pair()
    for name in "ab":
        clone = pnc.clone(nets.source.module, nets.target.module, support(), density=0.5, seed=3, **nets.names())
        pnc.save(clone, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_full_file_needs_the_architecture_only(tmp_path):
    clone = made(density=0.5)
    pnc.save(clone, tmp_path / "full", "full")
    pnc.save(clone, tmp_path / "thin", "thin")
    other = copy.deepcopy(pair().source.module)
    for parameter in other.parameters():
        parameter.data.normal_()
    assert torch.equal(logits(pnc.load(tmp_path / "full", source=other)), logits(clone))
    with pytest.raises(MismatchError, match="another source: the values of .* differ"):
        pnc.load(tmp_path / "thin", source=other)
    for kind in ("full", "thin"):
        with pytest.raises(MismatchError, match="source"):
            pnc.load(tmp_path / kind, source=network(NEW, "zoo:cnn?width=0.5").module)


def test_loading_leaves_the_source_alone(tmp_path):
    pnc.save(made(density=0.5), tmp_path / "f")
    source = copy.deepcopy(pair().source.module)
    before = take_snapshot(source)
    clone = pnc.load(tmp_path / "f", source=source)
    for tensor in clone.branch.state_dict().values():
        tensor.zero_()
    assert differences(source, before) == []


def edited(path, change):
    tensors, facts = read_tensors(path)
    change(tensors, facts)
    write_tensors(path, tensors, facts)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, f: f.update(version=99), FileFormatError, "format version 99.*newer"),
        (lambda t, f: f.update(version="1"), FileFormatError, "version"),
        (lambda t, f: f.update(format="other"), FileFormatError, "not a clone file"),
        (lambda t, f: f.update(kind="thick"), FileFormatError, "kind"),
        (lambda t, f: f.pop("position"), FileFormatError, "damaged"),
        (lambda t, f: f["position"]["source"].pop("shape"), FileFormatError, "damaged"),
        (lambda t, f: f["position"]["source"].update(name="elsewhere"), MismatchError, "elsewhere"),
        (lambda t, f: f.update(head="other"), FileFormatError, "damaged"),
        (lambda t, f: f.update(source=None), FileFormatError, "damaged"),
        (lambda t, f: t.pop("head.own.weight"), FileFormatError, "damaged"),
        (lambda t, f: t.pop("adapter.weight"), FileFormatError, "'adapter.weight' is missing"),
        (lambda t, f: t.update({"head.own.bias": t["head.own.bias"][:-1]}), FileFormatError, "damaged"),
        (lambda t, f: t.update({"adapter.weight": t["adapter.weight"].double()}), FileFormatError, "damaged"),
        (
            lambda t, f: t.update({"head.own.weight": t["head.own.weight"][:, 1:]}),
            FileFormatError,
            "head does not fit .* fea",
        ),
        (
            lambda t, f: t.update({"head.own.weight": t["head.own.weight"][1:]}),
            FileFormatError,
            "has 4 rows; .* need 5",
        ),
        (
            lambda t, f: t["head.own.bias"].mul_(float("nan")),
            FileFormatError,
            "'head.own.bias' holds values that are not finite",
        ),
        (lambda t, f: t["adapter.weight"].mul_(float("inf")), FileFormatError, "'adapter.weight' holds values that"),
        (lambda t, f: t.update({"other": torch.zeros(1)}), FileFormatError, "a clone has no tensor 'other'"),
        (lambda t, f: t.update({"calibration.other": torch.zeros(1)}), FileFormatError, "a clone has no tensor"),
        (lambda t, f: t.update({"body.9.weight": torch.zeros(1)}), MismatchError, "has a tensor '9.weight'"),
        (lambda t, f: t.update(masks=torch.zeros(9, dtype=torch.uint8)), MismatchError, "other channel spaces"),
        (lambda t, f: t.update(masks=torch.zeros(9)), FileFormatError, r"'masks' is \(9,\) float32"),
        (lambda t, f: f["position"]["target"].update(shape=[4096, 4, 4]), FileFormatError, "metadata asks for"),
        (lambda t, f: f.update(base_classes=[*"01234", "more"]), FileFormatError, "rows"),
        (lambda t, f: f.update(extra=1), FileFormatError, "extra is unknown"),
    ],
)
def test_damaged_or_foreign_files_are_refused(tmp_path, change, error, words):
    pnc.save(made(max_macs=0.9), tmp_path / "f")  # only a part of the source, so that the adapter has weights
    edited(tmp_path / "f", change)
    with pytest.raises(error, match=words):
        pnc.load(tmp_path / "f", source=pair().source.module)


def test_a_file_without_a_digest_is_refused(tmp_path):
    pnc.save(made(), tmp_path / "f")
    tensors, facts = read_tensors(tmp_path / "f")
    save_file(tensors, tmp_path / "f", {METADATA_KEY: json.dumps(facts)})
    with pytest.raises(FileFormatError, match="has no digest"):
        pnc.inspect(tmp_path / "f")


def with_rivals():
    """A clone calibrated against others, with made-up values."""
    branch = copy.deepcopy(made().branch)
    rows = torch.arange(7.0 * branch.rivals.shape[1]).sin().reshape(7, -1).tolist()
    scalars = Scalars(0.75, (0.5,) * len(NEW), tuple(map(tuple, rows)))
    return dataclasses.replace(made(), branch=branch.rescaled(scalars))


@pytest.mark.parametrize("kind", ["thin", "full"])
def test_rivals_are_loaded_with_the_same_bits(tmp_path, kind):
    clone = with_rivals()
    assert not torch.equal(logits(clone), logits(made()))
    pnc.save(clone, tmp_path / "a", kind)
    assert "calibration.rivals" in load_file(tmp_path / "a")
    loaded = pnc.load(tmp_path / "a", source=pair().source.module)
    assert torch.equal(logits(loaded), logits(clone))
    pnc.save(loaded, tmp_path / "b", kind)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


RIVALS = "calibration.rivals"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({RIVALS: t[RIVALS][:5]}), "a matrix of more than 5 rows; it is .5, "),
        (lambda t: t.update({RIVALS: t[RIVALS][0]}), "a matrix of more than 5 rows"),
        (lambda t: t.update({RIVALS: t[RIVALS].double()}), "'calibration.rivals' is .* float64"),
        (lambda t: t.update({RIVALS: t[RIVALS][:, 1:]}), "rows of .* values; .* are needed"),
        (lambda t: t[RIVALS].mul_(float("inf")), "not finite"),
    ],
)
def test_damaged_rivals_are_refused(tmp_path, change, words):
    pnc.save(with_rivals(), tmp_path / "f")
    edited(tmp_path / "f", lambda tensors, _: change(tensors))
    with pytest.raises(FileFormatError, match=words):
        pnc.load(tmp_path / "f", source=pair().source.module)


@pytest.mark.parametrize("kind", ["thin", "full"])
def test_a_missing_tensor_of_the_part_is_not_silently_taken_from_the_source(tmp_path, kind):
    there = material()
    pnc.save(there.clone, tmp_path / "f", kind)
    name = next(name for name in load_file(tmp_path / "f") if name.endswith("running_mean"))
    edited(tmp_path / "f", lambda tensors, facts: tensors.pop(name))
    own = name.removeprefix("body.")
    words = f"lacks the tensor '{own}' of this source" if kind == "thin" else f"its part has a tensor '{own}'"
    with pytest.raises(MismatchError if kind == "thin" else FileFormatError, match=words):
        pnc.load(tmp_path / "f", source=there.source)


def test_a_clone_with_values_that_are_not_finite_is_not_saved(tmp_path):
    broken = copy.deepcopy(made())
    broken.branch.head.own.bias[0] = float("inf")
    with pytest.raises(InputError, match=r"head.own.bias holds values that are not finite"):
        pnc.save(broken, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_source_in_another_dtype_is_named(tmp_path):
    pnc.save(made(), tmp_path / "f")
    cast = copy.deepcopy(pair().source.module).bfloat16()
    words = "another architecture: .* is bfloat16, expected float32; .* allow_mismatch=True"
    with pytest.raises(MismatchError, match=words):
        pnc.load(tmp_path / "f", source=cast)


def test_allow_mismatch_accepts_a_fine_tuned_source_and_takes_over_its_fingerprint(tmp_path):
    pnc.save(made(density=0.5), tmp_path / "thin")
    pnc.save(made(density=0.5), tmp_path / "full", "full")
    tuned = copy.deepcopy(pair().source.module)
    for parameter in tuned.parameters():
        parameter.data.mul_(1.01)
    clone = pnc.load(tmp_path / "thin", source=tuned, allow_mismatch=True)
    assert not torch.equal(logits(clone), logits(made(density=0.5)))
    assert clone.source == fingerprint(tuned)
    pnc.save(clone, tmp_path / "again")
    assert torch.equal(logits(pnc.load(tmp_path / "again", source=tuned)), logits(clone))
    full = pnc.load(tmp_path / "full", source=tuned, allow_mismatch=True)
    assert torch.equal(logits(full), logits(made(density=0.5))), "a full file has all of its weights"
    assert full.source == fingerprint(pair().source.module)


def test_allow_mismatch_still_needs_shapes_that_fit(tmp_path):
    narrow = network(NEW, "zoo:cnn?width=0.5").module
    for kind in ("full", "thin"):
        pnc.save(made(density=0.5), tmp_path / kind, kind)
        with pytest.raises(MismatchError, match="which this source does not have|other channel spaces"):
            pnc.load(tmp_path / kind, source=narrow, allow_mismatch=True)


def test_files_of_others_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights", {METADATA_KEY: json.dumps({"format": "pnc-model"})})
    with pytest.raises(FileFormatError, match="not a clone file"):
        pnc.inspect(tmp_path / "weights")
    pnc.save(made(max_macs=0.9), tmp_path / "f")
    assert set(load_file(tmp_path / "f")) >= {"adapter.weight", "head.own.weight"}, "any safetensors reader can open it"


def test_an_unwritable_path_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        pnc.save(made(), tmp_path / "no" / "f")
