"""Files of data sets, before they are opened; large files, before they take another's place."""

from __future__ import annotations

import errno
import os
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


def replace_synced(file: Path, place: Path) -> None:
    """Move a file to where an earlier one is, once it is on the disk: after a loss of power there
    is the earlier one or the whole new one."""
    _sync(file)
    file.replace(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems know no such thing of a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
