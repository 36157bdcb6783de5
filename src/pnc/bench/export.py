"""Exports of composites of three libraries, whole and in parts: differences, sizes, and time compared with PyTorch."""

import fnmatch
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.library_classifiers import CLASSIFIERS, N_CLASSES, build, check_libraries, prepared
from pnc.bench.result_files import Claim, at_least, at_most, commit, table
from pnc.clones.clone import Clone
from pnc.composite.composite import Composite, attach
from pnc.composite.export import Exported, export, export_split
from pnc.composite.onnx_composite import IMAGES, OnnxComposite, open_session
from pnc.composite.program_files import BATCH_SIZES, TOLERANCE, check_packages
from pnc.foundation.errors import InputError, PNCError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.graph.cut_points import INPUT
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import prepare_task
from pnc.models.model_specs import build_model

ZOO_SIZE = 32
"""Side of the images of networks of the zoo."""

DENSITIES = (0.5, 1.0)
"""Of the first and of a second clone."""

TIMED_BATCHES = (1, 16)
SECONDS = 3.0
"""Approximate time for the rounds of one pair and one batch size."""

MIN_ROUNDS, MAX_ROUNDS, N_WARM = 5, 200, 3
"""Rounds that count, and warm-up rounds."""

KEYS = ("pair",)
"""Fields that name a row."""

TORCH, FUSED, PT2, ONNX, SPLIT = "PyTorch", "fused", ".pt2", "ONNX", "split"
FORMS, EXPORTED = (TORCH, FUSED, PT2, ONNX, SPLIT), (ONNX, PT2, SPLIT)

_N_NEW, _N_BASE, _SCAN_CUTS = 6, 3, 4
_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Pair:
    """A target and the sources of its clones: names out of `library_classifiers`, or specs of the zoo."""

    target: str
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """Target and sources, for people."""
        return f"{self.target} <- {' + '.join(self.sources)}"

    @property
    def size(self) -> int:
        """Side of its images."""
        return CLASSIFIERS.get(self.target, ZOO_SIZE)


PAIRS = (
    Pair("zoo:resnet20", ("zoo:mobilenetv2",)),
    Pair("zoo:resnet20", ("zoo:vit_tiny",)),
    Pair("zoo:vit_tiny", ("zoo:resnet20",)),
    Pair("zoo:mobilenetv2", ("zoo:resnet20", "zoo:vit_tiny")),
    Pair("timm:resnet18", ("timm:mobilenetv3_small_050",)),
    Pair("timm:convnext_atto", ("timm:efficientnet_lite0",)),
    Pair("timm:deit_tiny_patch16_224", ("timm:resnet18", "timm:test_vit")),
    Pair("timm:vit_tiny_patch16_224", ("torchvision:resnet18",)),
    Pair("torchvision:resnet18", ("timm:vit_tiny_patch16_224",)),
    Pair("torchvision:swin_t", ("timm:mobilenetv4_conv_small",)),
    Pair("transformers:ResNet", ("transformers:ViT",)),
    Pair("transformers:ViT", ("transformers:ConvNext",)),
    Pair("transformers:Swinv2", ("transformers:RegNet", "torchvision:mobilenet_v2")),
)
"""Convolutional networks and transformers of all libraries, in all combinations; three pairs have two clones."""


def chosen(patterns: str | None) -> tuple[Pair, ...]:
    """Pairs whose names match a pattern such as `timm:*`; patterns are separated by commas, None gives all.

    Raises:
        InputError: a pattern matches nothing.
    """
    found: list[Pair] = []
    for pattern in ["*"] if patterns is None else patterns.split(","):
        matching = [pair for pair in PAIRS if fnmatch.fnmatch(pair.name, pattern.strip())]
        if not matching:
            raise InputError(f"pairs: {pattern.strip()!r} is none of the {len(PAIRS)} pairs, such as {PAIRS[0].name!r}")
        found += [pair for pair in matching if pair not in found]
    return tuple(found)


def bench(pairs: Sequence[Pair]) -> Bench:
    """Measure pairs out of `PAIRS`, one row each.

    Raises:
        InputError: a library cannot be imported; raised before the first row is made.
    """
    by_name = {pair.name: pair for pair in pairs}

    def make(cell: Row) -> Row:
        check_packages()
        check_libraries()
        return {**measure(by_name[cell["pair"]]), "commit": commit()}

    return Bench("export", KEYS, {}, one_by_one([{"pair": name} for name in by_name], make), claims, markdown)


def measure(pair: Pair) -> dict[str, Any]:
    """Measure one pair; `reason` in its row says what failed."""
    row: dict[str, Any] = {"pair": pair.name, "size": pair.size, "n_clones": len(pair.sources), "reason": ""}
    with warnings.catch_warnings(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")  # of the libraries
        torch.manual_seed(0)
        net = composite_of(pair)
        tensors = [*net.state_dict().values()]
        row["weights_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        row["target_cuts"] = [one.target_cut for one in net.status()]
        before, images = take_snapshot(net), torch.rand(max(TIMED_BATCHES), 3, pair.size, pair.size)
        with torch.no_grad():
            expected = net(images)
        made: dict[str, Exported] = {}
        works: Mapping[str, Callable[[], Exported]] = {
            ONNX: partial(export, net, Path(name) / "net.onnx"),
            PT2: partial(export, net, Path(name) / "net.pt2"),
            SPLIT: partial(export_split, net, Path(name) / "parts"),
        }
        for form, work in works.items():
            try:
                made[form] = work()
            except PNCError as error:
                row["reason"] += f"{form}: {error}. "
        row["difference"] = {form: one.difference for form, one in made.items()}
        row["bytes"] = {form: [path.stat().st_size for path in one.files] for form, one in made.items()}
        with torch.no_grad():
            row["unchanged"] = not differences(net, before) and torch.equal(net(images), expected)
        calls = _calls(net, made)
        row["comes_and_goes"] = SPLIT in calls and _comes_and_goes(made[SPLIT], images)
        row["ms"] = {str(batch): _times(calls, images[:batch]) for batch in TIMED_BATCHES}
    return row


def composite_of(pair: Pair) -> Composite:
    """Attach one clone of each source, with weights from torch's global random state.

    Each clone has two classes, and leaves the target after its input if such a position could be scored.
    """
    target, clones = _network(pair.target, pair.size), list[Clone]()
    for place, name in enumerate(pair.sources):
        known = [f"new {place} {index}" for index in range(N_CLASSES)]
        base = [f"old {index}" for index in range(N_CLASSES)]
        labels = [one for one in base for _ in range(_N_BASE)] + [one for one in known[:2] for _ in range(_N_NEW)]
        task = prepare_task(
            _network(name, pair.size),
            target,
            (torch.rand(len(labels), 3, pair.size, pair.size), labels),
            classes=known[:2],
            source_classes=known,
            base_classes=base,
        )
        found = scan(task, max_cuts=_SCAN_CUTS, exhaustive=True)
        inside = [one for one in found.positions if one.target_cut.name != INPUT]
        position = inside[0] if inside else found.positions[0]
        clones.append(fit(task, found.adapter(position), density=DENSITIES[place], tune="none"))
    return attach(target, *clones)


def _network(name: str, size: int) -> nn.Module:
    if not name.startswith("zoo:"):
        return build(name)[0]
    names = [str(index) for index in range(N_CLASSES)]
    made = build_model(name, names, (3, size, size), seed=int(torch.randint(1 << 30, ())))
    return prepared(made.module, torch.randn(4, 3, size, size))


def _options() -> Any:
    """Sessions with one thread, like PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _calls(net: Composite, made: Mapping[str, Exported]) -> dict[str, Callable[[Tensor], Any]]:
    """Functions to be timed, from images to logits."""
    found: dict[str, Callable[[Tensor], Any]] = {TORCH: net, FUSED: net.fused()}
    if PT2 in made:
        found[PT2] = torch.export.load(made[PT2].files[0]).module()
    if ONNX in made:
        session = open_session(made[ONNX].files[0], _CPU, _options())
        found[ONNX] = lambda images: session.run(None, {IMAGES: images.numpy()})
    if SPLIT in made:
        parts = OnnxComposite(*made[SPLIT].files, options=_options())
        found[SPLIT] = lambda images: parts(images.numpy())
    return found


def _times(calls: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Median milliseconds of every form; all run in turn, round after round.

    CPU time of this thread, which does all the work, so that other work on the machine does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    with torch.inference_mode():
        for number in range(N_WARM + MAX_ROUNDS):
            for name, call in calls.items():
                start = time.thread_time()
                call(images)
                times[name].append(time.thread_time() - start)
            if number + 1 >= N_WARM + MIN_ROUNDS and time.perf_counter() > end:
                break
    return {name: 1000 * median(seconds[N_WARM:]) for name, seconds in times.items()}


def _comes_and_goes(split: Exported, images: Tensor) -> bool:
    """Whether the first clone can be detached and attached again, and all logits keep their bits."""
    trunk, *clones = split.files
    parts, given = OnnxComposite(trunk, *clones), images.numpy()
    whole, n_base, n_first = parts(given), N_CLASSES, 2
    parts.detach(parts.clones[0])
    without = parts(given)
    parts.attach(clones[0])
    kept = [*range(n_base), *range(n_base + n_first, whole.shape[1])]
    order = [*kept, *range(n_base, n_base + n_first)]
    return np.array_equal(without, whole[:, kept]) and np.array_equal(parts(given), whole[:, order])


# ------------------------------------------------------------------------------------------------------------ results


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured."""
    n, tried = len(rows), ", ".join(map(str, BATCH_SIZES))
    found = [at_least("pairs", 10, n)]
    for form in EXPORTED:
        known = [row["difference"][form] for row in rows if form in row["difference"]]
        found.append(at_least(f"share of pairs exported, {form}", 1, len(known) / n))
        if known:
            what = f"largest difference of a logit over the largest logit at batch {tried}, {form}"
            found.append(at_most(what, TOLERANCE, max(known)))
    come_and_go = sum(row["comes_and_goes"] for row in rows) / n
    found.append(at_least("share where clones come and go in onnxruntime, same bits", 1, come_and_go))
    found.append(at_least("share where composite and target do not change", 1, sum(r["unchanged"] for r in rows) / n))
    return found


def markdown(rows: Rows) -> str:
    """The rows as two tables, and the meaning of their columns."""
    header = "target <- sources", "size", "weights", ONNX, PT2, "split: trunk + clones"
    sizes = [
        (
            row["pair"],
            row["size"],
            _mb(row["weights_bytes"]),
            *(_mb(*row["bytes"].get(form, ())) for form in EXPORTED),
            *(_difference(row, form) for form in EXPORTED),
        )
        for row in rows
    ]
    times = [
        (
            row["pair"],
            batch,
            *(row["ms"][str(batch)].get(form, "") for form in FORMS),
            next(iter(_gain(row, batch)), ""),
        )
        for row in rows
        for batch in TIMED_BATCHES
    ]
    gains = {batch: [gain for row in rows for gain in _gain(row, batch)] for batch in TIMED_BATCHES}
    said = " and ".join(f"{median(known):.2f} ({batch})" for batch, known in gains.items() if known)
    return "\n\n".join(
        [
            f"Random weights, images of `size` x `size`, two classes per clone; the first clone has density "
            f"{DENSITIES[0]:g}, a second one {DENSITIES[1]:g}. Sizes in MB; `weights`: of target and clones in memory. "
            "`diff.`: largest difference of a logit from the composite's over the largest logit (or 1).",
            table((*header, *(f"{form}, diff." for form in EXPORTED)), sizes),
            "Medians in milliseconds of one processor, all forms in turn, round after round, one thread each. "
            "`PyTorch`: the composite itself; `gain`: its time divided by that of the ONNX file. "
            f"Median gain over all pairs (images at a time): {said}.",
            table(("target <- sources", "images", *FORMS, "gain"), times),
            "\n".join(f"- {row['pair']}: {row['reason']}" for row in rows if row["reason"]),
        ]
    ).strip()


def _mb(*sizes: int) -> str:
    return " + ".join(f"{size / 1e6:.2f}" for size in sizes)


def _difference(row: Row, form: str) -> str:
    found = row["difference"].get(form)
    return "refused" if found is None else f"{found:.1g}"


def _gain(row: Row, batch: int) -> list[float]:
    """One number; none where there is no ONNX file."""
    times = row["ms"][str(batch)]
    return [times[TORCH] / times[ONNX]] if ONNX in times else []
