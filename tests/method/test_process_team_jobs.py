"""Two processes make the same clone as one."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

import pnc
from channel_zoo import NormInBetween
from digits import NEW, pair, support
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.mac_budget import Costs
from pnc.clones.adapter import Stitched
from pnc.foundation import process_team
from pnc.foundation.errors import InputError
from pnc.foundation.process_team import ALONE, Team
from pnc.method import part_tuning
from pnc.method.held_out import own_head, source_body
from pnc.method.localization import gates, localizer, norms
from pnc.method.refinement import Schedule, feature_loss, train, views
from pnc.models.model_specs import save_model
from segments import network, segment_of

N_PROCESSES = 2


def prepared(nets, data, team):
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names(), team=team)


def clones(team, nets, data):
    """Make a clone in closed form, one with gates, and a few steps of refinement."""
    localizer.GATES_STEPS = localizer.NORMS_STEPS = 3  # more steps would only let rounding errors grow
    task = prepared(nets, data, team)
    found = pnc.scan(task, max_cuts=3)
    # If the adapter is exact, as at the input, gradients are only rounding errors, which Adam scales up.
    position = max((p for p in found.positions if p.adapter_error > 0.1), key=lambda p: p.n_macs)
    fitted = found.adapter(position)
    body = source_body(task, position.source_cut)
    stitched = Stitched(fitted.adapter, body, task.source.head.features)
    seen, generator = views(task, position.target_cut), torch.Generator().manual_seed(0)
    ((tuned, _),) = train(stitched, own_head(task), seen, feature_loss, Schedule(0.001, 5), generator, team)
    closed, thinned = pnc.fit(task, fitted), pnc.fit(task, fitted, density=0.5, tune="norms")
    part_tuning.N_STEPS = 3
    distilled = pnc.fit(task, fitted, density=0.5, tune="weights")
    return {
        "errors": torch.tensor(list(found.adapter_errors.values())),
        "scores": torch.tensor([p.score for p in found.positions]),
        "closed": closed.branch.state_dict(),
        "thinned": thinned.branch.state_dict(),
        "masks": thinned.masks.flat,
        "distilled": distilled.branch.state_dict(),
        "start": fitted.adapter.weight,
        "tuned": tuned.weight,
    }


def learned(team):
    """Gates, tuned norms and statistics of a segment in double precision, where rounding cannot grow."""
    segment = segment_of(network(NormInBetween))
    spaces = channel_spaces(segment)
    costs, start = Costs(segment, spaces), {s.name: torch.linspace(0, 0.1, s.size) for s in spaces.spaces}
    wanted = torch.randn(7, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def batches():
        generator = torch.Generator().manual_seed(1)
        while True:
            x = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=generator)  # 3 for one process, 4 for the other
            yield x, lambda out: (out - wanted.flatten()[: out[0].numel()].reshape(out[:1].shape)).square().mean()

    ranks, tuned = gates.learn_gates(segment, costs, start, 0.5, batches(), 6, tune=True, team=team)
    inputs = [x for (x, _), _ in zip(batches(), range(3), strict=False)]
    norms.tune_norms(tuned, batches(), 6, inputs, start=segment, team=team)
    return {**{f"ranks {name}": one for name, one in ranks.items()}, **tuned.state_dict()}


def member(rank, port, folder, nets, data):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(N_PROCESSES), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with pnc.joined() as (team, device):
        assert (team, device) == (Team(rank, N_PROCESSES), torch.device("cpu"))
        with pnc.joined() as again:
            assert again == (team, device)  # an existing process group is used and kept
        found = {"learned": learned(team), **clones(team, nets, data)}
        with pytest.raises(InputError, match="support: the processes were given different images"):
            other = replace(data, images=data.images + rank)
            prepared(nets, other, team)
    assert not torch.distributed.is_initialized()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The results of one process, and of each of two."""
    folder, nets, data = tmp_path_factory.mktemp("team"), pair(), support(24, 6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(member, (port, folder, nets, data), N_PROCESSES)
    steps = localizer.GATES_STEPS, localizer.NORMS_STEPS
    alone = {"learned": learned(ALONE), **clones(ALONE, nets, data)}
    localizer.GATES_STEPS, localizer.NORMS_STEPS = steps
    return alone, [torch.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]


def distance(a, b):
    """Distance of two tensors, as a share of the second's norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def test_every_process_ends_with_the_same_clone(made):
    _, (first, second) = made
    assert first.keys() == second.keys()
    for name, one in first.items():
        torch.testing.assert_close(second[name], one, rtol=0, atol=0)


def test_the_closed_form_is_that_of_one_process(made):
    alone, (together, _) = made
    torch.testing.assert_close(together["errors"], alone["errors"], rtol=1e-6, atol=1e-7)  # sums in another order
    assert torch.equal(together["scores"], alone["scores"])
    assert together["closed"].keys() == alone["closed"].keys()
    for name, value in alone["closed"].items():
        assert distance(together["closed"][name], value) < 5e-3, name  # discriminants are in half precision


def test_gates_and_norms_are_those_of_one_process(made):
    alone, (together, _) = made
    for name, value in alone["learned"].items():
        assert distance(together["learned"][name], value) < 1e-5, name  # double precision, six steps of Adam
    assert torch.equal(together["masks"], alone["masks"])
    body = [name for name in alone["thinned"] if "running" in name]
    assert body
    for name in body:
        assert distance(together["thinned"][name], alone["thinned"][name]) < 1e-2, name  # float32


def test_tuned_parts_are_those_of_one_process(made):
    alone, (together, _) = made
    weights = [name for name in alone["distilled"] if name.startswith("stitched.body") and name.endswith("weight")]
    assert weights
    for name in weights:  # three steps of Adam, and changes rounded to 6 bits
        assert distance(together["distilled"][name], alone["distilled"][name]) < 1e-2, name


def test_refinement_is_that_of_one_process(made):
    alone, (together, _) = made
    moved = alone["tuned"] - alone["start"]
    assert moved.abs().max() > 0.001  # farther than one step
    assert distance(together["tuned"] - together["start"], moved) < 0.02  # float32, five steps of Adam


def test_one_process_is_a_team_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not process_team.launched()
    assert process_team.join("cpu") == (ALONE, torch.device("cpu"))
    x = torch.rand(3, 2)
    assert all(torch.equal(one, x) for one in (ALONE.sum(x), ALONE.least(x), ALONE.whole(x, 3)))
    assert ALONE.agree(x) and x[ALONE.part(3)].equal(x) and ALONE.is_main and ALONE.is_mine(7)


def test_parts_cover_a_batch_once():
    for size in (1, 2, 3, 5):
        parts = [torch.arange(7)[Team(rank, size).part(7)] for rank in range(size)]
        assert torch.equal(torch.cat(parts), torch.arange(7))


def test_several_processes_without_accelerate_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"pip install 'pnc\[distributed\]'"):
        process_team.join()


def test_a_support_smaller_than_the_team_is_refused():
    nets = pair()
    with pytest.raises(InputError, match="10 images are too few for 11 processes"):
        pnc.prepare_task(
            nets.source.module, nets.target.module, support(1, 1), classes=NEW, **nets.names(), team=Team(0, 11)
        )


@pytest.mark.slow
def test_a_launched_command_writes_the_same_single_file_as_one_process(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    nets, words = pair(), ["-m", "pnc", "clone", "--data", "digits", "--threads", "1"]
    for role, model in (("source", nets.source), ("target", nets.target)):
        save_model(model, tmp_path / f"{role}.safetensors", {})
        words += [f"--{role}", str(tmp_path / f"{role}.safetensors")]
    ran = {}
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [*start, *words, "--out", str(tmp_path / name)]
        ran[name] = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran["two"].stdout.count("written after") == 1  # by the main process alone
    one, two = (pnc.load(tmp_path / name, source=nets.source.module) for name in ("one", "two"))
    assert (one.target_cut.name, one.source_cut.name) == (two.target_cut.name, two.source_cut.name)
    for name, value in one.branch.state_dict().items():
        # discriminants are stored in half precision: one step of it
        torch.testing.assert_close(two.branch.state_dict()[name], value, rtol=2e-3, atol=1e-4)
