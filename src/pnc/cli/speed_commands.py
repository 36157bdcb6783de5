"""The command `pnc bench speed`."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import latency
from pnc.bench import speed as speed_bench
from pnc.bench.result_files import Cells, write_results
from pnc.cli.arguments import check_outputs, use_threads
from pnc.cli.bench_options import setting_of, show_claims
from pnc.cli.options import Device
from pnc.cli.output import progress
from pnc.foundation.errors import InputError


def measure_speed(
    source: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that knows the new classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...; for the jobs.", min=1)] = 1,
    parts: Annotated[str, typer.Option(help="What to measure: latency (with what attaching costs), job.")] = (
        "latency,job"
    ),
    layouts: Annotated[
        str, typer.Option(help="Of latency, beside eager networks as they are: channels_last, compiled.")
    ] = "channels_last,compiled",
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the table goes beside it.")] = Path(
        "results/speed.json"
    ),
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Time to make a clone, to run it and to attach it, beside whole networks, the paper's search and fine-tuning.

    Takes a quarter of an hour, half of it the paper's search; what was measured already is not measured again. The
    machine should have nothing else to do.
    """
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    check_outputs(dict(outputs))
    chosen = _chosen("parts", parts, ("latency", "job"))
    others = _chosen("layouts", layouts, latency.LAYOUTS[1:])
    setting = setting_of(source, target, data, support, flip, outputs[".jsonl"], device=device)
    facts = {"source": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(outputs[".jsonl"], {**facts, "threads": threads, "device": device}, speed_bench.KEYS)
    wanted = [*chosen, "life"] if "latency" in chosen else chosen
    with use_threads(threads), progress() as bar:
        rows = speed_bench.run(setting, wanted, [latency.LAYOUTS[0], *others], range(seeds), cells, bar.step)
        command = (
            f"pnc bench speed --source {source} --target {target} --data {data_name or data} --support {support} "
            f"--{'' if flip else 'no-'}flip --seeds {seeds} --parts {parts} --layouts '{layouts}' "
            f"--device {device} --threads {threads}"
        )
        found = speed_bench.claims(rows)
        text = speed_bench.markdown(rows, setting, data_name or data)
        write_results(json_path.parent, json_path.stem, command, {**facts, "rows": rows}, found, text, setting.device)
    show_claims(found, outputs[".md"])


def _chosen(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Names out of `known`, separated by commas, none twice."""
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [one for one in chosen if one not in known]
    if unknown:
        raise InputError(f"{name}: expected some of {', '.join(known)}, separated by commas; got {unknown[0]!r}")
    return chosen
