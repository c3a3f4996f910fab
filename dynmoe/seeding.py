"""Seeds as functions of their purpose (domainbed/lib/misc.py)."""

from __future__ import annotations

import hashlib


def seed_hash(*args: object) -> int:
    """Return a seed in [0, 2**31) from the printed tuple of `args`: the same on every machine.

    Arguments must be plain Python values: a NumPy integer prints differently.
    """
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31
