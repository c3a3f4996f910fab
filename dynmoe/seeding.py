"""Seeds as functions of what they are for (domainbed/lib/misc.py)."""

from __future__ import annotations

import hashlib


def seed_hash(*args: object) -> int:
    """Seed in [0, 2**31) from the printed tuple of `args`; the same on every machine and run.

    Arguments must be plain Python values: a NumPy integer prints differently.
    """
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31
