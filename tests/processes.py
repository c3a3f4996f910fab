"""Processes that train together, as Lightning or a plain loop starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, spawn


def in_processes(work: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Call ``work(rank, ranks, port, *args)`` in each of ``ranks`` processes.

    Now and then a process aborts in gloo's threads ("terminate called without an active
    exception"), at no fault of what is tested: then once more.
    """
    try:
        spawn(work, (ranks, free_port(), *args), nprocs=ranks)
    except ProcessExitedException:
        spawn(work, (ranks, free_port(), *args), nprocs=ranks)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def as_rank(rank: int, ranks: int, port: int) -> None:
    """Let Lightning take this process for one of several, and start none."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "test",
    }


def join_group(rank: int, ranks: int, port: int) -> None:
    """Join the others in a group of gloo, for a loop without Lightning."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", address, rank=rank, world_size=ranks)
