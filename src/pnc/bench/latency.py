"""Latency of composites compared with the target alone and with whole networks, and the cost of attaching.

All forms of a case run in turn, round after round, so that other work on the machine affects all alike. Ratios are
taken within each round. Accuracy does not matter here, so channels are chosen by one-shot scores.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pnc.bench.clock_and_memory import finish, peak_memory
from pnc.bench.result_files import Cells
from pnc.bench.setting import Setting
from pnc.channels.compaction import own_copy
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead
from pnc.composite.composite import Composite, attach
from pnc.composite.layer_folding import folded
from pnc.data.image_set import images_as_float
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import extract
from pnc.graph.recording import record
from pnc.method.pipeline import clone, fit
from pnc.method.positions import scan
from pnc.method.task import Network, Progress, prepare_task, read_network
from pnc.models.model_specs import LoadedModel, build_model

BATCHES = (1, 8, 64)
GPU_BATCHES = (*BATCHES, 1024)
"""On GPUs, which smaller batches do not use fully."""
DENSITIES = (1.0, 0.5, 0.3)
ALIGNED, ALIGNED_SINGLES = "0.5, multiples of 8", "multiples of 8"
"""Forms with multiples of 8 channels, which convolutions on CPUs process at a time."""
N_CLONES = (4, 16)
"""Numbers of clones with one class each, at the lowest density."""
N_DISTINCT = 4
"""How many of them have different classes."""
LAYOUTS = ("as it is", "channels_last", "compiled")
TARGET, WHOLE, FOLDED, PLUMBING = (
    "target",
    "target + source",
    "target + source, norms folded",
    "clone of almost nothing",
)
LARGE = "timm:resnet50?pretrained=false"
SECONDS = 8.0
"""Approximate time for the rounds of one case."""
MIN_ROUNDS, MAX_ROUNDS = 5, 200
N_WARM = 3
"""Rounds that do not count: they compile, choose kernels and record GPU graphs."""

_RECIPE = ("score", "standard_error", "macs_share", "n_new_samples", "n_base_samples")

Forms = Mapping[str, nn.Module]


class SideBySide(nn.Module):
    """Whole networks, one after the other on the same images: logits (B, sum of their classes)."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of all networks."""
        return torch.cat([network(images) for network in self.networks], 1)


class CaseForms:
    """The forms of each case, made on demand.

    Args:
        setting: Networks and images.
        seed: Of the support.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self._setting, self._seed = setting, seed
        self._clones: dict[tuple[str, int], Clone] = {}

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, the largest last."""
        return GPU_BATCHES if self._setting.device.type == "cuda" else BATCHES

    @property
    def images(self) -> Tensor:
        """Test images for the largest batch, on the device of the networks."""
        return images_as_float(self._setting.test.images[: self.batches[-1]]).to(self._setting.device)

    @cached_property
    def one(self) -> Forms:
        """One clone of all classes at every density."""
        target, source = self._setting.target.module, self._setting.source.module
        whole = record(source, self.images[:2])
        forms = {TARGET: target, WHOLE: SideBySide(target, source)}
        forms[FOLDED] = SideBySide(target, folded(own_copy(whole.module)))
        for name in (*(f"{density:g}" for density in DENSITIES), ALIGNED):
            forms |= _both(attach(target, self._clone(name)), f"density {name}")
        return forms | {PLUMBING: attach(target, self._plumbing())}

    @cached_property
    def many(self) -> Forms:
        """Several clones with one class each, and as many whole sources, each with its own tensors."""
        target, source = self._setting.target.module, self._setting.source.module
        forms: dict[str, nn.Module] = {TARGET: target}
        for number in N_CLONES:
            forms[several(number)] = SideBySide(target, *(copy.deepcopy(source) for _ in range(number)))
            forms |= _both(attach(target, *self._singles(number)), f"{number} clones")
            forms |= _both(attach(target, *self._singles(number, 8)), f"{number} clones, {ALIGNED_SINGLES}")
        return forms

    def laid_out(self, layout: str) -> Forms:
        """The target, both networks and the clone at density .5, with channels last or compiled."""
        target, source = (copy.deepcopy(one.module) for one in (self._setting.target, self._setting.source))
        net = attach(target, self._clone("0.5"))
        forms = {TARGET: target, WHOLE: SideBySide(target, source), "density 0.5": net}
        if layout == "channels_last":
            for form in forms.values():
                form.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
        forms["density 0.5, fused"] = net.fused()
        if layout == "compiled":
            del forms["density 0.5"]
            forms = {name: _compiled(form) for name, form in forms.items()}
        return forms

    def _clone(self, name: str, round_to: int = 1) -> Clone:
        """A clone of all classes at the density `name`, or one of the class `name`."""
        key = name, round_to
        if key not in self._clones:
            setting, new = self._setting, self._setting.new_classes
            source, target = setting.source.module, setting.target.module
            if name in new:
                support, arguments = setting.draw([name], self._seed), setting.arguments([name], self._seed)
                chosen: Any = {"density": DENSITIES[-1], "tune": "none", "round_to": round_to}
                self._clones[key] = clone(source, target, support, **arguments, **chosen)
            else:
                task = prepare_task(source, target, setting.draw(new, self._seed), **setting.arguments(new, self._seed))
                found = scan(task)
                fitted = found.adapter(found.choose())
                for density in DENSITIES:
                    self._clones[f"{density:g}", 1] = fit(task, fitted, density=density, tune="none")
                self._clones[ALIGNED, 1] = fit(task, fitted, density=0.5, tune="none", round_to=8)
        return self._clones[key]

    def _singles(self, number: int, round_to: int = 1) -> list[Clone]:
        """Clones with one class each: the source's first classes in turn, renamed."""
        new = self._setting.new_classes
        chosen = [(n, new[n % min(len(new), N_DISTINCT)]) for n in range(number)]
        return [self._clone(name, round_to).renamed(f"{name} {n}", {name: f"{name} {n}"}) for n, name in chosen]

    def _plumbing(self) -> Clone:
        target, shape = self._setting.target, self._setting.target.input_shape
        source = build_model("zoo:cnn?width=0.125", ("something new",), shape)
        source.module.to(self._setting.device)
        return untrained_clone(source, target, self.images[:2])


def several(number: int) -> str:
    """Name of the form of the target with this number of whole sources."""
    return f"target + {number} sources"


def _compiled(form: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(form, dynamic=False, mode="reduce-overhead")  # type: ignore[assignment]
    return made


def _both(net: Composite, name: str) -> dict[str, nn.Module]:
    return {name: net, f"{name}, fused": net.fused()}


def untrained_clone(source: LoadedModel, target: LoadedModel, example: Tensor) -> Clone:
    """A clone at the last cut of both networks, with an adapter and a head of zeros: as fast as a fitted one."""
    networks: list[Network] = [
        read_network(one.module, example, one.classes, role) for one, role in ((source, "source"), (target, "target"))
    ]
    cuts = [candidate_cuts(network.recording)[-1] for network in networks]
    features = [network.head.features for network in networks]
    body = own_copy(extract(networks[0].recording, cuts[0], [features[0]]))
    n_base, n_new, n_own = len(target.classes), len(source.classes), features[0].n_channels
    discriminants = DiscriminantHead(n_base, n_base + n_new, n_own + features[1].n_channels)
    stitched = Stitched(Adapter(cuts[1], cuts[0], rectify=True), body, features[0])
    return Clone(
        name="untrained",
        classes=source.classes,
        base_classes=target.classes,
        branch=Branch(stitched, StackedHead(discriminants, SourceHead(n_new, n_own))),
        masks=None,
        source=fingerprint(source.module),
        target=fingerprint(target.module),
        source_forward=networks[0].forward_print,
        target_forward=networks[1].forward_print,
        input_shape=target.input_shape,
        target_features=features[1],
        recipe={**dict.fromkeys(_RECIPE, 0), "density": 1.0},
    )


# ----------------------------------------------------------------------------------------------------------- latency


def cases(batches: Sequence[int], layouts: Sequence[str]) -> list[tuple[str, int, str]]:
    """(name, batch size, form) of all cases: one clone and many clones, and one in the other layouts.

    Only the smallest batch is compiled: this takes half a minute for each form.
    """
    found = [(f"{what}, batch {batch}", batch, what) for batch in batches for what in ("one clone", "many clones")]
    others = [(f"{layout}, batch {batch}", batch, layout) for layout in layouts[1:] for batch in batches]
    return found + [one for one in others if one[2] != "compiled" or one[1] == batches[0]]


def run_case(forms_of: CaseForms, case: str, batch: int, what: str) -> Iterator[dict[str, Any]]:
    """Rows of one case, one for each form; a single row with the reason if there is no working compiler."""
    images = forms_of.images[:batch]
    forms = forms_of.one if what == "one clone" else forms_of.many if what == "many clones" else forms_of.laid_out(what)
    start = time.perf_counter()
    if what == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        try:
            times = measure({name: partial(form, images) for name, form in forms.items()}, images.device, SECONDS)
        except RuntimeError as error:  # from torch's compiler, if the machine's does not work
            if what != "compiled":
                raise
            yield {"part": "latency", "case": case, "form": TARGET, "batch": batch, "skipped": str(error)[:300]}
            return
        seconds = time.perf_counter() - start
        for name, values in times.items():
            whole = times.get(_reference(name))
            costs = {} if what == "compiled" else _costs(forms[name], images, weigh=batch == forms_of.batches[-1])
            yield {
                "part": "latency",
                "case": case,
                "form": name,
                "batch": batch,
                **_spread(values),
                "images_per_second": batch / median(values),
                "of_target": _ratio(values, times[TARGET]),
                **({"of_whole": _ratio(values, whole)} if whole else {}),
                **costs,
                "case_seconds": seconds,
            }


def _reference(form: str) -> str:
    """The form to compare with: the target with as many whole sources."""
    return next((several(number) for number in N_CLONES if f"{number} " in form), WHOLE)


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return median(a / b for a, b in zip(seconds, others, strict=True))


def measure(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, most: int = MAX_ROUNDS
) -> dict[str, list[float]]:
    """Time every call in every round, in seconds, after warm-up rounds; for `seconds` or `most` rounds."""
    for call in [*calls.values()] * N_WARM:
        call()
    finish(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for number in range(most):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            finish(device)
            times[name].append(time.perf_counter() - start)
        if number + 1 >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return times


def _spread(seconds: Sequence[float]) -> dict[str, Any]:
    lower, middle, upper = (1000 * value for value in quantiles(seconds, n=4))
    return {"median_ms": middle, "lower_ms": lower, "upper_ms": upper, "rounds": len(seconds)}


def _costs(form: nn.Module, images: Tensor, weigh: bool) -> dict[str, Any]:
    """Multiply-accumulates for one image, counted in a run, and peak memory if `weigh`."""
    with FlopCounterMode(display=False) as counter:
        form(images)
    costs: dict[str, Any] = {"n_macs": counter.get_total_flops() // (2 * len(images))}
    return {**costs, "peak_bytes": peak_memory(lambda: form(images), images.device)[1]} if weigh else costs


# ----------------------------------------------------------------------------------------------- coming and going


def run_life(setting: Setting, case: str) -> Iterator[dict[str, Any]]:
    """Rows for attaching, detaching, fusing, loading and fingerprints: of the pair, or of large networks."""
    if case == LARGE:
        try:
            models = [build_model(LARGE, None, None, seed) for seed in (0, 1)]
        except InputError as error:  # without timm
            yield {"part": "life", "case": case, "form": "attach", "skipped": str(error)}
            return
        for model in models:
            model.module.to(setting.device)
        example = torch.rand(2, *models[0].input_shape, generator=torch.Generator().manual_seed(0))
    else:
        models = [setting.source, setting.target]
        example = images_as_float(setting.test.images[:2])
    classes = tuple(f"new {number}" for number in range(len(models[0].classes)))
    source = LoadedModel(models[0].module, models[0].spec, classes, models[0].input_shape)
    made = untrained_clone(source, models[1], example.to(setting.device))
    other = made.renamed("other", {name: f"other {name}" for name in made.classes})
    net = attach(models[1].module, made)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clone.safetensors"
        save(made, path)
        calls: dict[str, Callable[[], Any]] = {
            "attach, the first clone": lambda: attach(models[1].module, made),
            "attach, a further clone": lambda: net.attach(other),
            "detach": lambda: net.detach("other"),
            "fused()": net.fused,
            "load": lambda: load(path, source=source.module),
            "fingerprint": lambda: fingerprint(models[1].module),
        }
        for name, values in measure(calls, setting.device, seconds=4, most=MIN_ROUNDS).items():
            yield {"part": "life", "case": case, "form": name, **_spread(values)}


def run(setting: Setting, seed: int, layouts: Sequence[str], cells: Cells, progress: Progress | None = None) -> None:
    """Measure every case that is not in `cells` yet, latency first; keys: part, case and form."""
    forms_of = CaseForms(setting, seed)
    wanted = [("latency", case, batch, what) for case, batch, what in cases(forms_of.batches, layouts)]
    wanted += [("life", case, 0, "") for case in ("pair", LARGE)]
    for done, (part, case, batch, what) in enumerate(wanted):
        if progress is not None:
            progress(f"{part}: {case}", done, len(wanted))
        if not any(row["part"] == part and row["case"] == case for row in cells.rows):
            rows = run_case(forms_of, case, batch, what) if part == "latency" else run_life(setting, case)
            for row in list(rows):  # all or none, because ratios relate rows of one case
                cells.add(row)
