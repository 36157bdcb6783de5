"""Translation of the library's error messages: names of arguments become options."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import typer.core

from pnc.foundation.errors import PNCError

_ELSEWHERE = {"base_classes": "target_classes", "json": "json_path", "input-shape": "input_shape", "spec": "data"}
"""Arguments of the library, and first words of messages, that have another name as options."""


class Commands(typer.core.TyperGroup):
    """A group of commands whose error messages name options instead of arguments."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and rewrite errors of the library."""
        try:
            return super().invoke(ctx)
        except PNCError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand) if ctx.invoked_subcommand else None
            if command is None or isinstance(command, Commands):
                raise
            raise type(error)(as_options(str(error), options_of(command.params))) from error


def options_of(parameters: Iterable[Any]) -> dict[str, str]:
    """The options of a command by parameter name, without its positional arguments."""
    return {one.name: one.opts[0] for one in parameters if one.opts[0].startswith("--")}


def as_options(message: str, options: Mapping[str, str]) -> str:
    """Replace arguments in a message by options.

    The first word becomes an option, or the first two words if they are a role and its property ("source: classes"); so
    does every later `argument=`.

    Args:
        message: An error message of the library.
        options: Options by parameter name.

    >>> as_options("max_macs=0.1: the cheapest adds more", {"max_macs": "--max-macs"})
    '--max-macs 0.1: the cheapest adds more'
    >>> as_options("max_macs: expected a share, or None; got 2", {"max_macs": "--max-macs"})
    '--max-macs: expected a share; got 2'
    >>> as_options("source: classes: 4 is given twice", {"source": "--source", "source_classes": "--source-classes"})
    '--source-classes: 4 is given twice'
    """
    start = re.match(r"(?P<role>[a-z]+): (?P<what>[a-z_]+)(?=: )", message)
    role = ""
    if start and (own := _own_option(start["role"], start["what"], options)):
        message, role = own + message[start.end() :], start["role"]
    elif found := re.match(r"([a-z_-]+)(?=[:=]|'s | has | names | must )", message):
        option = _option(found[1], options)
        role = found[1] if f"{found[1]}_classes" in options else ""
        if option and (message[found.end()] in ":=" or "_" in found[1]):
            message = option + message[found.end() :]

    def renamed(found: re.Match[str]) -> str:
        option = options.get(f"{role}_{found[1]}") or _option(found[1], options)
        return f"{option}{' ' if found[2] else ''}{found[2]}" if option else found[0]

    message = message.replace(", or None; got ", "; got ").removesuffix(", or None")  # leave the option out instead
    if "allow_mismatch" not in options:
        message = re.sub(r",? or (?:set|give) allow_mismatch=True to \w+ \w+(?: anyway)?", "", message)
    return re.sub(r"(?<![\w?&-])-{0,2}([a-z_-]+)=([^\s,;:)]*)", renamed, message)


def _option(name: str, options: Mapping[str, str]) -> str | None:
    key = _ELSEWHERE.get(name, name)
    return options.get(key) or options.get(key.replace("-", "_"))


def _own_option(role: str, what: str, options: Mapping[str, str]) -> str | None:
    """The option for a property of a network, such as its classes; one network alone needs no role in it."""
    alone = role == "model" or role not in options
    return options.get(f"{role}_{what}") or (options.get(what) if alone else None)
