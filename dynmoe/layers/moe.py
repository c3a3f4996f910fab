"""The MoE layer: a drop-in for a Transformer block's FFN, with a pool of slots that can change.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

import copy
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from dynmoe.layers.conflict import Conflict, ConflictLoss
from dynmoe.layers.experts import (
    Backend,
    Experts,
    Init,
    check_experts,
    check_ffn,
    redraw,
    redraw_units,
    shared_expert,
    with_shared,
)
from dynmoe.layers.routers import Router, Routing
from dynmoe.layers.tokens import (
    RoutingStats,
    check_bool,
    check_mask,
    of_some,
    routing_stats,
    set_aside,
)

log = logging.getLogger(__name__)

NewExpert = Literal["slot", "copy_most_used", "copy_redrawn", "mean", "pretrained", "fresh"]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
"""Names under which PyTorch's wrappers hold the module that they wrap."""


class Routed(NamedTuple):
    """One call of one layer, on the tape of ``record_routing``."""

    aux: Tensor
    stats: RoutingStats
    mask: Tensor
    """Bool, the input's shape with E for D, or that of its token mask and E: who was served by
    whom. All False on padding."""
    token_mask: Tensor | None
    """Bool, the input's shape without D: False on padding and on tokens that are not finite. None
    where all tokens count."""
    free: Tensor | None = None
    """Integers, the input's shape without D: chosen experts without an FFN (``Routing.free_T``)."""
    observed: Tensor | None = None
    """``Routing.observed``."""
    conflict: Tensor | None = None
    """A scalar 0, whose gradient is that of the loss of token gradient conflict
    (dynmoe/layers/conflict.py); None without."""


class MaskedLayer(nn.Module):
    """A layer that ``mask_padding`` tells of padding."""

    token_mask: Tensor | None = None
    """Padding of the next call's input within ``mask_padding``, for blocks that pass x alone."""


class MoELayer(MaskedLayer):
    """Route, dispatch to the living experts, combine. ``[..., D] -> [..., D]``.

    The pool has ``max_experts`` slots, the first ``num_experts`` of which are alive at the start.
    Adding or removing an expert flips ``active_E`` and rewrites a slot; Parameters neither appear
    nor vanish during training, so optimizers and checkpoints keep working. The layer knows its
    router by the methods of ``Router`` alone.

    ``active_E`` alone decides which experts there are, whoever wrote it: a checkpoint, an average
    of weights, DDP when it is made. ``live`` names the two ways of writing that a GPU hides.

    A token with a NaN or an infinite value (or whose norm is too large for fp32) is treated like
    padding, in training and evaluation: no expert serves it, it comes out as 0, and it is in no
    loss and in no count. The residual connection around an FFN keeps it visible in the output.

    ``mlp`` may be a sequence of ``num_experts`` FFNs of equal shapes: the experts, as they are.

    ``router`` is called as ``router(dim, max_experts)``. ``keep_origin`` keeps a copy of ``mlp``
    for experts added later with ``init="pretrained"``. ``recompute`` computes the activations
    inside experts again in the backward pass instead of keeping them (dynmoe/layers/grouped.py).
    ``backend`` names how their products are done (``Experts``).
    ``shared_experts`` more FFNs serve every token, whatever the router: their outputs are added
    (``experts.shared_expert`` says how they start). k counts routed experts alone. ``conflict``:
    the loss of token gradient conflict; weight 0 and None are without.

    Raises:
        TypeError: ``router`` makes no ``Router``, or ``mlp`` is no module.
        ValueError: ``num_experts`` is not 1 to ``max_experts``, or ``mlp`` does not map rows
            [N, ``dim``] alone to rows of the same shape and dtype; of several FFNs one does not,
            they are not ``num_experts`` of equal shapes, or they come with an ``init`` or a
            ``keep_origin``, which need a single one.
        ConfigError: ``init`` splits an FFN that cannot be split so (``experts.split_ffn``), or
            makes a shared expert of one without linear layers; a ``conflict`` with a router that
            has no logits, or of linear layers that experts do not have.
    """

    active_E: Tensor
    """Bool: the slots that hold an expert. In checkpoints."""
    tape: list[Routed] | None
    """Gets one entry a call within ``record_routing``; None elsewhere."""
    observer: Callable[[MoELayer, Routed], None] | None
    """Called with every call in training, whoever records it (``dynmoe.adaptation``)."""
    warns_of_still_state: ClassVar[bool] = True
    """Whether to warn, once, of a router in training whose state nobody moves."""

    def __init__(
        self,
        mlp: nn.Module | Sequence[nn.Module],
        dim: int,
        router: Callable[[int, int], Router],
        num_experts: int,
        max_experts: int | None = None,
        init: Init = "copy",
        keep_origin: bool = False,
        recompute: bool = False,
        backend: Backend = "auto",
        shared_experts: int = 0,
        conflict: ConflictLoss | None = None,
    ) -> None:
        super().__init__()
        max_experts = num_experts if max_experts is None else max_experts
        if not 1 <= num_experts <= max_experts:
            raise ValueError(f"expected 1 <= num_experts ({num_experts}) <= max ({max_experts})")
        origin = None
        if isinstance(mlp, nn.ModuleList):
            mlp = list(mlp)
        if isinstance(mlp, Sequence):
            if len(mlp) != num_experts or init != "copy" or keep_origin:
                raise ValueError(
                    f"mlp: {len(mlp)} experts are given as they are. Expected num_experts="
                    f"{len(mlp)}, init=copy and no keep_origin, found {num_experts}, {init}, "
                    f"{keep_origin}"
                )
            check_experts(mlp, dim)
        else:
            check_ffn(mlp, dim)
            origin = copy.deepcopy(mlp) if keep_origin else None
        self.dim = dim
        self.router = _made_router(router, dim, max_experts)
        self.conflict = conflict if conflict is not None and conflict.weight else None
        copies = self.router.expert_copies
        self.experts = Experts(mlp, max_experts, init, recompute, copies, backend)
        if self.conflict is not None:
            self.conflict.check(self.router, self.experts.slots[0])
        first = mlp if isinstance(mlp, nn.Module) else mlp[0]
        self.shared = nn.ModuleList(shared_expert(first, init) for _ in range(shared_experts))
        # Without gradients: optimizers leave it out, so it neither moves nor decays.
        self.origin = None if origin is None else origin.requires_grad_(False)
        self.register_buffer("active_E", torch.arange(max_experts) < num_experts)
        self._live = tuple(range(num_experts))
        self._live_of: tuple[Tensor, int, int] | None = None
        self.tape: list[Routed] | None = None
        self.observer: Callable[[MoELayer, Routed], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and saved layers belong to no recording: an averaged model is no second student.
        # Their buffer is another tensor, whose versions count from 0.
        return {**self.__dict__, "tape": None, "observer": None, "_live_of": None}

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Route x to its experts and sum their outputs. ``[..., D] -> [..., D]``.

        ``token_mask`` (bool, x's shape without D) is False on padding, which routes nowhere; None:
        the one of ``mask_padding`` holds.

        Raises:
            ValueError: the last dimension of x is not the layer's, the mask is not of its tokens,
                no expert is alive, or an expert returns rows of another shape.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected x of shape [..., {self.dim}], found {list(x.shape)}")
        token_mask = self.token_mask if token_mask is None else token_mask
        if token_mask is not None:
            check_mask(token_mask, x)
        token_mask_T = None if token_mask is None else token_mask.reshape(-1)
        x_TD, token_mask_T = set_aside(x.reshape(-1, self.dim), token_mask_T)
        # Compiled code knows the experts that it was made for, and asks for them in `_serve`.
        compiling = torch.compiler.is_compiling()
        live = self._live if compiling else self.live
        shape = x.shape[:-1] if token_mask is None else token_mask.shape
        routing = self._route(x_TD, live, token_mask_T, shape)
        if torch.compiler.is_exporting():
            y_TD = self._sum(x_TD, routing, live)
        else:
            y_TD = self._serve(x_TD, routing, live, token_mask_T, shape, compiling)
        return with_shared(self.shared, y_TD, x_TD, token_mask_T).view(x.shape)

    def _route(
        self,
        x_TD: Tensor,
        live: tuple[int, ...],
        token_mask_T: Tensor | None,
        shape: torch.Size,
    ) -> Routing:
        if not live:
            raise ValueError("no expert is alive: active_E is False for all slots")
        self.router.prepare(self.experts, live)
        more = {"shape": shape} if self.router.takes_shape else {}
        if torch.compiler.is_compiling():  # compiled code serves with and without a tape
            routing: Routing = self.router(x_TD, live, token_mask_T, **more)
        else:
            self.router.recorded = self.training or self.tape is not None
            routing = self.router(x_TD, live, token_mask_T, **more)
            self.router.recorded = True
        # NOTE: recorded or not: a recomputation, which is not, must keep as many tensors.
        return routing._replace(aux=of_some(routing.aux, x_TD, token_mask_T))

    def _sum(self, x_TD: Tensor, routing: Routing, live: tuple[int, ...]) -> Tensor:
        scale = self.router.input_scale
        rows_TD = x_TD if scale == 1 else x_TD * scale
        y_TD: Tensor = self.experts(rows_TD, routing, live)
        return y_TD if routing.extra_TD is None else y_TD + routing.extra_TD.to(y_TD.dtype)

    # NOTE: not compiled, as the experts' code is in any case: no further graph break. Compiled code
    # would be made anew where an observer comes or goes, and take the state of autograd, which
    # observers look at, for a constant.
    @torch.compiler.disable
    def _serve(
        self,
        x_TD: Tensor,
        routing: Routing,
        live: tuple[int, ...],
        token_mask_T: Tensor | None,
        shape: torch.Size,
        compiled: bool,
    ) -> Tensor:
        if compiled and self.live != live:  # written to since: the next call compiles anew
            live = self.live
            routing = self._route(x_TD, live, token_mask_T, shape)
        # NOTE: recorded or not: a recomputation, which is not, must keep as many tensors.
        if self.conflict is not None and self.training and torch.is_grad_enabled():
            # NOTE: detached: conflicts in the layers below are of the other losses' gradients.
            with torch.autocast(x_TD.device.type, enabled=False):
                logits_TC = self.router.logits(x_TD.detach().float(), live)
            routing = routing._replace(conflict=Conflict(self.conflict, logits_TC))
        y_TD = self._sum(x_TD, routing, live)
        observer = self.observer if self.training else None
        if self.training and observer is None and y_TD.requires_grad and self.router.has_state:
            self._check_state_moves()
        if self.tape is not None or observer is not None:
            # NOTE: aux keeps its graph, because the task adds it to the loss; all else on the tape
            # is detached and may be kept beyond the step.
            call = Routed(
                routing.aux,
                routing_stats(x_TD, routing, token_mask_T),
                routing.mask_TE.view(*shape, routing.mask_TE.shape[1]),
                None if token_mask_T is None else token_mask_T.view(shape),
                None if routing.free_T is None else routing.free_T.view(shape),
                None if routing.observed is None else routing.observed.detach(),
                None if routing.conflict is None else routing.conflict.loss,
            )
            if self.tape is not None:
                self.tape.append(call)
                if distributed.is_available() and distributed.is_initialized():
                    losses = [call.aux, *([] if call.conflict is None else [call.conflict])]
                    y_TD = _Tied.apply(y_TD, *losses)
            if observer is not None:
                observer(self, call)
        return y_TD

    def _check_state_moves(self) -> None:
        router, kind = self.router, type(self)
        is_trained = any(p.requires_grad for p in router.parameters())
        if kind.warns_of_still_state and is_trained:
            kind.warns_of_still_state = False
            log.warning(
                "The state of %s does not move in this training. Call RouterUpdates(model, "
                "optimizer).step(loss) of dynmoe.adaptation after each optimizer step, or add its "
                "RouterCallback().",
                type(router).__name__,
            )

    @property
    def max_experts(self) -> int:
        return len(self.active_E)

    @property
    def adaptive(self) -> bool:
        """Whether experts may be added and removed."""
        return self.router.adaptive

    @property
    def live(self) -> tuple[int, ...]:
        """The slots that hold an expert, ascending: those that ``active_E`` marks now.

        On a GPU the buffer is read, and the device waited for, only where the tensor is another one
        than at the last time, or was written to in place. Two ways of writing do not show there,
        and the layer keeps the experts it had: through ``active_E.data``, whose version counter
        PyTorch starts anew, and collectives into the buffer, whose counter they do not raise
        (``torch.distributed.broadcast``, and DDP's broadcast of buffers at each forward). Receive
        into another tensor, and ``active_E.copy_`` it. A tensor made in inference mode has no
        counter and is read every time.
        """
        active_E = self.active_E
        # Shapes without data (meta, fake tensors in an export) have those that were read last.
        if active_E.is_meta or type(active_E) not in (Tensor, nn.Parameter):
            return self._live
        if not self._on_host() and not active_E.is_inference():
            now = (active_E, active_E.data_ptr(), active_E._version)
            last = self._live_of
            if last is not None and last[0] is active_E and last[1:] == now[1:]:
                return self._live
            self._live_of = now
        self._live = tuple(slot for slot, on in enumerate(active_E.tolist()) if on)
        return self._live

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _ = self.live  # a model may be exported before it is called

    def _on_host(self) -> bool:
        return self.active_E.device.type == "cpu"

    def extra_repr(self) -> str:
        return f"dim={self.dim}, experts {list(self.live)} of {self.max_experts} slots alive"

    def __repr__(self) -> str:
        # nn.Module's own would list every slot's parameters of the router, and every expert.
        slots = textwrap.indent(repr(self.experts.slots[self.live[0] if self.live else 0]), "  ")
        return (
            f"{type(self).__name__}({self.extra_repr()}\n"
            f"  (router): {type(self.router).__name__}({self.router.extra_repr()})\n"
            f"  (experts): {len(self.experts.slots)} x {slots.lstrip()}\n)"
        )

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """Return the parameters of one slot: the router's own for it, and the FFN's."""
        return [*self.router.slot_parameters(slot), *self.experts.slots[slot].parameters()]

    def remove_expert(self, slot: int) -> None:
        """Take a living expert out of the pool.

        Raises:
            ValueError: the slot is empty, or its expert is the last one.
        """
        if slot not in self.live or len(self.live) == 1:
            raise ValueError(f"cannot remove slot {slot}: the living experts are {self.live}")
        # NOTE: the slot keeps its Parameters. Nothing reads them, so they have no gradient, and
        # optimizers and checkpoints need not know.
        self.active_E[slot] = False
        _ = self.live

    @torch.no_grad()
    def add_expert(
        self,
        slot: int,
        direction_D: Tensor,
        init: NewExpert = "copy_most_used",
        load: dict[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        """Put an expert into an empty slot, for tokens like ``direction_D`` (``Router.point``).

        ``init`` is where its FFN comes from: whatever the ``slot`` holds (the official code), a
        copy of the living expert with most tokens in ``load``, such a copy of which half of the
        hidden units are drawn anew (``copy_redrawn``), the ``mean`` of the living ones, the
        ``pretrained`` FFN that the experts were made from, or a ``fresh`` draw with ``seed``.

        Raises:
            ValueError: the router is not adaptive, the slot is taken, the direction is not finite,
                ``pretrained`` without ``keep_origin``, or ``copy_redrawn`` of an FFN whose hidden
                units are not known.
        """
        if not self.adaptive:
            raise ValueError(f"a {type(self.router).__name__} has a fixed pool of experts")
        if slot in self.live:
            raise ValueError(f"cannot add to slot {slot}: the living experts are {self.live}")
        if not direction_D.isfinite().all():
            raise ValueError(f"cannot add to slot {slot}: its direction is not finite")
        # NOTE: values are copied into the slot's Parameters: new ones would be unknown to the
        # optimizer and to DDP, which list them once.
        target = self.experts.slots[slot]
        living = [self.experts.slots[other] for other in self.live]
        # NOTE: a separate generator: all ranks draw the same weights, and what the global one
        # draws next (dropout, noise) does not depend on whether an expert was added.
        generator = torch.Generator(next(target.parameters()).device).manual_seed(seed)
        if init in ("copy_most_used", "copy_redrawn"):
            load = load or {}
            # The lowest of equally used slots, so that all ranks copy the same.
            most_used = max(self.live, key=lambda other: (load.get(other, 0), -other))
            _copy(self.experts.slots[most_used], target)
            if init == "copy_redrawn":
                redraw_units(target, 0.5, generator)
        elif init == "mean":
            for p, *others in zip(
                target.parameters(), *(mlp.parameters() for mlp in living), strict=True
            ):
                p.copy_(torch.stack(others).mean(0))
        elif init == "pretrained":
            if self.origin is None:
                raise ValueError("init=pretrained needs a layer made with keep_origin=True")
            _copy(self.origin, target)
        elif init == "fresh":
            redraw(target, generator)
        self.router.point(slot, direction_D)
        self.active_E[slot] = True
        _ = self.live

    @torch.no_grad()
    def split_expert(self, source: int, slot: int) -> None:
        """Put a copy of a living expert, the router's own of it included, into an empty slot.

        Raises:
            ValueError: the router is not adaptive, the source is empty or the slot is taken.
        """
        if source not in self.live:
            raise ValueError(f"cannot split slot {source}: the living experts are {self.live}")
        self.add_expert(slot, torch.ones(self.dim, device=self.active_E.device), "slot")
        _copy(self.experts.slots[source], self.experts.slots[slot])
        pairs = zip(
            self.router.slot_parameters(slot), self.router.slot_parameters(source), strict=True
        )
        for new, old in pairs:
            new.copy_(old)

    def compact(self) -> MoELayer:
        """Return a copy without the empty slots: equal outputs, fewer parameters. For export."""
        layer, live = copy.deepcopy(self), self.live
        layer.experts.keep(live)
        layer.router.keep(live)
        layer.origin = None
        layer.active_E = self.active_E[list(live)].clone()
        _ = layer.live
        return layer


def _copy(source: nn.Module, target: nn.Module) -> None:
    # NOTE: load_state_dict would call hooks, of which fully_shard's expect shares.
    old, new = ([*each.parameters(), *each.buffers()] for each in (source, target))
    for before, after in zip(old, new, strict=True):
        after.copy_(before)


def _made_router(router: Any, dim: int, max_experts: int) -> Router:
    expected = "router: expected a Router class or a function (dim, max_experts), e.g. TopKRouter"
    if isinstance(router, nn.Module) or not callable(router):
        found = f"an object of {type(router).__name__}" if callable(router) else repr(router)
        raise TypeError(f"{expected}, found {found}")
    made = router(dim, max_experts)
    if not isinstance(made, Router):
        raise TypeError(f"{expected}; it made {made!r}, which is no Router")
    return made


class _Tied(torch.autograd.Function):
    """The outputs of a layer, in whose graph its losses are too: they get no gradient from there.

    NOTE: DistributedDataParallel takes a parameter that its outputs do not depend on for unused,
    and fails where a loss that is added to them has a gradient for it after all. So it is with a
    router on a rank whose tokens chose no expert.
    """

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, *losses: Tensor) -> Tensor:
        ctx.losses = len(losses)
        # NOTE: the same memory. A view made here, or the input itself, could not be changed in
        # place, as by `x = layer(x); x += residual`.
        return y_TD.detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TD, *[None] * ctx.losses


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return all MoE layers of a model by their dotted names, in the model's order.

    The names are the same under DDP, FSDP, ``torch.compile`` and activation checkpointing, which
    wrap a model or its blocks in other modules.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    }


def aux_loss(tape: Mapping[str, Sequence[Routed]]) -> Tensor:
    """Return the sum of the auxiliary losses on a tape of ``record_routing``, a scalar in fp32.

    Add it to the loss of a training step, times a small weight (DynMoE: 0.01). 0 for an empty tape.
    """
    return sum((call.aux for calls in tape.values() for call in calls), torch.zeros(()))


def conflict_loss(
    model: nn.Module, tape: Mapping[str, Sequence[Routed]], step: int | None = None
) -> Tensor:
    """Return the weighted losses of token gradient conflict on a tape of ``record_routing``, a
    scalar 0 whose gradient is theirs, in fp32: those that are due after ``step`` optimizer steps,
    or all of them.

    Add it to the loss of a training step, beside ``aux_loss``.
    """
    total = torch.zeros(())
    for name, layer in moe_layers(model).items():
        if layer.conflict is not None and (step is None or layer.conflict.is_due(step)):
            found = [call.conflict for call in tape[name] if call.conflict is not None]
            total = sum((layer.conflict.weight * each for each in found), total)
    return total


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routed]]]:
    """Put every call of an MoE layer within the block on a tape: ``{layer name: [Routed, ...]}``.

    Close it before ``backward``: then a recomputation under activation checkpointing is not
    recorded, and each forward counts exactly once. Use the non-reentrant kind: in the reentrant one
    the forward runs without gradients, and so do the auxiliary losses on the tape.
    """
    layers = moe_layers(model)
    tape: dict[str, list[Routed]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.tape = tape[name]
    try:
        yield tape
    finally:
        for layer in layers.values():
            layer.tape = None


@contextmanager
def constant_weights(model: nn.Module, stack: bool = False) -> Iterator[None]:
    """Let MoE layers keep what they make of their weights from call to call within the block.

    ``stack``: for generation, short batches on a CPU without gradients: the weights of all experts
    are held a second time, in one tensor, with which all their products are one operation.

    Kept are weights in autocast's dtype and, where no gradient is wanted, a router's vectors and
    keys. The caller promises that neither weights nor living experts change: a generation, an
    evaluation, the micro-batches of one optimizer step.
    """
    layers = moe_layers(model).values()
    # NOTE: sharded weights are whole for a pass; what is kept of them would be whole all the time.
    pools = [layer.experts for layer in layers if not layer.experts.sharded]
    parts: list[Any] = [*(layer.router for layer in layers), *pools]
    within = [part.kept is not None for part in parts]
    stacked = [layer.experts.stack for layer in layers]
    for part in parts:
        part.kept = {}
    for layer in layers:
        on_host = layer.active_E.device.type == "cpu"
        layer.experts.stack = stack and on_host and not layer.experts.sharded
    try:
        yield
    finally:  # a block around this one begins anew: here weights may have been others
        for part, outer in zip(parts, within, strict=True):
            part.kept = {} if outer else None
        for layer, before in zip(layers, stacked, strict=True):
            layer.experts.stack = before


@contextmanager
def mask_padding(model: nn.Module, token_mask: Tensor | None) -> Iterator[None]:
    """Give ``token_mask`` (bool, [B, N]) to the calls of all MoE layers within the block.

    Raises:
        ValueError: it is not bool; in a layer's call, it is not of the shape of its tokens.
    """
    if token_mask is not None:
        check_bool(token_mask)
    layers = [module for module in model.modules() if isinstance(module, MaskedLayer)]
    for layer in layers:
        layer.token_mask = token_mask
    try:
        yield
    finally:
        for layer in layers:
            layer.token_mask = None
