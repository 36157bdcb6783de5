"""Values formatted as text for people."""

import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 80
MAX_NAMES = 8


def facts_text(title: str, facts: Mapping[str, str]) -> str:
    """A title, followed by one line for each name and value; long values are wrapped.

    >>> print(facts_text("Clone", {"name": "cats", "density": "0.5"}))
    Clone
      name     cats
      density  0.5
    """
    width = max(map(len, facts), default=0) + 4
    lines = [title]
    for name, value in facts.items():
        first, *more = textwrap.wrap(value, max(WIDTH - width, 20), break_long_words=False) or [""]
        lines.append(f"  {name}".ljust(width) + first)
        lines += [" " * width + line for line in more]
    return "\n".join(lines)


def counted(number: int, plural: str) -> str:
    """A number of things; one thing in the singular, if its name is one word.

    >>> counted(1, "hooks"), counted(1200, "hooks")
    ('1 hook', '1,200 hooks')
    """
    return f"{number:,} {plural.removesuffix('s') if number == 1 and ' ' not in plural else plural}"


def few_names(names: Sequence[str], limit: int = MAX_NAMES) -> str:
    """The first names, and the total number if some are left out.

    >>> few_names(["a", "b", "c"], 2)
    'a, b, ... (3)'
    """
    return ", ".join(names) if len(names) <= limit else f"{', '.join(names[:limit])}, ... ({len(names)})"
