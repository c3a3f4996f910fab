"""Objects of a configuration: Hydra's `instantiate`, with errors that name the node."""

from __future__ import annotations

import os
import re
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from dynmoe.errors import REASON, ConfigError, UserError, reason_of


def make(node: Any, key: str = "configuration", /, **arguments: Any) -> Any:
    """`instantiate(node, **arguments)`; `key` is the node's place, where it has left it.

    Raises:
        UserError: as the target raised it, without Hydra's wrapping.
        ConfigError: the target does not take the values of its node.
    """
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        raise _refused(error, key) from error


def _refused(error: InstantiationException, key: str) -> Exception:
    cause: BaseException | None = error
    lines: list[str] = []
    while isinstance(cause, InstantiationException):
        lines, cause = str(cause).splitlines(), cause.__cause__
    if isinstance(cause, UserError):
        return cause
    if os.environ.get("HYDRA_FULL_ERROR"):
        return error
    found = [line.partition("full_key: ")[2] for line in lines if "full_key: " in line]
    place = found[-1] if found else key
    if place.startswith(key):  # NOTE: Hydra writes the first element of the list a.b as a.b0.
        place = f"{key}.{place.removeprefix(key).lstrip('.')}".rstrip(".")
    target = re.search(r"'([\w.]+)'", lines[0])
    reason = " ".join(lines[1:])[:REASON] if cause is None else reason_of(cause)
    return ConfigError(
        f"{place}: {target[1] if target else 'its target'} does "
        f"not take these values: {reason} (HYDRA_FULL_ERROR=1 shows where)"
    )
