"""Coverage: can users' classifiers be recorded, cut, shrunk, cloned and exported? One row per model."""

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.clock_and_memory import peak_memory
from pnc.bench.library_classifiers import CLASSIFIERS, N_CLASSES, SHARES, build, check_libraries, family, prepared
from pnc.bench.result_files import Cells, Claim, at_least, at_most, commit, table
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import KEPT, ChannelSpaces, channel_spaces
from pnc.channels.compaction import compact
from pnc.clones.clone_file import load, save
from pnc.composite.composite import Composite, attach
from pnc.composite.export import export
from pnc.foundation.errors import PNCError
from pnc.foundation.network_state import differences, evaluating, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.candidate_cuts import candidate_cuts, gaps
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import LOGITS, cut_points, extract
from pnc.graph.logits import pick_logits
from pnc.graph.recording import Recording, record
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import Progress, prepare_task
from pnc.models.reference_networks import resnet

N_CUTS = 8
"""Number of cuts at which a network is split and joined again, spread over all of its cuts."""

BATCHES = (1, 5)
"""Batch sizes for that; the recorder uses others."""

LARGE = 30
"""Megabytes above which a network takes more memory than the interpreter does for its graph."""

MEMORY_RATIO = 3
"""Peak memory allowed for recording and analysis, as a multiple of the network's own or, if it is smaller, `LARGE`."""

N_TIMED = 2
"""Number of runs; the shortest counts, because other work on the machine only adds time."""

KEYS = ("model", "size")
"""Fields that name a row."""

COLUMNS = (
    "model", "size", "recorded", "cuts", "largest_gap", "exact", "prunable_share", "kept_at_half",
    "shrunk_equals_masked", "clone_runs", "export_ok", "seconds", "megabytes", "memory_ratio", "reason",
)  # fmt: skip

T = TypeVar("T")

_N_NEW, _N_BASE = 4, 2
_SCAN_CUTS = 3


def bench(models: Sequence[str], again: bool = False) -> Bench:
    """Measure models of `library_classifiers.CLASSIFIERS`, one row each.

    Args:
        models: Their names.
        again: First measure time and memory of the existing rows again.
    Raises:
        InputError: a library cannot be imported; raised before the first row is made.
    """
    wanted = [{"model": model, "size": CLASSIFIERS[model]} for model in models]

    def make(cell: Row) -> Row:
        check_libraries()
        return {**measure(cell["model"]), **cell, "commit": commit()}

    def rows(cells: Cells, progress: Progress | None) -> Rows:
        if again:
            measure_again(models, cells, progress)
        return one_by_one(wanted, make)(cells, progress)

    return Bench("coverage", KEYS, {}, rows, claims, markdown)


def measure_again(models: Sequence[str], cells: Cells, progress: Progress | None = None) -> None:
    """Measure time and memory of existing rows again, for example because the machine was busy.

    Rows that the current commit has measured again are skipped, so that a stopped run can continue.

    Args:
        models: As in `bench`.
        cells: The rows.
        progress: Called with the model, the models done, and the models in all.
    """
    now = commit()
    wanted = {(model, CLASSIFIERS[model]) for model in models}
    rows = [row for row in cells.rows if (row["model"], row["size"]) in wanted and row["recorded"]]
    for done, row in enumerate(rows):
        if progress is not None:
            progress(row["model"], done, len(rows))
        if row.get("timed_by") == now:
            continue
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # of the libraries
            torch.manual_seed(0)
            network, images = build(row["model"])
            with evaluating(network):
                network(images)
            measured = dict(row)
            _record(measured, network, images)
        cells.add({**measured, "timed_by": now})


def measure(model: str) -> dict[str, Any]:
    """Measure one model; `reason` in its row says what failed, and in which stage.

    `recorded` is false only if the recorder refused, with the reason; `shrunk_equals_masked` is None if nothing can be
    removed. `seconds` is the time of one processor for recording and analysis, the shortest of `N_TIMED` runs;
    `memory_ratio` is the peak memory of that as a multiple of `megabytes`, what the network itself needs (weights, and
    a forward pass of the same batch).
    """
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(model=model, recorded=False, exact=False, clone_runs=False, export_ok=False, reason="")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of the libraries
        torch.manual_seed(0)
        built = _tried(row, "build", lambda: build(model))
        if built is None:
            return {**row, "unchanged": True}
        network, images = built
        with evaluating(network):
            network(images)  # fills what it keeps between calls
        before = take_snapshot(network)
        recording = _tried(row, "record", lambda: _record(row, network, images))
        if recording is not None:
            _tried(row, "exact", lambda: _check_exact(row, network, recording, images.shape[1:]))
            _tried(row, "shrink", lambda: _shrink(row, recording))
            _tried(row, "clone", lambda: _clone_both_ways(row, network, images.shape[1:]))
        changed = differences(network, before)
        row.update(unchanged=not changed, reason=row["reason"] + "".join(f"changed: {what}. " for what in changed[:1]))
    return row


def _tried(row: dict[str, Any], stage: str, work: Callable[[], T]) -> T | None:
    """The result of `work`; None if it fails, with the reason in the row."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 (any failure of a network is a result of this bench)
        known = "" if isinstance(error, PNCError) else f"{type(error).__name__}: "
        row["reason"] += f"{stage}: {known}{(str(error) or '?').splitlines()[0][:200]}. "
        return None


# ------------------------------------------------------------------------------------------------------------- stages


def _record(row: dict[str, Any], network: nn.Module, images: Tensor) -> Recording:
    own_bytes = sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    with evaluating(network):
        _, forward_peak = peak_memory(lambda: network(images))
    # Memory first: the timed runs leave gaps in the heap, which count as used.
    (recording, facts), peak = peak_memory(lambda: _analysed(network, images))
    row.update(facts, recorded=True)
    gc.collect()
    gc.freeze()  # otherwise the collector keeps scanning everything that three libraries have loaded
    try:
        row["seconds"] = min(_seconds(lambda: _analysed(network, images)) for _ in range(N_TIMED))
    finally:
        gc.unfreeze()
    if peak is not None and forward_peak is not None:
        whole = own_bytes + forward_peak
        row.update(megabytes=whole / 1e6, memory_ratio=(own_bytes + peak) / whole)
    return recording


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _analysed(network: nn.Module, images: Tensor) -> tuple[Recording, dict[str, Any]]:
    recording = record(network, images)
    cuts = cut_points(recording)
    channel_spaces(extract(recording, None, [find_head(recording).features]))
    return recording, {"cuts": len(cuts), "largest_gap": gaps(recording)[0].share}


def _check_exact(row: dict[str, Any], network: nn.Module, recording: Recording, shape: Sequence[int]) -> None:
    cuts = cut_points(recording)
    chosen = [cuts[i] for i in dict.fromkeys(round(i * (len(cuts) - 1) / (N_CUTS - 1)) for i in range(N_CUTS))]
    front = extract(recording, None, [*chosen, LOGITS])
    with evaluating(network):
        for size in BATCHES:
            x = torch.randn(size, *shape)
            expected = pick_logits(network(x.clone()))
            *tensors, whole = front(x)
            assert same_bits(whole, expected), f"the recorded graph differs at batch {size}"
            for cut, tensor in zip(chosen, tensors, strict=True):
                assert same_bits(extract(recording, cut, [LOGITS])(tensor), expected), f"differs at {cut.name}"
    row["exact"] = True


def _shrink(row: dict[str, Any], recording: Recording) -> None:
    start = candidate_cuts(recording)[1]
    segment = extract(recording, start, [find_head(recording).features])
    spaces = channel_spaces(segment, free_output=True)
    n_params = sum(p.numel() for p in segment.parameters())
    row["prunable_share"] = prunable_params(spaces) / max(n_params, 1)
    if not spaces.spaces:
        return
    row["shrunk_equals_masked"] = False
    masks = channel_masks(spaces, {s.name: torch.arange(s.size) % 2 == 0 for s in spaces.spaces})
    smaller = compact(segment, spaces, masks)  # compared with masking in float64 on the way
    row.update(shrunk_equals_masked=True, kept_at_half=sum(p.numel() for p in smaller.parameters()) / n_params)


def prunable_params(spaces: ChannelSpaces) -> int:
    """Number of parameters that belong to removable channels."""
    shapes = {(s.tensor, s.user): s.shape for s in spaces.slices if s.is_parameter}
    total = 0
    for key, shape in shapes.items():
        fixed = list(shape)
        for s in (s for s in spaces.slices if (s.tensor, s.user) == key):
            fixed[s.dim] = int((s.units == KEPT).sum())
        total += torch.Size(shape).numel() - torch.Size(fixed).numel()
    return total


def _clone_both_ways(row: dict[str, Any], network: nn.Module, shape: Sequence[int]) -> None:
    """Clone two classes of a small ResNet into the network, and two of the network into it, at half density."""
    small = prepared(resnet((shape[0], shape[1], shape[2]), N_CLASSES, 1, width=0.25), torch.randn(4, *shape))
    net = _cloned(small, network, shape, density=1.0)
    _cloned(network, small, shape, density=0.5)
    row["clone_runs"] = True
    _tried(row, "export", lambda: _export(row, net))


def _cloned(source: nn.Module, target: nn.Module, shape: Sequence[int], density: float) -> Composite:
    """Clone two classes, check every promise, and return the composite."""
    base, known = [[f"{role} {i}" for i in range(N_CLASSES)] for role in ("old", "new")]
    labels = [name for name in base for _ in range(_N_BASE)] + [name for name in known[:2] for _ in range(_N_NEW)]
    before = take_snapshot(target), take_snapshot(source)
    task = prepare_task(
        source,
        target,
        (torch.randn(len(labels), *shape), labels),
        classes=known[:2],
        source_classes=known,
        base_classes=base,
    )
    found = scan(task, max_cuts=_SCAN_CUTS)
    clone = fit(task, found.adapter(found.choose()), density=density, tune="none")  # tuning takes minutes
    x = torch.randn(3, *shape)
    net = attach(target, clone)
    with evaluating(target):
        expected, logits = pick_logits(target(x.clone())), net(x)
    assert same_bits(logits[:, :N_CLASSES].contiguous(), expected), "the base logits differ"
    with tempfile.TemporaryDirectory() as folder:
        save(clone, Path(folder) / "clone.safetensors")
        again = attach(target, load(Path(folder) / "clone.safetensors", source=source))
    removed = net.detach(clone.name)
    with torch.no_grad():
        assert same_bits(again(x), logits), "the clone from its file differs"
        assert same_bits(net(x), expected), "after removal the logits differ"
    for network, state in zip((target, source), before, strict=True):
        assert not differences(network, state), "a network was changed"
    return net.attach(removed)


def _export(row: dict[str, Any], net: Composite) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export(net, Path(folder) / "net.pt2")  # runs it, and compares
    row["export_ok"] = True


# ------------------------------------------------------------------------------------------------------------ results


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured."""
    n = len(rows)
    exact = [row for row in rows if row["exact"]]
    refused = [row for row in rows if not row["recorded"] and row["reason"].startswith("record: ")]
    seconds = [row["seconds"] for row in rows if row["recorded"]]
    weighed = [row for row in rows if row["memory_ratio"] is not None]
    large = [row["memory_ratio"] for row in weighed if row["megabytes"] >= LARGE]
    small = [row["memory_ratio"] * row["megabytes"] for row in weighed if row["megabytes"] < LARGE]
    shrinkable = [row for row in rows if row["shrunk_equals_masked"] is not None]
    found = [
        at_least("models", 200, n),
        at_least("share exact, or refused with the reason", 1, (len(exact) + len(refused)) / n),
        at_most("share refused", 0.02, len(refused) / n),
        at_least("share where clones run both ways", 0.97, sum(row["clone_runs"] for row in rows) / n),
        at_least("share of shrinkable models where shrunk equals masked",
                 1, sum(row["shrunk_equals_masked"] for row in shrinkable) / max(len(shrinkable), 1)),
        at_least("share where the network is as before", 1, sum(row["unchanged"] for row in rows) / n),
    ]  # fmt: skip
    if seconds:
        found.append(at_most("seconds to record and analyse, median", 0.3, statistics.median(seconds)))
        found.append(at_most("seconds to record and analyse, worst", 10, max(seconds)))
    if large:
        what = f"peak memory over the network's own, worst of those that take {LARGE} MB or more"
        found.append(at_most(what, MEMORY_RATIO, max(large)))
    if small:
        what = f"peak memory in MB, worst of those that take less than {LARGE} MB"
        found.append(at_most(what, MEMORY_RATIO * LARGE, max(small)))
    for name, share in SHARES.items():
        kept = [row["kept_at_half"] or 1.0 for row in rows if row["recorded"] and family(row["model"]) == name]
        if kept:
            words = f"share of parameters left with half of the channels, {name}, worst"
            found.append(at_most(words, share, max(kept)))
    return found


_LEGEND = f"""
Random weights, {N_CLASSES} classes, images of `size` x `size`.
`largest_gap`: share of the MACs without a cut point inside.
`exact`: the recorded graph, and its two parts at up to {N_CUTS} cuts, give the network's own bits,
{" or ".join(map(str, BATCHES))} images at a time.
`prunable_share`: share of the parameters after the first cut that can be removed, if the features may lose channels
too; `kept_at_half`: share that remains with every other channel removed; `shrunk_equals_masked`: to 1e-10 of the
largest output, in float64.
`clone_runs`: two classes cloned from a small ResNet, and into one; base logits keep their bits, removal is exact, also
from a file. `seconds`: of one processor, to record and to find cuts and channels; the shorter of {N_TIMED} runs.
`memory_ratio`: peak memory of that divided by what the network takes by itself, `megabytes` (weights and one forward
pass); below {LARGE} MB the interpreter needs more memory for the graph than the network.
""".strip()


def markdown(rows: Rows) -> str:
    """The rows as a table, and the meaning of its columns."""
    cells = [["" if row[column] is None else row[column] for column in COLUMNS] for row in rows]
    return f"{_LEGEND}\n\n{table(COLUMNS, cells)}"
