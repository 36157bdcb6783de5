"""Speed of making, running and attaching clones, compared in one run, with the required figures."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from pnc.bench import job_times, latency
from pnc.bench.bench import Bench, Rows
from pnc.bench.job_times import CLOSED, GATES, SEARCH, SEQUENTIAL, TUNED
from pnc.bench.latency import ALIGNED, ALIGNED_SINGLES, LARGE, PLUMBING, WHOLE, several
from pnc.bench.result_files import Cells, Claim, at_most, over_seeds, table
from pnc.bench.setting import Setting
from pnc.method.task import Progress

PARTS = ("latency", "life", "job")
KEYS = ("part", "case", "form")
MACS_AT_HALF = 0.755
"""Bound on a composite's multiply-accumulates at density .5, as a share of both networks': density counts what can be
removed, and some channels cannot."""
MOST_PASSES = 4
"""Bound on the work of the closed form, in passes of the support through both networks; one is the least."""


def bench(
    setting: Setting, parts: Sequence[str], layouts: Sequence[str], seeds: range, threads: int, device: str
) -> Bench:
    """Measure some parts of the bench.

    Args:
        setting: Networks and images.
        parts: Out of `PARTS`; latency and life go together.
        layouts: Out of `latency.LAYOUTS`, including the first.
        seeds: Of the jobs; latency is measured with clones of the first seed.
        threads: Of torch; rows depend on it, and on the device.
        device: Where both networks are, as named on the command line.
    """

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        if "latency" in parts or "life" in parts:
            latency.run(setting, seeds[0], layouts, cells, progress)
        if "job" in parts:
            job_times.run(setting, seeds, cells, progress)
        return [row for row in cells.rows if row["part"] in parts]

    settings, text = {**setting.facts, "threads": threads, "device": device}, partial(markdown, setting=setting)
    facts = lambda rows: {**setting.facts, "rows": rows}  # noqa: E731
    return Bench("speed", KEYS, settings, measure, claims, text, facts, setting.device)


# ------------------------------------------------------------------------------------------------------------- claims


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured, as far as it was measured."""
    return [*_job_claims(rows), *_latency_claims(rows), *_life_claims(rows)]


def _job_claims(rows: Rows) -> list[Claim]:
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["part"] == "job":
            seconds.setdefault(row["form"], {})[row["case"]] = row["seconds"]
    asked = [
        (CLOSED, SEQUENTIAL, 10, "closed form faster than the sequential reference, times"),
        (CLOSED, SEARCH, 5, "closed form faster than fine-tuning with replay and the search of its settings, times"),
        (GATES, SEQUENTIAL, 3, "gates at density .5 faster than the sequential reference, times"),
    ]
    found = []
    for form, other, bound, words in asked:
        both = sorted(seconds.get(form, {}).keys() & seconds.get(other, {}).keys())
        if both:
            found.append(over_seeds(words, ">=", bound, [seconds[other][c] / seconds[form][c] for c in both]))
    ratios = [row["n_macs"] / row["once_macs"] for row in rows if row["part"] == "job" and row["form"] == CLOSED]
    if ratios:
        words = "closed form: multiply-accumulates over those of the support through both networks once"
        found.append(at_most(words, MOST_PASSES, max(ratios)))
    return found


def _latency_claims(rows: Rows) -> list[Claim]:
    made = {(row["case"], row["form"]): row for row in rows if row["part"] == "latency" and "skipped" not in row}
    found: list[Claim] = []
    for batch, bound in ((1, 0.15), (64, 0.05)):
        case, many = f"one clone, batch {batch}", f"many clones, batch {batch}"
        for suffix in ("", ", fused"):
            kind = f"composite{suffix}"
            for density in ("0.5", ALIGNED):
                half = made.get((case, f"density {density}{suffix}"))
                if half:
                    words = f"{kind} at density {density}, batch {batch}: latency as a share of target + source"
                    found.append(at_most(words, 0.85, half["of_whole"]))
                    share = half["n_macs"] / made[case, WHOLE]["n_macs"]
                    words = f"{kind} at density {density}, batch {batch}: MACs, likewise"
                    found.append(at_most(words, MACS_AT_HALF, share))
            for form in ("16 clones", f"16 clones, {ALIGNED_SINGLES}"):
                all_of_them = made.get((many, form + suffix))
                if all_of_them:
                    words = f"{kind} of {form}, at density .3, batch {batch}"
                    share = all_of_them["of_whole"]
                    found.append(at_most(f"{words}: latency as a share of target + 16 sources", 0.4, share))
                    share = all_of_them["n_macs"] / made[many, several(16)]["n_macs"]
                    found.append(at_most(f"{words}: MACs, likewise", 0.4, share))
        if (case, PLUMBING) in made:
            words = f"plumbing at batch {batch}, as a share of the target's latency"
            found.append(at_most(words, bound, made[case, PLUMBING]["of_target"] - 1))
    return found


def _life_claims(rows: Rows) -> list[Claim]:
    asked = [("attach, a further clone", 50), ("detach", 50), ("fingerprint", 300)]
    made = {row["form"]: row for row in rows if row["part"] == "life" and row["case"] == LARGE and "skipped" not in row}
    return [
        at_most(f"{form} at a ResNet-50 at 224x224, ms", most, made[form]["median_ms"]) for form, most in asked if made
    ]


# ------------------------------------------------------------------------------------------------------------- tables


def markdown(rows: Rows, setting: Setting) -> str:
    """Tables of all parts."""
    lines = [f"{setting.words}. Source `{setting.source.spec}`, target `{setting.target.spec}`."]
    job = [row for row in rows if row["part"] == "job"]
    if job:
        lines += ["", "## Making", "", _table(("form", "case", "seconds", "n_macs", "peak_bytes", "estimated"), job)]
        lines += ["", _MAKING, *_least(job)]
    speed = [row for row in rows if row["part"] == "latency"]
    if speed:
        lines += ["", "## Running", "", _RUNNING]
    for case in dict.fromkeys(row["case"] for row in speed):
        mine = [row for row in speed if row["case"] == case]
        lines += ["", f"### {case}", ""]
        if "skipped" in mine[0]:
            lines.append(f"Not measured: {mine[0]['skipped']}")
        else:
            lines.append(_table((*_SPREAD, "images_per_second", "of_target", "of_whole", "n_macs", "peak_bytes"), mine))
    life = [row for row in rows if row["part"] == "life"]
    if life:
        lines += ["", "## Coming and going", "", _LIFE, "", _table(("case", *_SPREAD, "skipped"), life)]
    return "\n".join(lines)


def _least(job: Rows) -> list[str]:
    """The least work for a clone: one pass of the support through both networks, compared with fine-tuning."""
    once = [row["once_macs"] for row in job if row["form"] == CLOSED]
    tuned = [row["n_macs"] for row in job if row["form"] == TUNED]
    if not once or not tuned:
        return []
    ratio = fmean(tuned) / fmean(once)
    return [
        "",
        f"One pass of the support through both networks, the least that a clone needs, takes {fmean(once):.3g} "
        f"multiply-accumulates; one fine-tuning takes {ratio:.1f} times as many. `{CLOSED}` also runs the rest of the "
        "source for each position that it scores.",
    ]


_SPREAD = ("form", "median_ms", "lower_ms", "upper_ms")


def _table(keys: Sequence[str], rows: Rows) -> str:
    return table(keys, [[row.get(key, "") for key in keys] for row in rows])


_MAKING = (
    "Seconds from two loaded networks and the support: recording, scanning all positions, fitting. "
    f"`{SEARCH}`: all trainings of the search and the final one; `{TUNED}`: the final one alone. "
    f"`{job_times.SCRATCH}`: a network like the source, on all training images of its classes, estimated as the "
    "time of a step times the steps of `pnc pretrain`. `n_macs`: multiply-accumulates of the whole job, "
    "including backward passes, according to torch's counter. `peak_bytes`: peak growth of the process in another run, "
    "except for the two longest forms."
)
_RUNNING = (
    "Milliseconds for one batch: median and quartiles over rounds in which all forms of a case run in turn. "
    "`of_target`, `of_whole`: medians of the ratios within a round, to the target alone, and to "
    f"`{WHOLE}` or the target with as many whole sources. `n_macs`: multiply-accumulates executed for one image, "
    "according to torch's counter. `peak_bytes`: peak growth of the process. Channels were chosen by one-shot scores, "
    "at the position that the scan chooses by default; several clones have one class each, at density .3. "
    f"`{PLUMBING}`: from the last cut of the target, through a network of an eighth of the width."
)
_LIFE = f"Milliseconds; `{LARGE}` takes images of 224x224; it and the clone attached to it have random weights."
