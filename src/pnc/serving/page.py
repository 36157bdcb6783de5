"""The page at `/`: one self-contained HTML file, and the headers that keep it so."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and its headers: a policy that lets only its own script and style run."""
    text = resources.files("pnc.serving").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_digest(text, element) for element in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


def _digest(text: str, element: str) -> str:
    found = re.search(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
