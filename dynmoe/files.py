"""Files of data sets, before they are opened."""

from __future__ import annotations

import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """Look that a path is a file: opening a pipe would wait for a writer without end.

    Raises:
        OSError: it is not there, cannot be reached, or is something else.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(0, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is a pipe or a device, not a file")
