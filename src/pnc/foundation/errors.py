"""Every error that `pnc` raises on purpose: each names the argument, what was expected, what came, and the way out."""


class PNCError(Exception):
    """Base of all errors of this package; the command line turns one into one line and exit code 2."""


class InputError(PNCError, ValueError):
    """An argument has a value that the function cannot take."""


class ClassNameError(PNCError, ValueError):
    """A class name is unknown, missing, given twice, or clashes with another one."""


class RecordingError(PNCError, RuntimeError):
    """A network cannot be recorded exactly; the message says which operation stands in the way."""


class FileFormatError(PNCError, ValueError):
    """A file is damaged, not of the expected format, or of a newer version of it."""


class MismatchError(PNCError, ValueError):
    """A clone, a network and its weights do not belong together."""


class PNCWarning(UserWarning):
    """Something that a caller should know and that stops nothing; the command line turns one into one line."""


class ExportError(PNCError, RuntimeError):
    """A composite cannot be exported, or what was exported does not give its logits; nothing was written."""
