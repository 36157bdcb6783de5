"""Checks of arguments that several functions share: one clear error each."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import nn

from pnc.foundation.errors import InputError

MAX_THREADS = 1024
"""More than any machine can use; torch fails in many ways if asked for millions."""


def check_module(value: object, argument: str) -> None:
    """Raise an `InputError` unless `value` is a network; a `LoadedModel`, for example, only wraps one."""
    if not isinstance(value, nn.Module):
        hint = "; give its .module" if hasattr(value, "module") else ""
        hint = "; load a state dict into its network, and give that" if isinstance(value, Mapping) else hint
        raise InputError(f"{argument}: expected a torch.nn.Module, got {type(value).__name__}{hint}")


def check_whole(value: object, argument: str, least: int) -> None:
    """Raise an `InputError` unless `value` is a whole number from `least` to 2**63 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        most = " and below 2**63" if isinstance(value, int) and value >= 2**63 else ""
        raise InputError(f"{argument}: expected a whole number, at least {least}{most}; got {came(value)}")


def check_share(value: object, argument: str, of: str, or_else: str = "") -> None:
    """Raise an `InputError` unless `value` is a number in (0, 1]; the message recognizes percentages.

    Args:
        value: The value given.
        argument: Its name.
        of: What it is a share of, for the message.
        or_else: Other values that the argument may have, for the message: " or 'auto'".
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:  # type: ignore[operator]  # false for NaN
        return
    percent = is_number and not _is_huge(value) and 1.5 <= value <= 100  # type: ignore[operator]
    hint = f" (percent? write {value / 100:g})" if percent else ""  # type: ignore[operator]
    hint = hint if is_number or value is None else f" (write a Python number, not {type(value).__name__})"
    raise InputError(f"{argument}: expected a share of {of}, above 0 and at most 1{or_else}; got {came(value)}{hint}")


def check_flag(value: object, argument: str) -> None:
    """Raise an `InputError` unless `value` is True or False: 0.5 and "no" would count as True."""
    if not isinstance(value, bool):
        raise InputError(f"{argument}: expected True or False; got {came(value)}")


def check_choice(value: object, argument: str, choices: Sequence[str]) -> None:
    """Raise an `InputError` unless `value` is one of `choices`; the message suggests the most similar one."""
    if isinstance(value, str) and value in choices:
        return
    close = difflib.get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(f"{argument}: expected one of {', '.join(choices)}; got {came(value)}{hint}")


def check_finite(value: object, argument: str) -> None:
    """Raise an `InputError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or _is_huge(value) or not math.isfinite(value):
        raise InputError(f"{argument}: expected a finite number; got {came(value)}")


def usable_device(name: object) -> torch.device:
    """Return the device `name` if it can be used here.

    Raises:
        InputError: it cannot; the message gives torch's name for it, if it has one.
    """
    try:
        device: torch.device = torch.device(name)  # type: ignore[call-overload]
        torch.zeros(1, device=device).item()  # "meta" fails only here
    except (RuntimeError, AssertionError, TypeError) as error:  # what torch raises for missing devices
        reason, called = str(error).splitlines()[0], _DEVICES.get(str(name).lower())
        reason = reason if called is None else f"torch calls it {called}"
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(f"device: {name!r} cannot be used here ({reason}); try {there}") from error
    return device


_DEVICES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "metal": "mps", "apple": "mps"}


def came(value: object) -> str:
    """Describe a value for a message: on one line, and short."""
    return "a number of hundreds of digits" if _is_huge(value) else " ".join(f"{value!r:.100}".split())


def _is_huge(value: object) -> TypeGuard[int]:
    """Whether it is an integer too large for a float, and perhaps for text: Python prints at most 4300 digits."""
    return isinstance(value, int) and value.bit_length() > 1000
