"""The report as one self-contained HTML page, without scripts, fonts or other files."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from pnc.clones.clone_file import inspect
from pnc.composite.composite import Composite, check_composite
from pnc.composite.evaluation import uncalibrated_warning
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import write_file
from pnc.report.confusion import confusion
from pnc.report.facts import Facts, collect_facts
from pnc.report.figures import (
    Draw,
    amount,
    check_drawing,
    draw_front,
    draw_networks,
    draw_reliability,
    draw_trade,
    networks_height,
    png_of,
    svg_of,
)


def write_report(
    net: Composite,
    data: Any,
    path: str | Path,
    *,
    files: Sequence[str | Path] = (),
    png: str | Path | None = None,
    batch_size: int = 64,
) -> None:
    """Measure a composite and write a report on it: one self-contained HTML page below 1 MB.

    It shows where the clones leave the target and enter their sources, to scale; the kept channels; confusion matrices
    before and after, with images; accuracy of each class, leak, calibration and costs; what was verified; and how to
    use the files. It needs the extra `report`.

    Args:
        net: As returned by `pnc.attach`, with at least one clone enabled.
        data: Held-out labelled images, as for `pnc.evaluate`.
        path: The file; an existing one is replaced.
        files: The files of the enabled clones, in order; the page shows their names and sizes.
        png: A folder for the pictures as PNG files too, created if missing; None for none.
        batch_size: Images per batch.
    Raises:
        InputError, ClassNameError: as `pnc.evaluate`; InputError also if a package is missing, the number of files
            differs from that of the clones, the path ends like another format, or a file cannot be written.

    >>> pnc.write_report(net, support, "report.html")  # doctest: +SKIP
    """
    check_report()
    check_page_path(path, "path")
    check_composite(net)
    needs_source = _checked_files(net.now().names, files)
    facts = collect_facts(net, data, files, batch_size)
    pictures = _pictures(facts)
    write_file(path, _rendered(facts, pictures, needs_source))
    if png is not None:
        Path(png).mkdir(exist_ok=True)
        for name, (draw, height, _) in pictures.items():
            write_file(Path(png) / f"{name}.png", png_of(draw, height))


def _checked_files(names: Sequence[str], files: Sequence[str | Path]) -> dict[str, bool]:
    """Check the files of the clones with these names; by file name, whether a file needs the source."""
    if files and len(files) != len(names):
        raise InputError(f"files: expected one for each of {len(names)} enabled clones, got {len(files)}")
    inside = [inspect(file) for file in files]
    held = [one["name"] for one in inside]
    if set(held) == set(names) and held != list(names):
        raise InputError(f"files: they hold {listed(held)}; give them in the order of the clones: {listed(names)}")
    return {Path(file).name: bool(one["needs_source"]) for file, one in zip(files, inside, strict=True)}


def check_page_path(path: str | Path, name: str) -> None:
    """Check, before any work, that the path of a report does not promise another format.

    Args:
        path: Of the report; one without a suffix is fine.
        name: Of the argument, for the error.
    Raises:
        InputError: the suffix is another one than .html or .htm.
    """
    path = Path(path)
    if path.suffix.lower() not in ("", ".html", ".htm"):
        page = path.with_suffix(".html")
        raise InputError(f"{name}: a report is a page of HTML, and {path.name} looks like another format; write {page}")


def check_report() -> None:
    """Check that a report can be made, before any work.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    check_drawing()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise InputError(f'report: {error.name} is needed for this; pip install "pnc[report]"') from error


def _pictures(facts: Facts) -> dict[str, tuple[Draw, float, str]]:
    """By name: how each picture is drawn, its height in inches and its label."""
    found: dict[str, tuple[Draw, float, str]] = {}
    for number, clone in enumerate(facts.clones, 1):
        says = f"The target and the source of clone {clone.name} to scale, and the parts that the clone uses"
        found[f"networks_{number}"] = (partial(draw_networks, clone=clone), networks_height(clone), says)
        if clone.front:
            says = f"Accuracy against cost of the candidates for clone {clone.name}"
            found[f"front_{number}"] = (partial(draw_front, clone=clone), 3.2, says)
    trade = partial(draw_trade, curve=facts.trade, now=facts.trade_now)
    found["leak"] = (trade, 3.2, "Leak of base classes against accuracy on new classes")
    reliability = partial(draw_reliability, reliabilities=facts.reliabilities)
    found["calibration"] = (reliability, 3.2, "Accuracy against confidence")
    return found


def _rendered(facts: Facts, pictures: dict[str, tuple[Draw, float, str]], files: Mapping[str, bool]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["amount"] = amount
    environment.filters["share"] = "{:.1%}".format
    template = environment.from_string(resources.files("pnc.report").joinpath("page.html.jinja").read_text("utf-8"))
    drawn = {name: Markup(svg_of(draw, height, label)) for name, (draw, height, label) in pictures.items()}
    own = [row.before for row in facts.class_rows if row.before is not None for _ in range(row.n_images)]
    return template.render(
        facts=facts,
        evaluation=facts.evaluation,
        own_accuracy=sum(own) / len(own),
        confusion=confusion(facts.answers),
        pictures=drawn,
        files=files,
        warning=uncalibrated_warning(facts.evaluation.uncalibrated),
        all_hold=all(held for _, held in facts.verified),
    )
