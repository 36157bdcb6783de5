"""Requests that are refused: the HTTP status and one line that says why."""

from pnc.foundation.errors import ClassNameError, MismatchError, PNCError

BAD_TOKEN, NO_ADMINISTRATION, UNKNOWN, TOO_SLOW, CONFLICT = 401, 403, 404, 408, 409
TOO_LARGE, OTHER_TYPE, UNUSABLE, TOO_MANY, BUSY = 413, 415, 422, 429, 503


class Refusal(PNCError):
    """A request that the server refuses.

    Args:
        status: HTTP status.
        message: One line for the client.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def status_of(error: PNCError) -> int:
    """The HTTP status of an error of the library: 409 if something does not belong together, otherwise 422."""
    if isinstance(error, Refusal):
        return error.status
    return CONFLICT if isinstance(error, MismatchError | ClassNameError) else UNUSABLE
