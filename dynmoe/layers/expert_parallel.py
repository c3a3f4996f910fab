"""Experts of one pool on several devices: tokens travel to their expert's owner, and back.

Transport is PyTorch's all-to-all. A rank that owns an expert has its parameters, gradients and
optimizer state; on the others its Parameters keep their shapes, without memory. Owners serve the
rows of all ranks of the group as one rank serves its own.

Shape suffixes: T tokens of this rank, E living experts, N received rows, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.optim import Optimizer

from dynmoe.layers import dispatch
from dynmoe.layers.grouped import compute_dtype
from dynmoe.layers.routers import Routing

if TYPE_CHECKING:
    from dynmoe.layers.experts import Experts


def dealt(live: Sequence[int], slots: int, size: int) -> list[int]:
    """The first owner of every slot: living experts in even runs, then the empty slots in turn."""
    empty = [slot for slot in range(slots) if slot not in live]
    runs = {slot: place * size // len(live) for place, slot in enumerate(live)}
    turns = {slot: place % size for place, slot in enumerate(empty)}
    return [runs[slot] if slot in runs else turns[slot] for slot in range(slots)]


def balanced(
    owners: Sequence[int], live: Sequence[int], load: Mapping[int, int], size: int
) -> list[int]:
    """Owners of which none has two living experts more than another, by the fewest moves.

    The rank with most experts, of equals with most tokens in ``load``, gives its least loaded one
    to the rank with fewest. A new expert has no load yet, and moves first. A pure function: all
    ranks find the same.
    """
    found = list(owners)
    while True:
        own: list[list[int]] = [[] for _ in range(size)]
        for slot in live:
            own[found[slot]].append(slot)
        # Lowest ranks and slots among equals.
        ranks = sorted(
            range(size), key=lambda r: (len(own[r]), sum(load.get(s, 0) for s in own[r]))
        )
        fewest, most = ranks[0], ranks[-1]
        if len(own[most]) - len(own[fewest]) < 2:
            return found
        found[min(own[most], key=lambda slot: (load.get(slot, 0), slot))] = fewest


class ExpertParallel:
    """Who owns the experts of one pool, among the ranks of ``group``.

    ``owners``: for every slot a rank of the group, the same list on all of them. Every slot has an
    owner, also one without an expert: what it holds is kept.
    """

    def __init__(self, group: Any, owners: Sequence[int]) -> None:
        self.group = group
        self.owners = list(owners)
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)

    def owns(self, slot: int) -> bool:
        return self.owners[slot] == self.rank

    def forward(
        self, pool: Experts, x_TD: Tensor, routing: Routing, live: Sequence[int], serve: Any
    ) -> Tensor:
        """What ``Experts.forward`` returns. ``serve(pool, experts, rows, routing)`` sums expert
        outputs on one device. All ranks of the group call it together."""
        columns = sorted(range(len(live)), key=lambda e: (self.owners[live[e]], e))
        weights_TE = routing.weights_TE[:, columns]
        p = dispatch.pairs(routing.dispatch_TE[:, columns])
        rows_RD = dispatch.gather(x_TD.to(compute_dtype(x_TD)), p)
        if torch.is_grad_enabled() and not rows_RD.requires_grad:
            # NOTE: on every rank alike, so that no backward pass waits for another's.
            rows_RD.requires_grad_()
        counts = self._counts(p.counts, x_TD.device)
        parts = [
            [e for e, column in enumerate(columns) if self.owners[live[column]] == rank]
            for rank in range(self.size)
        ]
        own = parts[self.rank]
        sent = [sum(p.counts[e] for e in part) for part in parts]
        received = [sum(each[e] for e in own) for each in counts]
        # Rows come by rank, and from each in the order of experts.
        runs = torch.tensor([each[e] for each in counts for e in own], dtype=torch.long)
        expert_N = torch.arange(len(own)).repeat(self.size).repeat_interleave(runs)
        mask_NE = (expert_N[:, None] == torch.arange(len(own))).to(x_TD.device)
        rows_ND = self._exchange(rows_RD, received, sent)
        routed = routing._replace(
            weights_TE=mask_NE.to(routing.weights_TE.dtype), dispatch_TE=mask_NE, mask_TE=mask_NE
        )
        out_ND = serve(pool, [pool.slots[live[columns[e]]] for e in own], rows_ND, routed)
        out_RD = self._exchange(out_ND, sent, received)
        if not any(p.counts):
            # NOTE: of the same graph, so that this rank takes part in the others' backward pass;
            # the factor is saved for it, so that a recomputation does not stop before the exchange.
            nothing = (out_RD * out_RD.new_zeros(())).sum()
            return torch.zeros_like(x_TD, dtype=out_RD.dtype) + nothing
        return dispatch.combine(out_RD, weights_TE, p)

    def _counts(self, own: list[int], device: torch.device) -> list[list[int]]:
        """The rows of each expert on each rank."""
        mine = torch.tensor(own, device=device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(every, mine, group=self.group)
        counts: list[list[int]] = torch.stack(every).tolist()
        return counts

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        out = all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)
        return wait_tensor(out)

    # Between steps.

    @contextmanager
    def whole(self, pool: Experts) -> Iterator[None]:
        """Give every rank of the group all slots within the block. What is written to them, alike
        on all ranks, stays with their owners."""
        with torch.no_grad():
            for slot, owner in enumerate(self.owners):
                for tensor in _tensors(pool.slots[slot]):
                    if owner != self.rank:
                        fill(tensor)
                    distributed.broadcast(tensor.data, group=self.group, group_src=owner)
        try:
            yield
        finally:
            self.release(pool)

    def release(self, pool: Experts) -> None:
        """Free the memory of experts that other ranks own."""
        for slot, expert in enumerate(pool.slots):
            if not self.owns(slot):
                for tensor in _tensors(expert):
                    # NOTE: whoever reads it all the same shall see that it is not there.
                    nothing = torch.nan if tensor.is_floating_point() and tensor.ndim else 0
                    tensor.data = tensor.data.new_full((), nothing).expand(tensor.shape)
                    tensor.grad = None

    def move(self, pool: Experts, owners: Sequence[int], optimizers: Sequence[Optimizer]) -> None:
        """Give experts to new owners, with what optimizers know of them."""
        for slot, (old, new) in enumerate(zip(self.owners, owners, strict=True)):
            if old == new or self.rank not in (old, new):
                continue
            tensors = _tensors(pool.slots[slot])
            if self.rank == old:
                weights = [tensor.data.cpu() for tensor in tensors]
                states = [[each.state.pop(t, None) for t in tensors] for each in optimizers]
                distributed.send_object_list([weights, states], group=self.group, group_dst=new)
                continue
            received: list[Any] = [None, None]
            distributed.recv_object_list(received, group=self.group, group_src=old)
            for tensor, weight in zip(tensors, received[0], strict=True):
                tensor.data = weight.to(tensor.device)
            for optimizer, moved in zip(optimizers, received[1], strict=True):
                for tensor, state in zip(tensors, moved, strict=True):
                    if state is not None:
                        optimizer.state[tensor] = {
                            key: value.to(tensor.device) if isinstance(value, Tensor) else value
                            for key, value in state.items()
                        }
        self.owners = list(owners)
        self.release(pool)


def _tensors(expert: nn.Module) -> list[Tensor]:
    return [*expert.parameters(), *expert.buffers()]


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether another rank owns the expert that a Parameter is of."""
    return tensor.ndim > 0 and not any(tensor.stride())


def fill(tensor: Tensor) -> None:
    """Give a tensor without memory some of its own."""
    tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
