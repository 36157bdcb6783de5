"""Specs, `scheme:body?option=value`, which name data sets and networks on the command line."""

from pnc.foundation.errors import InputError


def split_spec(spec: str, argument: str) -> tuple[str, str, dict[str, str]]:
    """Split `SCHEME:BODY?key=value&key=value` into (scheme, body, options); the scheme is "" if there is none.

    Raises:
        InputError: an option has another form or is given twice.

    >>> split_spec("folder:photos?size=32", "spec")
    ('folder', 'photos', {'size': '32'})
    """
    head, _, query = spec.partition("?")
    scheme, colon, body = head.partition(":")
    if not colon:
        scheme, body = "", head
    options: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key or not value or key in options:
            raise InputError(f"{argument}: {item!r} in {spec!r} must be an option of the form key=value, given once")
        options[key] = value
    return scheme, body, options
