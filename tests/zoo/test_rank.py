"""Ranking on digits: the best source comes first, and however the work is done, the ranking is the same."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pnc
from digits import BASE, NEW, held_out_images, network, support
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.positions import scan
from pnc.method.task import prepare_task
from pnc.models.model_specs import build_model
from pnc.zoo import rank as ranking_module
from pnc.zoo.processes import ProcessWorker
from pnc.zoo.question import ask
from pnc.zoo.quick_look import Look, Sources
from pnc.zoo.ranking import predicted
from pnc.zoo.units import WorkerLost

CLASSES = ("5", "6", "7")


def asked() -> dict[str, Any]:
    return {"classes": CLASSES, "base_classes": BASE}


def images() -> pnc.Support:
    return support(classes=CLASSES)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> pnc.Zoo:
    """One that knows 5-9, the same with all names changed, one that knows 0-4 only, untrained ones, and a small one."""
    made = pnc.Zoo(tmp_path_factory.mktemp("zoo"))
    knows = network(NEW)
    made.add("knows", knows)
    made.add("renamed", replace(knows, classes=("five", "six", "seven", "eight", "nine")))
    made.add("others", network(BASE))
    for seed in range(3):
        made.add(f"untrained{seed}", build_model("zoo:cnn?width=0.25", NEW, (1, 8, 8), seed))
    made.add("two", build_model("zoo:cnn?width=0.25", ("a", "b"), (1, 8, 8)))
    return made


@pytest.fixture(scope="module")
def found(zoo: pnc.Zoo) -> pnc.Ranking:
    return pnc.rank(zoo, network(BASE).module, images(), workers=1, **asked())


def same(one: pnc.Ranking, other: pnc.Ranking) -> bool:
    return {**one.facts(), "seconds": 0} == {**other.facts(), "seconds": 0}


def test_the_best_source_comes_first_and_its_clone_is_as_good_as_predicted(zoo: pnc.Zoo, found: pnc.Ranking) -> None:
    assert {found.best.name, found.ranked[1].name} == {"knows", "renamed"}
    assert [one.is_scanned for one in found.ranked] == [True] + [False] * 5
    rest = [one.predicted for one in found.ranked[1:]]
    assert rest == sorted(rest, reverse=True)
    target, source = network(BASE).module, zoo.load(found.best.name).module
    made = pnc.clone(source, target, images(), source_classes=found.best.source_classes, effort="seconds", **asked())
    real = pnc.evaluate(pnc.attach(target, made), held_out_images(CLASSES)).average_accuracy
    assert real == pytest.approx(found.best.predicted, abs=0.06)


def test_sources_without_the_names_rank_by_what_they_know(zoo: pnc.Zoo, found: pnc.Ranking) -> None:
    by_name = {one.name: one for one in found.ranked}
    assert by_name["knows"].look.named == "all" and by_name["renamed"].look.named == "none"
    assert by_name["renamed"].source_classes[:3] == CLASSES  # the very outputs that know them
    assert by_name["renamed"].source_classes[3:] == ("eight", "nine")
    assert by_name["renamed"].predicted == pytest.approx(by_name["knows"].predicted, abs=0.05)
    names = {"5": "five", "6": ["sechs", "six"], "7": "seven"}
    mapped = pnc.rank(zoo, network(BASE).module, images(), names=names, finalists=0, workers=1, **asked())
    assert {one.name: one.look.named for one in mapped.ranked}["renamed"] == "all"
    assert not any(one.is_scanned for one in mapped.ranked)


def test_a_source_with_too_few_outputs_is_left_out_with_the_reason(found: pnc.Ranking) -> None:
    assert found.left_out == {"two": "source: it has 2 outputs, too few for 3 classes of which it names 0"}
    assert "two: left out, source: it has 2 outputs" in str(found)


def test_a_quick_look_is_the_scan_of_the_whole_source(zoo: pnc.Zoo) -> None:
    target, source = network(BASE).module, zoo.load("knows").module
    given = {"flip": False, "seed": 0, "max_images": 2000, "memory": 2**30}
    question, _ = ask(target, images(), CLASSES, BASE, {}, **given)
    look = Sources(zoo, question).look_at("knows")
    task = prepare_task(source, target, images(), source_classes=NEW, **asked())
    whole = next(one for one in scan(task).positions if one.is_exact and one.n_macs == look.n_macs)
    assert look.accuracy == pytest.approx(whole.score, abs=1e-9)
    assert look.log_loss == pytest.approx(whole.log_loss, abs=1e-4)  # batches of another size
    assert (look.n_macs, look.n_params, look.n_images) == (whole.n_macs, whole.n_params, whole.n_images)


def test_a_source_looks_the_same_after_others_of_its_architecture(zoo: pnc.Zoo) -> None:
    given = {"flip": False, "seed": 0, "max_images": 2000, "memory": 2**30}
    question, _ = ask(network(BASE).module, images(), CLASSES, BASE, {}, **given)
    one = Sources(zoo, question)
    for name in ("untrained0", "untrained1", "knows", "others", "untrained0", "knows"):
        assert one.look_at(name) == Sources(zoo, question).look_at(name)
    zoo.weights("copy").write_bytes(zoo.weights("untrained1").read_bytes())
    zoo.weights("untrained1").write_bytes(zoo.weights("untrained2").read_bytes())
    with pytest.raises(pnc.MismatchError, match="the weights of untrained1 have fingerprint"):
        one.look_at("untrained1")
    zoo.weights("copy").replace(zoo.weights("untrained1"))
    assert one.look_at("untrained1") == Sources(zoo, question).look_at("untrained1")


def test_processes_give_the_same_ranking(zoo: pnc.Zoo, found: pnc.Ranking) -> None:
    assert same(found, pnc.rank(zoo, network(BASE).module, images(), workers=2, **asked()))


class Deadly(ProcessWorker):
    """Its process is killed before it can answer for one source, once."""

    killed: list[int] = []

    def look(self, unit):
        if unit[0] == "others" and not self.killed:
            self.killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return super().look(unit)


def test_a_killed_process_loses_nothing(zoo: pnc.Zoo, found: pnc.Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_module, "ProcessWorker", Deadly)
    assert same(found, pnc.rank(zoo, network(BASE).module, images(), workers=2, **asked()))
    assert len(Deadly.killed) == 1


def test_a_stopped_ranking_continues_and_new_sources_only_are_looked_at(
    zoo: pnc.Zoo, found: pnc.Ranking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, path = network(BASE).module, tmp_path / "looks.jsonl"

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pnc.rank(zoo, target, images(), workers=1, resume=path, progress=stop, **asked())
    path.write_bytes(path.read_bytes() + b'{"key": "half a li')
    looked: list[str] = []
    look = ranking_module.Looker.look
    monkeypatch.setattr(ranking_module.Looker, "look", lambda self, unit: (looked.append(unit[0]), look(self, unit))[1])
    assert same(found, pnc.rank(zoo, target, images(), workers=1, resume=path, **asked()))
    assert len(looked) == len(zoo) - 3
    looked.clear()
    assert same(found, pnc.rank(zoo, target, images(), workers=1, resume=path, **asked()))
    assert not looked
    with pytest.raises(pnc.InputError, match="resume: .* is of another target, support, request or version"):
        pnc.rank(zoo, target, images(), workers=1, resume=path, **{**asked(), "classes": CLASSES[::-1]})
    path.write_text("other\n")
    with pytest.raises(pnc.FileFormatError, match="resume: .* holds no looks at a zoo"):
        pnc.rank(zoo, target, images(), workers=1, resume=path, **asked())


def test_many_images_are_looked_at_in_rounds(zoo: pnc.Zoo, found: pnc.Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_module, "FIRST_IMAGES", 40)
    rounds = pnc.rank(zoo, network(BASE).module, images(), workers=1, finalists=1, **asked())
    assert sorted(one.look.n_images for one in rounds.ranked) == [42] * 3 + [85] * 3
    assert rounds.best.name in ("knows", "renamed") and rounds.best.is_scanned


def test_sources_for_other_images_and_supports_without_base_images_work(zoo: pnc.Zoo, tmp_path: Path) -> None:
    mixed = pnc.Zoo(tmp_path)
    mixed.add("colour", build_model("zoo:cnn?width=0.25", ("a", "b", "c"), (3, 16, 16)))
    mixed.add("knows", network(NEW))
    new_only = support(n_base=0, classes=CLASSES)
    ranking = pnc.rank(mixed, network(BASE).module, new_only, workers=1, finalists=1, **asked())
    assert [one.name for one in ranking.ranked] == ["knows", "colour"]
    assert ranking.best.predicted > 0.9


def test_nothing_is_changed(zoo: pnc.Zoo) -> None:
    target = network(BASE).module
    before, files = take_snapshot(target), sorted(zoo.folder.iterdir())
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    pnc.rank(zoo, target, images(), workers=1, finalists=1, **asked())
    assert not differences(target, before) and sorted(zoo.folder.iterdir()) == files
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads


def test_facts_are_json(found: pnc.Ranking) -> None:
    facts = json.loads(json.dumps(found.facts()))
    assert [row["name"] for row in facts["ranked"]] == [one.name for one in found.ranked]
    assert facts["ranked"][0]["predicted"] == found.best.predicted and facts["target_macs"] > 0


def test_damaged_entries_are_left_out_and_an_empty_zoo_has_no_best(tmp_path: Path) -> None:
    empty = pnc.Zoo(tmp_path)
    ranking = pnc.rank(empty, network(BASE).module, images(), **asked())
    with pytest.raises(pnc.InputError, match=r"zoo: no source can be used for 5, 6, 7 \(it is empty\)"):
        _ = ranking.best
    (tmp_path / "bad.json").write_text("{}")
    ranking = pnc.rank(empty, network(BASE).module, images(), **asked())
    with pytest.raises(pnc.InputError, match=r"no source can be used .* \(bad: zoo: .*bad.json is no entry"):
        _ = ranking.best


def with_probabilities(look: Look, accuracy: float, base: list[float], new: list[float]) -> Look:
    return replace(look, accuracy=accuracy, base_probabilities=tuple(base), new_probabilities=tuple(new))


def test_with_few_sources_predictions_are_held_out_accuracies(found: pnc.Ranking) -> None:
    looks = [one.look for one in found.ranked]
    assert predicted(looks[:3]) == [one.accuracy for one in looks[:3]]
    assert predicted([looks[0]] * 5) == [pytest.approx(looks[0].accuracy)] * 5


def test_predictions_lie_on_a_line_over_what_sources_know(found: pnc.Ranking) -> None:
    known = (0.2, 0.4, 0.6, 0.8)
    looks = [with_probabilities(found.best.look, 0.1 + x, [x**2], [x**2] * 2) for x in known]
    assert predicted(looks) == pytest.approx([0.1 + x for x in known])
    off = [*looks, with_probabilities(found.best.look, 0.9, [0.25], [0.25] * 2)]  # .3 too many right by chance
    assert predicted(off) == pytest.approx([0.1 + x + 0.06 for x in (*known, 0.5)])
    falling = [with_probabilities(found.best.look, 1 - x, [x**2], [x**2]) for x in known]
    assert predicted(falling) == pytest.approx([0.5] * 4)
    new_only = [with_probabilities(found.best.look, 0.1 + x, [], [x**2] * 2) for x in known]
    assert predicted(new_only) == pytest.approx([0.1 + x for x in known])


def test_images_on_which_knowledge_shows_count_more(found: pnc.Ranking) -> None:
    """On a quarter of the images sources differ by what they know, on the others by chance."""
    knows = torch.linspace(0.3, 0.9, 8)
    right = {"predicted": 0, "mean": 0}
    for seed in range(20):
        chance = 0.1 * torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([knows[:, None] + chance[:, :20], 0.5 + chance[:, 20:]], 1).clamp(0, 1).square()
        looks = [
            with_probabilities(found.best.look, 0.3 + x / 3, row[::2], row[1::2])
            for x, row in zip(knows.tolist(), rows.tolist(), strict=True)
        ]
        for key, found_order in (("predicted", torch.tensor(predicted(looks))), ("mean", rows.mean(1))):
            right[key] += int((found_order.diff() > 0).sum())
    assert right["predicted"] > right["mean"] + 5


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"finalists": -1}, "finalists: expected a whole number, at least 0; got -1"),
        ({"workers": 0}, "workers: expected a whole number, at least 1; got 0"),
        ({"flip": 1}, "flip: expected True or False"),
        ({"names": {"cow": "vache"}}, "names: cow not among the requested classes"),
        ({"classes": ("4",)}, "classes: the target already knows 4"),
        ({"classes": ("cow",)}, "support has samples of 5, 6, 7, neither base classes nor classes to clone"),
        ({"resume": "."}, "resume: cannot write ., which is a folder"),
    ],
)
def test_wrong_arguments_are_one_line(zoo: pnc.Zoo, changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(pnc.PNCError, match=problem):
        pnc.rank(zoo, network(BASE).module, images(), **{**asked(), **changed})
    with pytest.raises(pnc.InputError, match="zoo: expected a pnc.Zoo, got str"):
        pnc.rank("zoo", network(BASE).module, images(), **asked())  # type: ignore[arg-type]


def test_a_dead_process_is_told_from_an_answer(zoo: pnc.Zoo, tmp_path: Path) -> None:
    worker = ProcessWorker(tmp_path / "missing.safetensors", zoo)  # it stops at once
    with pytest.raises(WorkerLost):
        worker.look(("knows", 10))
    worker.close()
