"""Two processes that adapt their experts alike, over many updates of drawn trainings."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kills import Report
from torch import nn

from dynmoe.adaptation import Adaptation, Schedule
from dynmoe.layers import MoELayer, TopAnyRouter, aux_loss, record_routing

DIM, LAYERS, PERIODS = 8, 2, 25


class Net(nn.Module):
    """MoE layers one after the other, with residual connections, and the loss of their outputs."""

    def __init__(self, experts: int, most: int) -> None:
        super().__init__()
        ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.layers = nn.ModuleList(
            MoELayer(ffn, DIM, TopAnyRouter, experts, most) for _ in range(LAYERS)
        )

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        with record_routing(self) as tape:
            for layer in self.layers:
                x_ND = x_ND + layer(x_ND)
        # Within the forward: DDP takes for unused what its outputs do not depend on.
        return x_ND.square().sum() / max(1, len(x_ND)) + 0.01 * aux_loss(tape)


def train(rank: int, seed: int, folder: Path) -> None:
    """One rank of a drawn training: a line for each step with the events and a sum of all state.

    Ranks see other tokens, sometimes none, and sometimes one of them has a loss of NaN.
    """
    draw = random.Random(seed)
    rendezvous = f"file://{folder}/rendezvous{seed}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(seed)
    most = draw.randint(2, 6)
    net = Net(draw.randint(1, most), most)
    how = {"find_unused_parameters": True, "broadcast_buffers": False}  # as trainer=ddp has it
    model = nn.parallel.DistributedDataParallel(net, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((1e-2, 1e-1)))
    period = draw.randint(1, 3)
    adaptation = Adaptation(
        model,
        optimizer,
        Schedule(0, draw.randint(1, period), period),
        init=draw.choice(("slot", "copy_most_used", "copy_redrawn", "mean", "fresh")),
        reset_moments=draw.random() < 0.5,
    )
    generator = torch.Generator().manual_seed(seed * 2 + rank)
    with (folder / f"rank{rank}.jsonl").open("a") as lines:
        for step in range(period * PERIODS):
            count = draw.choice((1, 7, 20)) if draw.random() < 0.8 else 40 * rank
            spread = draw.choice((0.1, 1.0, 10.0))
            x_ND = spread * torch.randn(count, DIM, generator=generator)
            loss = model(x_ND)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bad = draw.random() < 0.05 and rank == step % 2
            events = adaptation.step(loss * float("nan") if bad else loss)
            state = [value.double().sum().item() for value in net.state_dict().values()]
            lines.write(json.dumps([seed, step, events, state]) + "\n")
    torch.distributed.destroy_process_group()


def compare(updates: int, seed: int, work: Path, report: Report) -> None:
    """Train on two ranks until so many updates of layers are compared."""
    work.mkdir(parents=True)
    number = 0
    while report.counts["two-process updates"] < updates:
        number += 1
        folder = work / str(number)
        folder.mkdir()
        pids = [_fork(rank, seed * 1000 + number, folder) for rank in (0, 1)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(ends):
            reason = "\n".join(file.read_text() for file in folder.glob("error*"))
            report.fault("failed trainings", f"{number}: {ends} {reason}")
            return
        for one, other in zip(*map(_lines, _files(folder)), strict=True):
            report.counts["two-process updates"] += len(one[2])
            report.counts["experts changed"] += sum(
                len(event["removed"]) + (event["added"] is not None) for event in one[2]
            )
            if one != other:
                report.fault("differing updates", f"seed {one[0]}, step {one[1]}")
        shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return [folder / f"rank{rank}.jsonl" for rank in (0, 1)]


def _lines(file: Path) -> Iterator[Any]:
    # repr: NaN is equal to itself then.
    for line in file.read_text().splitlines():
        seed, step, events, state = json.loads(line)
        yield seed, step, events, repr(state)


def _fork(rank: int, seed: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of every training
        train(rank, seed, folder)
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)
