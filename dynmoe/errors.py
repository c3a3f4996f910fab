"""Problems the user can mend. A message names the key or file, what was expected, and the fix."""

from __future__ import annotations

import traceback


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


class Diverged(UserError):
    """A run whose loss or weights are no longer finite."""


REASON = 300  # characters of a reason that are shown: PyTorch names every weight that differs


def reason_of(error: BaseException) -> str:
    """The text of a library's error; of an assertion without one, the line that asserts."""
    text = " ".join(str(error).split())
    trace = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    return (text or (trace[-1].line if trace else "") or type(error).__name__)[:REASON]
