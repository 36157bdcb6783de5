"""What several `pnc bench` commands share: their options turned into a setting, and their last words."""

from collections.abc import Sequence
from pathlib import Path

from pnc.bench import position_strategies as positions_bench
from pnc.bench.result_files import Claim
from pnc.cli.arguments import (
    ModelOptions,
    check_different,
    check_input_shape,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    parse_support,
    read_device,
)
from pnc.cli.output import say
from pnc.data.image_set import sample_per_class
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError


def setting_of(
    source: str,
    target: str,
    data: str,
    support: str,
    flip: bool,
    out: Path,
    n_test: int | None = None,
    device: str = "cpu",
) -> positions_bench.Setting:
    """Check and load what the options of a comparison name; `out` is the file that its rows go to."""
    asked = ModelOptions("source", source, None, None, device), ModelOptions("target", target, None, None, device)
    check_different(*asked)
    check_trained(*asked)
    read_device(device)
    n_new, n_base = parse_support(support)
    if not n_new or not n_base:
        raise InputError(f"support: numbers of images above 0 of new and of base classes are needed; got {support!r}")
    check_outputs({"out": out}, [*(one.file for one in asked), data_file(data)])
    train, test = load_data(data, "train"), load_data(data, "test")
    test = test if n_test is None else sample_per_class(test, n_test, "first")
    models = [load_network(one, input_shape=train.input_shape) for one in asked]
    check_input_shape(train, *models)
    return positions_bench.Setting(models[0], models[1], train, test, n_new, n_base, flip)


def show_claims(claims: Sequence[Claim], written: Path) -> None:
    """Say of each claim whether it holds, and where the results lie."""
    for one in claims:
        spread = "" if one.spread is None else f" +- {one.spread:.3f}"
        value = f"{one.value:.3f}" if isinstance(one.value, float) else f"{one.value:,}"
        say(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {one.must}: {value}{spread}")
    say(f"{written}: written")
