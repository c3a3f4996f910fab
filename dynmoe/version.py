"""The version of this code: the package's, with the commit where it is known."""

from __future__ import annotations

import json
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import dynmoe

DIGITS = 12  # of a commit


@lru_cache
def version() -> str:
    """`0.1.0`, `0.1.0+<commit>`, or `0.1.0+<commit>.changed` of a clone with changed files."""
    commit = _commit_of_clone(Path(dynmoe.__file__).parents[1]) or _commit_of_installation()
    return f"{dynmoe.__version__}+{commit}" if commit else dynmoe.__version__


def _commit_of_clone(root: Path) -> str | None:
    """None where `root` is no clone, or git is not there."""
    if not (root / ".git").exists():  # a file in a work tree of git
        return None
    # NOTE: git refuses the clone of another user, as in a container, without safe.directory.
    git = ["git", "-c", "safe.directory=*", "-C", str(root)]
    try:
        head, changes = (
            subprocess.run(
                [*git, *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (
                ("rev-parse", f"--short={DIGITS}", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}.changed" if changes else head


def _commit_of_installation() -> str | None:
    """The commit that pip noted of `pip install git+https://...` (PEP 610)."""
    try:
        note = distribution("dynmoe").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit = json.loads(note or "{}").get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)[:DIGITS]
