"""The main job, its promises and the benches on a GPU; all of them are skipped where there is none."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import pnc
from digits import NEW, held_out_images, network, pair, support
from pnc.bench import job_times, latency, scale
from pnc.bench.clock_and_memory import peak_memory
from pnc.bench.comparison_methods import METHODS
from pnc.bench.rivals.rival import Budget
from pnc.cli.app import app
from pnc.composite.metrics import measure_logits
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.process_team import ALONE
from pnc.method import paper_search, refinement
from pnc.method.localization import localizer
from pnc.method.refinement import Schedule
from pnc.models.model_specs import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WAYS = {
    "closed form": {},
    "gates": {"density": 0.5, "tune": "norms"},
    "tuned": {"density": 0.5},
    "scores": {"density": 0.5, "tune": "none"},
    "refined": {"refine": True, "max_macs": 0.9},
    "sequential": {"strategy": "sequential"},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, gates, refined": {"precision": "bfloat16", "density": 0.5, "refine": True},
    "channels chosen with the position": {"density": "auto", "max_macs": 0.6},
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few steps: what is looked at here does not depend on how many."""
    monkeypatch.setattr(localizer, "GATES_STEPS", 20)
    monkeypatch.setattr(localizer, "NORMS_STEPS", 20)
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(0.0003, n_steps=20, n_snapshots=3))
    monkeypatch.setattr(paper_search, "N_STEPS", 60)


@pytest.fixture
def nets():
    """Source and target on the GPU, of this test's own."""
    both = pair()
    return tuple(copy.deepcopy(one.module).cuda() for one in (both.source, both.target))


def clone(nets, **settings):
    return pnc.clone(*nets, support(), **{"classes": NEW, **pair().names(), **settings})


def accuracy(net, images):
    data = held_out_images()
    with torch.no_grad():
        logits = net(images).float().cpu()
    return measure_logits(logits, data.labels, logits[:, :5]).average_accuracy


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_clone_keeps_every_promise(nets, tmp_path, way):
    source, target = nets
    assert fingerprint(target) == fingerprint(pair().target.module)
    images = held_out_images().images.cuda()
    with torch.no_grad():
        expected = target(images)
    before = [take_snapshot(one) for one in nets]
    made = clone(nets, **WAYS[way])
    net = pnc.attach(target, made)
    assert accuracy(net, images) > 0.75
    pnc.save(made, tmp_path / "clone")
    again = pnc.attach(target, pnc.load(tmp_path / "clone", source=source))
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(logits[:, :5], expected)
        assert torch.equal(again(images), logits)
        net.detach(made.name)
        assert torch.equal(net(images), expected)
    assert not any(differences(*both) for both in zip(nets, before, strict=True))


def test_a_clone_made_on_a_gpu_works_on_a_processor_and_the_other_way_round(nets):
    data, here = held_out_images(), pair()
    on_gpu = clone(nets)
    on_cpu = clone((here.source.module, here.target.module))
    assert on_gpu.target == on_cpu.target and on_gpu.source == on_cpu.source
    moved = pnc.attach(here.target.module, on_gpu)
    with torch.no_grad():
        logits = moved(data.images)
        assert logits.device.type == "cpu" and torch.equal(logits[:, :5], here.target.module(data.images))
    found = [
        accuracy(moved, data.images),
        accuracy(pnc.attach(nets[1], on_cpu), data.images.cuda()),
        accuracy(pnc.attach(nets[1], on_gpu), data.images.cuda()),
        accuracy(pnc.attach(here.target.module, on_cpu), data.images),
    ]
    assert max(found) - min(found) <= 0.01


def test_a_composite_moves_to_a_gpu_and_back(stage):
    net = pnc.attach(copy.deepcopy(stage.target), *stage.clones)
    with torch.no_grad():
        before = net(stage.images)
        there = net.cuda()(stage.images.cuda())
        assert there.is_cuda and torch.allclose(there.cpu(), before, atol=0.01)  # convolutions in TF32
        assert torch.equal(torch.nn.DataParallel(net)(stage.images), there)
        assert torch.equal(net.cpu()(stage.images), before)


def test_under_autocast_and_in_half_precision_base_logits_are_the_targets(nets):
    images = held_out_images().images.cuda()
    net = pnc.attach(nets[1], clone(nets))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(net(images)[:, :5], net.target(images))
    assert accuracy(net, images) > 0.8
    half = pnc.attach(nets[1], clone(nets)).half()
    with torch.no_grad():
        assert torch.equal(half(images.half())[:, :5], half.target(images.half()))
    assert accuracy(half, images.half()) > 0.8


def test_the_same_job_gives_the_same_clone_twice(nets):
    one, two = clone(nets), clone(nets)
    assert (one.target_cut.name, one.source_cut.name) == (two.target_cut.name, two.source_cut.name)
    for name, value in one.branch.state_dict().items():
        torch.testing.assert_close(two.branch.state_dict()[name], value, rtol=2e-3, atol=1e-4)


def test_base_logits_keep_their_bits_when_fused_and_new_ones_differ_by_rounding(stage):
    net = pnc.attach(copy.deepcopy(stage.target), *stage.clones).cuda()
    x = stage.images.cuda()
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            logits, base, fused = net(x), net.target(x), net.fused()(x)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    assert torch.equal(logits[:, :3], base) and torch.equal(fused[:, :3], base)
    assert torch.allclose(fused, logits, rtol=1e-4, atol=1e-4)  # other kernels, folded weights


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of within itself
def test_a_fused_composite_can_be_compiled(nets):
    images = held_out_images().images[:32].cuda()
    fused = pnc.attach(nets[1], clone(nets)).fused()
    with torch.no_grad():
        expected = fused(images)
        compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            found = compiled(images).clone()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name, rival in METHODS.items() if rival.kind != "clone"])
def test_every_rival_learns(nets, name):
    task = pnc.prepare_task(*nets, support(), classes=NEW, **pair().names())
    budget = Budget(first_steps=2, second_steps=4, last_steps=30, n_second=1, batch_size=20)
    made = METHODS[name].fit(task, budget).module
    assert accuracy(made, held_out_images().images.cuda()) > 0.3


def test_calibration_looks_at_images_where_the_composite_is(nets):
    net = pnc.attach(nets[1], clone(nets))
    images = held_out_images().images.cuda()
    with torch.no_grad():
        expected = net.target(images)
    pnc.calibrate(net, support())
    with torch.no_grad():
        assert torch.equal(net(images)[:, :5], expected)


def test_commands_take_a_gpu(tmp_path):
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    both = f"--source {tmp_path / 's.safetensors'} --target {tmp_path / 't.safetensors'}"

    def run(words):
        done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output

    run(f"clone {both} --data digits --support 20/5 --device cuda --out {tmp_path / 'c'}")
    run(f"verify {tmp_path / 'c'} {both} --device cuda")
    run(f"eval {tmp_path / 'c'} {both} --data digits --device cuda --json {tmp_path / 'eval.json'}")
    facts = json.loads((tmp_path / "eval.json").read_text())
    assert facts["average_accuracy"] > 0.8, facts


def test_speed_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "LARGE", "zoo:cnn?width=0.25")
    monkeypatch.setattr(job_times, "Budget", lambda: Budget(1, 2, 3, n_second=1))
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    command = (
        f"bench speed --source {tmp_path / 's.safetensors'} --target {tmp_path / 't.safetensors'} --data digits "
        f"--support 20/5 --no-flip --layouts channels_last --device cuda --json {tmp_path / 'speed.json'}"
    )
    assert CliRunner().invoke(app, command.split(), catch_exceptions=False).exit_code == 0
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert facts["environment"]["device"] == torch.cuda.get_device_name()
    rows = {(row["case"], row["form"]): row for row in facts["rows"]}
    largest = rows[f"one clone, batch {latency.GPU_BATCHES[-1]}", latency.TARGET]
    assert largest["peak_bytes"] > 0 and largest["n_macs"] == rows["one clone, batch 1", latency.TARGET]["n_macs"]


def test_growth_is_measured():
    row = scale._clone(*scale._pair(torch.device("cuda"), 1, 0.25), scale.Noise(60, 32), ALONE)
    assert row["macs_share"] > 0 and 0 < row["peak_gib"] < 2
    assert not any(cell == {"cell": "clone, processes", "n": 99} for cell in scale.cells(100, 100, 100, "cuda"))


def test_memory_is_that_of_the_gpu():
    _, peak = peak_memory(lambda: float(torch.ones(32, 1024, 1024, device="cuda").sum()), torch.device("cuda"))
    assert 2**27 <= peak < 2**27 + 2**22
