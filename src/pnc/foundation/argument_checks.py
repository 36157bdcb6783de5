"""Arguments of several functions checked: one clear error each."""

from torch import nn

from pnc.foundation.errors import InputError


def check_module(value: object, argument: str) -> None:
    """Refuse what is no network, such as the `LoadedModel` around one."""
    if not isinstance(value, nn.Module):
        hint = "; give its .module" if hasattr(value, "module") else ""
        raise InputError(f"{argument}: expected a torch.nn.Module, got {type(value).__name__}{hint}")


def check_whole(value: object, argument: str, least: int) -> None:
    """Refuse what is no whole number of 63 bits from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise InputError(f"{argument}: expected a whole number, at least {least}; got {value!r}")


def check_bound(value: object, argument: str) -> None:
    """Refuse a bound that is neither a number nor None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"{argument}: expected a number or None; got {value!r}")
