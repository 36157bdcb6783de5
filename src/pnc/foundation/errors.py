"""Every error that `pnc` raises on purpose: each names the argument, what was expected, what it got, and a way out."""


class PNCError(Exception):
    """Base of all errors of this package; the command line prints it as one line and exits with code 2."""


class InputError(PNCError, ValueError):
    """An argument has a value that the function does not accept."""


class ClassNameError(PNCError, ValueError):
    """A class name is unknown, missing, given twice, or clashes with another one."""


class RecordingError(PNCError, RuntimeError):
    """A network cannot be recorded exactly; the message names the operation that prevents it."""


class FileFormatError(PNCError, ValueError):
    """A file is damaged, in another format, or written by a newer version."""


class MismatchError(PNCError, ValueError):
    """A clone, a network and its weights do not belong together."""


class PNCWarning(UserWarning):
    """Something that the caller should know but that stops nothing; the command line prints it as one line."""


class ExportError(PNCError, RuntimeError):
    """A composite cannot be exported, or the exported program does not reproduce its logits; no file was written."""


class ServerError(PNCError, RuntimeError):
    """A server of clones cannot be reached, or cannot answer now."""
