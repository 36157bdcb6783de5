"""Claims and tables of the bench of servers, from its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pnc.bench.bench import Row, Rows
from pnc.bench.result_files import Claim, at_least, at_most, table
from pnc.bench.setting import Setting

ALONE, CLONES, WHOLE = "target alone", "4 clones", "5 networks"
N_CLONES, CHUNK_CYCLES, CHURN_CONNECTIONS = 4, 50, 8


@dataclass(frozen=True)
class Wanted:
    """How much is measured.

    Attributes:
        rounds: In each, every server is asked for `seconds`.
        seconds: Of each load.
        connections: Clients at a time.
        cycles: How often a clone is attached and detached.
        uploads: Mutated ones.
        batch: Images that a server computes at a time; with half the connections, one half is computed while the
            other is read.
        wait_ms: Time that an image waits for others.
        max_macs: Bound on the multiply-accumulates of each clone, as a share of the source's.
    """

    rounds: int = 10
    seconds: float = 5.0
    connections: int = 32
    cycles: int = 1000
    uploads: int = 10_000
    batch: int = 16
    wait_ms: float = 5.0
    max_macs: float = 0.25


def claims(rows: Rows) -> list[Claim]:
    """Required figures, as far as they were measured."""
    found: list[Claim] = []
    by_case = {case: _of(rows, "throughput", case) for case in (ALONE, CLONES, WHOLE)}
    if by_case[WHOLE]:
        batch = min(median(row["mean_batch"] for row in one) for one in by_case.values())
        found += [
            at_least("throughput with 4 clones, share of the target's", 0.8, _ratio(by_case[CLONES], by_case[ALONE])),
            at_least("throughput with 4 clones over that of 5 networks", 3, _ratio(by_case[CLONES], by_case[WHOLE])),
            at_least("mean batch of each server", 16, batch),
            at_most("failed requests at full load", 0, sum(row["failed"] for one in by_case.values() for row in one)),
        ]  # fmt: skip
    same = _of(rows, "same")
    if same:
        found.append(
            at_most("answers that differ from the fused form's in Python", 0, sum(row["different"] for row in same))
        )
    churn = _of(rows, "churn")
    if churn:
        found += [
            at_least("cycles of attaching and detaching", 1000, sum(row["cycles"] for row in churn)),
            at_least("requests meanwhile", 50_000, sum(row["n_answers"] for row in churn)),
            at_most("failed answers meanwhile", 0, sum(row["failed"] for row in churn)),
            at_most("mixed answers meanwhile", 0, sum(row["mixed"] for row in churn)),
            at_most("growth of the server's memory meanwhile", 0.05, memory_growth(churn)),
        ]
    uploads = _of(rows, "uploads")
    if uploads:
        found += [
            at_least("mutated uploads", 10_000, sum(row["n"] for row in uploads)),
            at_most("answers 5xx to them, except 503", 0, sum(row["errors"] for row in uploads)),
            at_most(
                "uploads that hang or lose their connection", 0, sum(row["hangs"] + row["lost"] for row in uploads)
            ),
        ]
    return found


def _of(rows: Rows, part: str, case: str | None = None) -> list[Row]:
    return [row for row in rows if row["part"] == part and case in (None, row["case"])]


def _ratio(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """The median over rounds of the ratio of both rates: one noisy round does not decide."""
    by_round = {row["round"]: row["per_second"] for row in others}
    return float(median(row["per_second"] / max(by_round[row["round"]], 1e-9) for row in rows))


def memory_growth(churn: Sequence[Row]) -> float:
    """The largest growth of a server's memory after its first chunk, as a share of what it had then."""
    found: list[float] = [0.0]
    for process in {row["process"] for row in churn}:
        first, *others = [row["memory"] for row in churn if row["process"] == process]
        found += [other / first - 1 for other in others]
    return max(found)


def markdown(rows: Rows, setting: Setting, wanted: Wanted) -> str:
    """The rows as tables, with explanations."""
    lines = [
        f"{setting.words}. Source `{setting.source.spec}`, target `{setting.target.spec}`; each of {N_CLONES} clones "
        f"is of one class, made in closed form, and may add {wanted.max_macs:g} of the source's multiply-accumulates.",
    ]  # fmt: skip
    cases = [(case, _of(rows, "throughput", case)) for case in (ALONE, CLONES, WHOLE)]
    if cases[-1][1]:
        columns = ("per_second", "p50_ms", "p99_ms", "mean_batch", "cpu_ms")
        lines += [
            "",
            "## Throughput",
            "",
            f"Medians over {wanted.rounds} rounds; in each, every server is asked for {wanted.seconds:g} s by "
            f"{wanted.connections} connections, one after the other. Each is `pnc serve` with one thread for the "
            f"network, `--batch {wanted.batch}` and `--wait-ms {wanted.wait_ms:g}`; `{WHOLE}`: the same server with "
            "the target and four whole sources. With more connections than fit into a batch, a server reads the next "
            "images while it computes. The load comes from another process on the same machine. One image in each "
            "request, as PNG. `cpu_ms`: processor time of the whole server for one image, which other work changes "
            "less than images per second.",
            "",
            table(
                ("server", *columns),
                [[case, *(median(row[key] for row in one) for key in columns)] for case, one in cases],
            ),
        ]  # fmt: skip
    same = _of(rows, "same")
    if same:
        lines += [
            "",
            "## Answers",
            "",
            "Probabilities over HTTP compared with those of `net.fused()` in another process, for the same images in "
            "the same batch. `different`: images for which any bit differs.",
            "",
            table(
                ("case", "images", "different", "largest difference"),
                [[row["case"], row["n_images"], row["different"], row["largest_difference"]] for row in same],
            ),
        ]
    lines += _churn_lines(_of(rows, "churn")) + _upload_lines(_of(rows, "uploads"))
    return "\n".join(lines)


def _churn_lines(churn: Sequence[Row]) -> list[str]:
    if not churn:
        return []
    sets: dict[str, int] = {}
    for row in churn:
        for name, count in row["sets"].items():
            sets[name] = sets.get(name, 0) + count
    memory = ", ".join(f"{row['memory'] / 2**20:.0f}" for row in churn)
    return [
        "",
        "## Clones that come and go",
        "",
        f"A clone is attached and detached over HTTP, {sum(row['cycles'] for row in churn):,} times, while "
        f"{CHURN_CONNECTIONS} connections ask as fast as they can: {sum(row['n_answers'] for row in churn):,} answers "
        f"({'; '.join(f'{count:,} of {name}' for name, count in sets.items())}). Each is compared with the "
        f"probabilities of the set that it names. 99% came within {max(row['p99_ms'] for row in churn):.0f} ms in "
        f"every chunk. Memory of the server after each {CHUNK_CYCLES} cycles, MiB: {memory}.",
    ]


def _upload_lines(uploads: Sequence[Row]) -> list[str]:
    if not uploads:
        return []
    counts: dict[str, int] = {}
    for row in uploads:
        for name, count in row["statuses"].items():
            counts[name] = counts.get(name, 0) + count
    return [
        "",
        "## Mutated uploads",
        "",
        "Images of seven formats, forms, JSON and clone files with flipped bits, bytes moved or cut off, and forged "
        "headers. Answers by kind and status: "
        + ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))
        + f". The slowest took {max(row['longest_s'] for row in uploads):.2f} s.",
    ]
