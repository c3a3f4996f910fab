"""Problems the user can mend. A message names the key or file, what was expected, and the fix."""

from __future__ import annotations


class UserError(Exception):
    """Refused input. The command line prints the message and exits with 2, without a traceback."""

    def __init__(self, message: str = "") -> None:
        # PyTorch raises the error of a loader's worker again, with its traceback as the message
        # (torch/_utils.py, ExceptionWrapper): only what was said is kept.
        if "\nOriginal Traceback" in message:
            message = message.rpartition(f"{type(self).__qualname__}: ")[2].rstrip()
        super().__init__(message)


class ConfigError(UserError):
    """The configuration cannot run: unknown keys, wrong types, impossible combinations."""


class DataError(UserError):
    """The data on disk are not what the data set's layout asks for."""
