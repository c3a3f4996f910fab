"""Problems the user can mend. A message names the key or file, what was expected, and the fix."""

from __future__ import annotations

# After Ctrl-C.
STOPPED = "stopped. The same command goes on from the last evaluation."


class UserError(Exception):
    """Refused input. The command line prints the message and exits with 2, without a traceback."""


class ConfigError(UserError):
    """The configuration cannot run: unknown keys, wrong types, impossible combinations."""


class DataError(UserError):
    """The data on disk are not what the data set's layout asks for."""


class Diverged(UserError):
    """A run whose loss or weights are no longer finite."""
