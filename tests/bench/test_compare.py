import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pnc
from digits import BASE, NEW, network
from pnc.bench import compare, compare_report
from pnc.bench.compare import KEYS, SHIFTS, curve
from pnc.bench.comparison_methods import BOUNDED, HALF, METHODS, choose_methods, class_groups, trained_network
from pnc.bench.result_files import Cells
from pnc.bench.rivals.rival import Budget
from pnc.cli import compare_commands
from pnc.cli.bench_commands import bench
from pnc.data.image_set import ImageSet, class_subset
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.models.model_specs import save_model
from pnc.models.pretraining import Recipe

METHODS_HERE = "clone,direct ensemble,nearest mean,fine-tuning with replay (head)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare_commands, "Budget", partial(Budget, 1, 2, 5, 1, 20))
    for name, classes in (("t", BASE), ("s", NEW)):
        save_model(network(classes), tmp_path / f"{name}.safetensors", {})
    return tmp_path


def run(folder: Path, words: str = "", methods: str = METHODS_HERE, again: str = "") -> Any:
    networks = f"--source {folder / 's.safetensors'} --target {folder / 't.safetensors'}".split()
    usual = ["--data", "digits", "--no-flip", "--seeds", "1", "--n-test", "10", "--out", str(folder / "compare")]
    command = ["compare", *networks, *usual, "--methods", methods, *words.split()]
    command += ["--again", again] if again else []
    return CliRunner().invoke(bench, command, catch_exceptions=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return Cells(folder / "compare" / "digits.jsonl", {}, KEYS).rows


def test_cells_hold_all_that_they_depend_on_and_are_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(folder, "--support 20/5")
    assert found.exit_code == 0 and "| direct ensemble |" in found.stdout
    rows = {row["method"]: row for row in rows_of(folder)}
    assert set(rows) == set(METHODS_HERE.split(","))
    for row in rows.values():
        assert {*KEYS, "budget", "environment", "commit", "chosen", "space", "trials", "seconds", "cpu_seconds"} <= set(
            row
        )
        assert row["support"] == "20/5" and row["classes"] == "5, 6, 7, 8, 9" and row["verified"]["target_unchanged"]
        assert [point[0] for point in row["curve"]] == list(SHIFTS)
        assert row["curve"][len(SHIFTS) // 2][1:3] == pytest.approx(
            [row["base_accuracy"], row["new_accuracy"]], abs=1e-5
        )
    assert rows["clone"]["verified"] == dict.fromkeys(("target_unchanged", "base_logits_equal", "removed_equal"), True)
    assert rows["direct ensemble"]["added_macs_share"] == pytest.approx(1)
    assert 0 < rows["clone"]["added_macs_share"] < 1.1 and rows["clone"]["bytes"] > 10_000
    assert rows["direct ensemble"]["bytes"] == 0 < rows["fine-tuning with replay (head)"]["bytes"] < 10_000

    monkeypatch.setattr(compare.Runner, "measure", None)
    assert run(folder, "--support 20/5").exit_code == 0, "nothing is made again"
    monkeypatch.undo()


def test_a_stopped_run_goes_on_and_methods_can_be_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, made = compare.Runner.measure, []

    def stops(self: Any, rival: Any, classes: Any, seed: int) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(rival.name)
        return measure(self, rival, classes, seed)

    methods = "direct ensemble,ensemble with temperatures,nearest mean"
    monkeypatch.setattr(compare.Runner, "measure", stops)
    run(folder, "--support 20/5", methods)
    assert [row["method"] for row in rows_of(folder)] == made == methods.split(",")[:2]
    monkeypatch.setattr(compare.Runner, "measure", measure)
    assert run(folder, "--support 20/5", methods).exit_code == 0
    assert [row["method"] for row in rows_of(folder)] == methods.split(",")
    first = rows_of(folder)[0]
    monkeypatch.setattr(compare, "commit", lambda: "another")
    assert run(folder, "--support 20/5", methods, again="direct ensemble").exit_code == 0
    rows = rows_of(folder)
    assert len(rows) == 3 and {row["method"] for row in rows} == set(methods.split(","))
    renewed = next(row for row in rows if row["method"] == "direct ensemble")
    assert renewed["average_accuracy"] == first["average_accuracy"] and renewed["seconds"] != first["seconds"]
    monkeypatch.setattr(compare.Runner, "measure", None)
    assert run(folder, "--support 20/5", methods, again="direct ensemble").exit_code == 0, "this commit made it"
    with pytest.raises(pnc.InputError, match="again: clone is not a method of this run"):
        run(folder, "--support 20/5", methods, again="clone")


def test_a_rival_that_cannot_use_the_support_says_so_in_its_cell(folder: Path) -> None:
    assert run(folder, "--support 5/0", "direct ensemble,nearest mean").exit_code == 0
    refused = next(row for row in rows_of(folder) if row["method"] == "nearest mean")
    assert "needs samples of the base classes" in refused["not_applicable"]
    assert refused["verified"] == {"target_unchanged": True}
    assert run(folder, "--support 20/5", METHODS_HERE).exit_code == 0

    found = CliRunner().invoke(bench, ["compare-report", str(folder / "compare")], catch_exceptions=False)
    assert found.exit_code == 0
    facts, text = json.loads((folder / "compare.json").read_text()), (folder / "compare.md").read_text()
    assert len(facts["rows"]) == 1 + 4
    assert "nearest mean: the nearest mean of the target's features needs samples of the base classes" in text
    claims = {claim["claim"]: claim for claim in facts["claims"]}
    assert claims["target unchanged in each of 6 cells"]["holds"]
    assert claims["removal exact in each of 1 cells"]["holds"]
    pictures = sorted((folder / "compare").glob("*.png"))
    assert len(pictures) == 4
    assert all(f"](compare/{path.name})" in text for path in pictures)


def test_single_classes_are_cells_of_their_own_and_are_averaged(folder: Path) -> None:
    assert run(folder, "--support 5/5 --classes single", "direct ensemble").exit_code == 0
    rows = rows_of(folder)
    assert [row["classes"] for row in rows] == list(NEW)
    (regime,) = compare_report.regimes(rows)
    expected = sum(row["new_accuracy"] for row in rows) / 5
    assert regime.by_seed("direct ensemble", "new_accuracy") == {0: pytest.approx(expected)}


def test_without_rows_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(pnc.InputError, match="has no rows of `pnc bench compare`"):
        compare_report.read_rows(tmp_path)


def row(method: str, average: float, locality: float, **facts: Any) -> dict[str, Any]:
    usual = dict.fromkeys(KEYS) | {"data": "CIFAR-10", "target": "net 1", "source": "net 2", "support": "100/20"}
    figures = dict.fromkeys(compare_report.FIGURES, 0.5) | {"average_accuracy": average, "locality_kl": locality}
    rest = {"method": method, "seed": 0, "group": "all", "classes": "a", "verified": {"target_unchanged": True}}
    return usual | figures | rest | {"curve": [[0.0, 0.5, 0.5, 0.1]], "space": {}, "chosen": {}} | facts


def claims_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        claim.claim.removeprefix("CIFAR-10, 100/20, all, net from net: "): claim
        for claim in compare_report.claims(rows)
    }


def test_claims_are_about_the_best_tuning_rival() -> None:
    clone = row("clone", 0.75, 0.2, conditional_kl=0.0, added_macs_share=0.8)
    others = [
        row("LwF", 0.60, 0.5),
        row("EWC", 0.64, 0.3),
        row("linear probe", 0.70, 0.1),
        row("direct ensemble", 0.72, 1.0),
    ]
    found = claims_of(clone, *others)
    above = found["average accuracy above EWC, the best tuning rival"]
    assert above.holds and above.value == pytest.approx(0.11) and above.must == ">= 0.1"
    share = found["locality KL as a share of the best tuning rival's"]
    assert not share.holds and share.value == pytest.approx(2 / 3)
    assert found["average accuracy above the direct ensemble"].must == ">= 0"
    assert found["conditional KL"].holds
    assert found["target unchanged in each of 5 cells"].value is True


def test_the_clone_may_be_half_a_point_below_the_best_stacked_features() -> None:
    stacked = [row(name, average, 0.4) for name, average in zip(compare_report.STACKED, (0.753, 0.757), strict=True)]
    found = claims_of(row("clone", 0.75, 0.2), *stacked)
    above = found[f"average accuracy above {compare_report.STACKED[1]}"]
    assert above.must == ">= -0.005" and above.value == pytest.approx(-0.007) and not above.holds
    assert claims_of(row("clone", 0.75, 0.2), stacked[0])[f"average accuracy above {compare_report.STACKED[0]}"].holds


def test_the_clone_of_half_the_source_may_be_a_point_below_them() -> None:
    stacked, words = row(compare_report.STACKED[0], 0.755, 0.4), f"average accuracy of the {HALF} above"
    found = claims_of(row("clone", 0.75, 0.2), row(HALF, 0.747, 0.2), stacked)
    assert found[f"{words} {compare_report.STACKED[0]}"].holds
    found = claims_of(row("clone", 0.75, 0.2), row(HALF, 0.74, 0.2), stacked)
    assert not found[f"{words} {compare_report.STACKED[0]}"].holds


def test_only_seeds_that_both_have_are_compared() -> None:
    rows = [row("clone", 0.7, 0.1), row("clone", 0.9, 0.1, seed=1), row("LwF", 0.6, 0.5, seed=1)]
    assert claims_of(*rows)["average accuracy above LwF, the best tuning rival"].value == pytest.approx(0.3)
    assert "average accuracy above LwF, the best tuning rival" not in claims_of(rows[0], rows[2])


def test_easy_images_ask_for_less_and_single_classes_for_other_things() -> None:
    def margin(average: float, **facts: Any) -> float:
        (regime,) = compare_report.regimes([row("LwF", average, 0.1, **facts)])
        return compare_report._margin(regime, average)

    assert margin(0.6) == 0.1
    assert margin(0.6, support="500/100") == 0
    assert margin(0.9, data="MNIST") == 0.05
    assert margin(0.95, data="MNIST") == 0
    bounded = row(BOUNDED, 0.9, 0.1, group="single", base_drop=0.03, new_accuracy=0.85)
    found = claims_of(row("clone", 0.9, 0.1, group="single"), bounded)
    assert not found[f"CIFAR-10, 100/20, single, net from net: base accuracy lost, {BOUNDED}"].holds
    assert found[f"CIFAR-10, 100/20, single, net from net: accuracy on the new class, {BOUNDED}"].holds


def test_of_two_architectures_probes_of_either_network_are_beaten_too() -> None:
    pair = {"source": "other 2"}
    rows = (row("clone", 0.75, 0.1, **pair), row("LDA on source features", 0.73, 0.1, **pair))
    found = claims_of(*rows, row("linear probe", 0.6, 0.1, **pair), row("direct ensemble", 0.71, 0.1, **pair))
    title = "CIFAR-10, 100/20, all, net from other"
    probe = found[f"{title}: average accuracy above LDA on source features, the best probe of one network"]
    assert not probe.holds and probe.value == pytest.approx(0.02)
    assert found[f"{title}: average accuracy above the direct ensemble"].must == ">= 0.03"


def test_without_base_samples_the_clone_is_measured_against_itself_with_them() -> None:
    found = claims_of(row("clone", 0.75, 0.1), row("clone", 0.71, 0.1, support="100/0"))
    lost = found["CIFAR-10, 100/0, all, net from net: average accuracy below that at 100/20"]
    assert lost.holds and lost.value == pytest.approx(0.04)


def test_a_shift_trades_leak_against_new_accuracy() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    points = curve(logits, torch.arange(200) % 5, 3)
    _, base, new, leak = (list(values) for values in zip(*points, strict=True))
    assert base == sorted(base, reverse=True) and new == sorted(new) and leak == sorted(leak)
    assert base[-1] == new[0] == 0 or (base[-1] < 0.02 and new[0] < 0.02)


def test_groups_of_classes() -> None:
    new = tuple("abcdefghij")
    assert class_groups("all", new, 0) == [new]
    assert class_groups("single", new, 0) == [(name,) for name in new]
    assert class_groups("fifth", new, 0) == [("a", "b")] and class_groups("fifth", new, 4) == [("i", "j")]
    assert class_groups("fifth", new[:4], 5) == [("b",)]
    assert class_groups("d,a", new, 0) == [("d", "a")]


def test_methods_by_name() -> None:
    assert "joint training on everything" not in choose_methods(None) and "clone" in choose_methods(None)
    assert choose_methods("rivals") == [n for n in choose_methods(None) if n not in ("clone", HALF, BOUNDED)]
    assert choose_methods("clone,LwF,clone") == ["clone", "LwF"]
    with pytest.raises(pnc.InputError, match="no method 'LWF' .did you mean 'LwF'"):
        choose_methods("LWF")
    with pytest.raises(pnc.InputError, match="give at least one"):
        choose_methods(",")
    assert len(METHODS) == 27 and all(rival.name == name for name, rival in METHODS.items())


def test_networks_are_trained_once(tmp_path: Path) -> None:
    images, recipe = (
        tuple(class_subset(load_data("digits", split), tuple("0123")) for split in ("train", "test")),
        Recipe(epochs=1),
    )
    seen: list[Any] = []
    made = [
        trained_network("zoo:cnn?width=0.1", ["0", "1"], images, recipe, tmp_path / "runs", seen.append)
        for _ in range(2)
    ]
    assert len(seen) == 1 and made[0].classes == ("0", "1")
    trained_network("zoo:cnn?width=0.1", ["2", "3"], images, recipe, tmp_path / "runs", seen.append)
    assert len(seen) == 2 and len(list((tmp_path / "runs").iterdir())) == 2


def test_networks_of_the_zoo_are_trained_on_their_halves(folder: Path) -> None:
    networks = ["--source", "zoo:cnn?width=0.1", "--target", "zoo:cnn?width=0.1", "--epochs", "1"]
    places = ["--runs", str(folder / "runs"), "--out", str(folder / "compare")]
    usual = ["--data", "digits", "--support", "5/5", "--no-flip", "--seeds", "1", "--n-test", "5", "--methods"]
    command = ["compare", *networks, *places, *usual, "direct ensemble"]
    assert CliRunner().invoke(bench, command, catch_exceptions=False).exit_code == 0
    (row,) = rows_of(folder)
    assert row["classes"] == "5, 6, 7, 8, 9" and row["target"] != row["source"]
    assert len(list((folder / "runs").glob("*.safetensors"))) == 2


def test_supports_can_be_drawn_from_images_that_trained_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[ImageSet]] = {"trained": [], "drawn": []}

    def trained(spec: str, classes: Any, images: Any, *others: Any) -> Any:
        seen["trained"].append(images[0])
        return network(tuple(classes))

    def measure(setting: Any, *others: Any) -> Any:
        seen["drawn"].append(setting.train)
        return lambda cells, progress: []

    monkeypatch.setattr(compare_commands, "trained_network", trained)
    monkeypatch.setattr(compare_commands.compare, "measure", measure)
    networks = ["--source", "zoo:cnn", "--target", "zoo:cnn", "--unseen", "30"]
    command = ["compare", *networks, "--data", "digits", "--no-flip", "--out", str(folder / "compare")]
    assert CliRunner().invoke(bench, command, catch_exceptions=False).exit_code == 0
    (drawn,), (rest, same) = seen["drawn"], seen["trained"]
    assert set(drawn.counts().values()) == {30} and len(rest) + len(drawn) == len(load_data("digits", "train"))
    assert torch.equal(rest.images, same.images)
    last = load_data("digits", "train")
    (places,) = (last.labels == 3).nonzero(as_tuple=True)
    assert torch.equal(drawn.images[drawn.labels == 3], last.images[places[-30:]])
    assert torch.equal(rest.images[rest.labels == 3], last.images[places[:-30]])
    with pytest.raises(InputError, match="--unseen: which images trained a file .* is not known"):
        run(folder, "--unseen 30")
