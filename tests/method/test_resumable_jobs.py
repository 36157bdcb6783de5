"""Killed jobs continue where they stopped, and end with the same clone."""

import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pnc
from digits import BASE, NEW, network, pair, support
from pnc.bench.compare import KEYS
from pnc.bench.result_files import Cells
from pnc.foundation.process_team import Team
from pnc.foundation.resumable_steps import Steps
from pnc.foundation.tensor_files import write_tensors
from pnc.method import part_tuning, refinement
from pnc.method.localization import localizer
from pnc.method.positions import Position, Scan
from pnc.method.refinement import Schedule
from pnc.models.model_specs import save_model

LONG_STEPS = ("learning gates", "tuning norms", "refining adapters")


def costliest_with_an_adapter(found: Scan, *_: Any) -> Position:
    """A position with channels to remove and an adapter to refine."""
    return max((p for p in found.positions if not p.is_exact), key=lambda p: p.n_macs)


def make(nets: Any, out: Path, resume: Path | None, progress: Any = None, **settings: Any) -> None:
    """A clone with all long steps, made in a few seconds."""
    given = {"classes": NEW, "density": 0.5, "refine": True, "resume": resume, "progress": progress, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localizer, "GATES_STEPS", 4)
        patch.setattr(localizer, "NORMS_STEPS", 4)
        patch.setattr(refinement, "SCHEDULE", Schedule(0.001, 6, 3))
        patch.setattr(Scan, "choose", costliest_with_an_adapter)
        made = pnc.clone(nets.source.module, nets.target.module, support(), **nets.names(), **given)
    pnc.save(made, out)


def work(nets: Any, folder: Path, connection: Any) -> None:
    """A process that makes the clone; after each step it names the step and waits for an answer."""
    torch.set_num_threads(1)

    def progress(what: str, done: int, n: int) -> None:
        if what in LONG_STEPS:
            connection.send((what, done))
            connection.recv()

    make(nets, folder / "clone.safetensors", folder / "steps.safetensors", progress)


def life(nets: Any, folder: Path, last: tuple[str, int]) -> list[tuple[str, int]]:
    """The steps of a process that is killed after the step `last`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=work, args=(nets, folder, there))
    worker.start()
    there.close()
    try:
        done = [here.recv()]
        while done[-1] != last:
            here.send(None)
            done.append(here.recv())
    finally:
        worker.kill()  # SIGKILL
        worker.join()
    return done


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """One thread, as in the processes: sums over more threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_clone_killed_again_and_again_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    nets, straight, folder = pair(), tmp_path / "straight.safetensors", tmp_path / "killed"
    make(nets, straight, None)
    folder.mkdir()
    assert life(nets, folder, ("refining adapters", 1))[0] == ("learning gates", 1)
    assert (folder / "steps.safetensors").exists() and not (folder / "clone.safetensors").exists()
    again = life(nets, folder, ("refining adapters", 4))
    assert again == [("refining adapters", n) for n in (1, 2, 3, 4)]  # the part is not localized again
    make(nets, folder / "clone.safetensors", folder / "steps.safetensors")
    assert [path.name for path in folder.iterdir()] == ["clone.safetensors"]
    assert (folder / "clone.safetensors").read_bytes() == straight.read_bytes()


def test_a_call_that_is_refused_leaves_the_steps_of_another_call(tmp_path: Path) -> None:
    nets, resume = pair(), tmp_path / "steps.safetensors"
    Steps(resume, "another job").keep("one", {"tensor": torch.ones(1)})
    before = resume.read_bytes()
    with pytest.raises(pnc.InputError, match="max_macs=0.0001"):
        pnc.clone(nets.source.module, nets.target.module, support(), **nets.names(), max_macs=0.0001, resume=resume)
    assert resume.read_bytes() == before


class Stopped(Exception):
    """Raised by a test to end a job."""


def test_a_part_that_was_tuned_is_not_tuned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_tuning, "N_STEPS", 6)
    nets, resume, seen = pair(), tmp_path / "steps.safetensors", []

    def progress(what: str, done: int, n: int) -> None:
        if "tuning the part" in seen and what != seen[-1]:
            raise Stopped
        seen.append(what)

    def made(**settings: Any) -> pnc.Clone:
        names = {"classes": NEW, **nets.names()}
        return pnc.clone(nets.source.module, nets.target.module, support(), density=0.5, **names, **settings)

    with pytest.raises(Stopped):
        made(resume=resume, progress=progress)
    done = []
    again = made(resume=resume, progress=lambda what, *_: done.append(what))
    assert "tuning the part" in seen and "tuning the part" not in done
    assert not resume.exists()
    for clone, name in ((again, "again"), (made(), "whole")):
        pnc.save(clone, tmp_path / name)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_steps_of_other_arguments_are_not_used(tmp_path: Path) -> None:
    nets, resume, seen = pair(), tmp_path / "steps.safetensors", []

    class Killed(BaseException):
        pass

    def progress(what: str, done: int, n: int) -> None:
        seen.append(what)
        if what == "refining adapters":
            raise Killed

    def first_step(**settings: Any) -> str:
        seen.clear()
        with pytest.raises(Killed):
            make(nets, tmp_path / "clone", resume, progress, **settings)
        return next(what for what in seen if what in LONG_STEPS)

    assert [first_step(), first_step()] == ["learning gates", "refining adapters"]
    assert first_step(seed=1) == "learning gates"
    assert first_step(seed=1, density=0.6) == "learning gates"
    assert first_step(seed=1, density=0.6, name="other") == "refining adapters"  # does not affect the steps
    assert first_step(seed=1, density=0.6, flip=True) == "learning gates"


def test_another_kind_of_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "steps.safetensors"
    write_tensors(path, {"x": torch.ones(1)}, {"format": "other"})
    before = path.read_bytes()
    with pytest.raises(pnc.InputError, match="resume: .* holds 'other', not the steps of a clone; delete it, or"):
        Steps(path, "a")
    assert path.read_bytes() == before
    with pytest.raises(pnc.InputError, match=r"resume: expected a path that ends in \.safetensors"):
        Steps(tmp_path / "steps.pt", "a")
    with pytest.raises(pnc.InputError, match="resume: there is no folder"):
        Steps(tmp_path / "missing" / "steps.safetensors")
    path.write_bytes(before[:-1])
    with pytest.raises(pnc.FileFormatError, match="resume: .* is damaged; delete it to start again, or"):
        Steps(path, "a")


def test_if_some_processes_do_not_see_the_file_all_start_from_the_beginning(tmp_path: Path) -> None:
    class Second(Team):
        """A team member that learns whether it agrees with the others."""

        sees_the_same = True

        def agree(self, tensor: torch.Tensor) -> bool:
            return self.sees_the_same

    path = tmp_path / "steps.safetensors"
    Steps(path, "a").at("here").keep("done", {"x": torch.arange(3)})
    found = Steps(path, "a").at("here").get("done")
    assert found is not None and torch.equal(found["x"], torch.arange(3))
    assert Steps(path, "a").at("there").get("done") is None and Steps(path, "b").at("here").get("done") is None
    assert Steps(path, "a", Second(1, 2)).at("here").get("done") is not None
    Steps(path, "a", Second(1, 2)).finish()
    assert path.exists()  # the main process removes it
    Second.sees_the_same = False
    assert Steps(path, "a", Second(1, 2)).at("here").get("done") is None
    Steps(path, "a").finish()
    assert not path.exists()


def test_a_bench_that_is_killed_at_random_moments_loses_no_row_and_makes_none_twice(tmp_path: Path) -> None:
    for name, classes in (("t", BASE), ("s", NEW)):
        save_model(network(classes), tmp_path / f"{name}.safetensors", {})
    methods = "direct ensemble,ensemble with temperatures,nearest mean,LDA on target features"
    words = ["--data", "digits", "--no-flip", "--support", "20/5", "--n-test", "10", "--threads", "1", "--seeds", "1"]
    networks = ["--source", str(tmp_path / "s.safetensors"), "--target", str(tmp_path / "t.safetensors")]
    out = ["--out", str(tmp_path / "compare"), "--methods", methods]
    command = [sys.executable, "-m", "pnc", "bench", "compare", *networks, *words, *out]
    rows, moments, lives = tmp_path / "compare" / "digits.jsonl", random.Random(0), 0
    kept: list[str] = []
    while len(kept) < 1 + 4:
        lives += 1
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wanted = len(kept) + (1 if kept else 2)
        while process.poll() is None and (not rows.exists() or rows.read_text().count("\n") < wanted):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.03))  # a cell takes longer, as it records two networks
        process.kill()
        assert process.wait() in (0, -9)
        now = rows.read_text().split("\n")[:-1]
        assert now[: len(kept)] == kept, "a row was lost or changed"
        kept = now
    found = Cells(rows, {}, KEYS).rows
    assert len(found) == len({tuple(row[key] for key in KEYS) for row in found}) == 4
    assert 1 < lives < 5
