"""The pool of expert FFNs, the naive loop that specifies it, and the split of one FFN into many.

Shape suffixes: T tokens, E living experts, R rows of routed pairs, N rows or neurons of one expert,
D model width, H hidden neurons.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from dynmoe.errors import ConfigError
from dynmoe.layers import dispatch
from dynmoe.layers.expert_parallel import ExpertParallel
from dynmoe.layers.ffn import (
    ACTIVATIONS,
    PackedGatedFFN,
    common_layout,
    find_layout,
    is_plain_linear,
    keys,
    read_ffns,
)
from dynmoe.layers.grouped import (
    compiles_shapes,
    compute_dtype,
    grouped_ffn,
    stacked_ffn,
    stacks_pay,
)
from dynmoe.layers.routers import Routing

Init = Literal["copy", "cluster", "random", "fresh"]
Backend = Literal["auto", "loop", "per_expert", "grouped_mm"]


class Experts(nn.Module):
    """``num_slots`` FFNs made from one, or given as they are.

    ``init``: ``copy`` for full copies of it, ``cluster`` or ``random`` for shares of its hidden
    neurons (``split_ffn``), of as many ``copies``, ``fresh`` for newly drawn ones of its size. A
    sequence of FFNs fills the first slots without a copy; slots beyond them hold copies of them in
    turn.

    ``mlp`` is any module that maps rows [N, D] to rows [N, D], each row by itself. FFNs
    of a form that ``ffn.find_layout`` knows take the fast path, where ``recompute`` holds; the
    others are called one after the other.

    ``backend``: ``loop`` calls every expert's module; ``per_expert`` does one product after the
    other of FFNs of a known form, ``grouped_mm`` all of them in PyTorch's grouped products, on any
    device; ``auto`` takes what is fastest.

    Raises:
        ConfigError: ``cluster`` or ``random`` of an FFN that cannot be split so (``split_ffn``);
            ``per_expert`` or ``grouped_mm`` for one of another form.
    """

    kept: dict[Any, Any] | None
    """Weights in the dtype of products, within ``moe.constant_weights``; None elsewhere."""
    fixed_keys_SD: Tensor | None
    """See ``fix_keys``."""
    stack: bool
    """Whether it was asked for weights that are stacked."""
    sharded: bool
    """Whether weights are whole during a pass alone (dynmoe/adaptation/fsdp2.py)."""
    parallel: ExpertParallel | None
    """Who owns which expert, where ranks share them."""

    def __init__(
        self,
        mlp: nn.Module | Sequence[nn.Module],
        num_slots: int,
        init: Init = "copy",
        recompute: bool = False,
        copies: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        # NOTE: one module, hence one set of Parameters, per slot and not one stacked tensor: a slot
        # without an expert then has ``grad is None``, so no optimizer pass and no weight decay.
        if not isinstance(mlp, nn.Module):
            beyond = range(num_slots - len(mlp))
            more = [copy.deepcopy(mlp[each % len(mlp)]) for each in beyond]
            self.slots = nn.ModuleList([*mlp, *more])
        elif init == "cluster" or init == "random":
            parts = split_ffn(mlp, num_slots // copies, init)
            self.slots = nn.ModuleList(copy.deepcopy(part) for _ in range(copies) for part in parts)
        else:
            self.slots = nn.ModuleList(copy.deepcopy(mlp) for _ in range(num_slots))
        self.recompute = recompute
        if init == "fresh":
            for slot in self.slots:
                redraw(slot)
        given = self.slots[:1] if isinstance(mlp, nn.Module) else self.slots[: len(mlp)]
        self.layout = None if backend == "loop" else common_layout(list(given))
        self.backend = backend
        if self.layout is None and backend not in ("auto", "loop"):
            raise ConfigError(
                f"moe.backend={backend}: expected FFNs of two or three plain linear layers with an "
                f"activation ({', '.join(ACTIVATIONS)}), found {type(self.slots[0]).__name__}. Set "
                "moe.backend=auto."
            )
        self.kept: dict[Any, Any] | None = None
        self.stack = False
        self.sharded = False
        self.parallel: ExpertParallel | None = None
        self.register_buffer("fixed_keys_SD", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "stack": False, "parallel": None}

    @property
    def stacks(self) -> bool:
        """Whether this pass may multiply with stacked weights: constant ones, and no gradient."""
        return self.stack and self.backend == "auto" and not torch.is_grad_enabled()

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        """Sum the weighted expert outputs of every token, [T, D]. Cost: one FFN row per pair."""
        experts = [self.slots[slot] for slot in live]
        if torch.compiler.is_exporting():
            return _traceable_forward(experts, x_TD, routing)
        if self.parallel is not None:
            return _parallel_forward(self, x_TD, routing, live)
        return _sparse_forward(self, experts, x_TD, routing)

    @torch.no_grad()
    def mean_keys(self, live: Sequence[int]) -> Tensor:
        """Return the mean row of each expert's first matrix, a gate's alone, fp32, [E, D]."""
        if self.fixed_keys_SD is not None:
            return self.fixed_keys_SD[list(live)]
        layout = self.layout
        first = "" if layout is None else layout.inner[0]
        mlps = [self.slots[slot] for slot in live]
        # A name may stand for an adapter by now, around the linear layer.
        weights = [_weight(linears(mlp.get_submodule(first))[0]) for mlp in mlps]
        rows = [keys(mlp, layout) for mlp in mlps]
        return torch.stack([w[own].mean(0) for w, own in zip(weights, rows, strict=True)])

    def first_weights(self, slot: int) -> list[nn.Parameter]:
        """Return the weight of an expert's first matrix, [H, D]; of a gated FFN that has gate and
        up apart both. Empty where no linear layer is found."""
        mlp = self.slots[slot]
        layout = find_layout(mlp)
        first: list[Any] = linears(mlp)[:1] if layout is None else _named(mlp, layout.inner)
        return [linear.weight for linear in first]

    def fix_keys(self) -> None:
        """Keep the mean keys of all slots as they are now, in checkpoints too: routers that read
        them choose as before when the experts' weights are rounded."""
        self.register_buffer("fixed_keys_SD", self.mean_keys(range(len(self.slots))))

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots for good; slot ``slots[i]`` becomes slot i."""
        self.slots = nn.ModuleList(self.slots[slot] for slot in slots)


# Loads are new in every step: compiled code would be specialised on them, and compiled again.
@torch.compiler.disable
def _sparse_forward(
    pool: Experts, experts: Sequence[nn.Module], x_TD: Tensor, routing: Routing
) -> Tensor:
    conflict = routing.conflict
    by_modules = conflict is not None and conflict.by_modules
    ffns = None if pool.layout is None or by_modules else read_ffns(experts, pool.layout)
    p = dispatch.pairs(routing.dispatch_TE, ffns is not None and compiles_shapes(x_TD))
    if not any(p.counts):  # zeros that backward() can start from, without any expert's Parameters
        y_TD = torch.zeros_like(x_TD, dtype=compute_dtype(x_TD)) + x_TD[:0].sum()
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in pool.parameters())
        # NOTE: with or without rows alike: FSDP gathers a block again for the backward pass if its
        # output has one, and ranks with rows would wait for this one.
        return y_TD.requires_grad_() if trained and not y_TD.requires_grad else y_TD
    if conflict is not None:
        x_TD = conflict.enter(x_TD, p, routing.mask_TE)
    if ffns is not None and pool.kept is not None and pool.stacks and stacks_pay(p.counts):
        out_RD, p = stacked_ffn(x_TD, p, ffns, pool.kept)
    elif ffns is not None:
        out_RD = grouped_ffn(x_TD, p, ffns, pool.recompute, pool.kept, pool.backend)
    else:
        runs = dispatch.gather(x_TD, p).split(p.counts)
        # NOTE: an expert without rows is not called: its Parameters stay out of the graph.
        called = [(expert, run) for expert, run in zip(experts, runs, strict=True) if len(run)]
        with conflict.listening([each for each, _ in called]) if conflict else nullcontext():
            out_RD = torch.cat([same_rows(expert(run), run) for expert, run in called])
    if conflict is not None:
        out_RD = conflict.leave(out_RD, p, routing.mask_TE)
    return dispatch.combine(out_RD, routing.weights_TE, p)


@torch.compiler.disable
def _parallel_forward(pool: Experts, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
    assert pool.parallel is not None
    return pool.parallel.forward(pool, x_TD, routing, live, _sparse_forward)


def _traceable_forward(experts: Sequence[nn.Module], x_TD: Tensor, routing: Routing) -> Tensor:
    """Compute the same in operations that ``torch.export`` and ONNX know, for any batch size."""
    y_TD = torch.zeros_like(x_TD, dtype=compute_dtype(x_TD))
    # NOTE: every expert is called, without rows too: a branch on their number is not exportable.
    for e, expert in enumerate(experts):
        token_N = routing.dispatch_TE[:, e].nonzero().squeeze(1)
        run_ND = x_TD.index_select(0, token_N)
        out_ND = same_rows(expert(run_ND), run_ND)
        weight_N1 = routing.weights_TE[:, e].index_select(0, token_N)[:, None]
        y_TD = y_TD.index_add(0, token_N, (weight_N1 * out_ND).to(y_TD.dtype))
    return y_TD


def naive_forward(experts: Experts, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
    """Specify ``Experts.forward`` token by token. For tests: slow and obvious."""
    y_TD = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D) + x_D[:0].sum()  # backward() can start from it
        for e, slot in enumerate(live):
            if routing.dispatch_TE[t, e]:
                out_D = experts.slots[slot](x_D[None])[0]
                y_D = y_D + routing.weights_TE[t, e].to(out_D.dtype) * out_D
        y_TD.append(y_D)
    return torch.stack(y_TD)


def check_ffn(mlp: nn.Module, dim: int) -> None:
    """Refuse an FFN that does not map rows [N, ``dim``] to rows of the same shape and dtype.

    A copy without data is called: no computation, no random number, nothing in ``mlp`` changes. An
    FFN that needs data is copied and called on zeros. One that cannot be called before the model is
    used (lazy, kernels of another device) is checked as it runs (``same_rows``).

    Raises:
        TypeError: no module.
        ValueError: with both shapes, or its ``forward`` takes more than the rows.
    """
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: expected an FFN, an nn.Module, found {mlp!r}")
    _check_arguments(mlp)
    tensors = [*mlp.parameters(), *mlp.buffers()]
    if any(is_lazy(t) for t in tensors):
        return
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    # FFNs of several types run under autocast alone; their shapes do not depend on it.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    try:
        rows, out = _call(_without_data(mlp).to(dtype), dim, dtype, torch.device("meta"))
    except Exception as without_data:  # whatever a foreign module raises where there is none
        try:
            if device.type == "meta":
                raise without_data
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                rows, out = _call(copy.deepcopy(mlp).to(dtype), dim, dtype, device)
        except Exception as error:
            if isinstance(error, RuntimeError) and re.search("shape|size|dim", str(error)):
                raise ValueError(
                    f"expected an FFN that maps rows [N, {dim}] to rows [N, {dim}], but "
                    f"{type(mlp).__name__} refuses rows [{ROWS}, {dim}]: {error}"
                ) from error
            return
    same_rows(out, rows)
    if out.dtype != dtype:
        raise ValueError(
            f"expected an FFN that keeps the dtype of its rows, but {type(mlp).__name__} makes "
            f"{out.dtype} of {dtype}"
        )


def check_experts(mlps: Sequence[nn.Module], dim: int) -> None:
    """Refuse FFNs that ``check_ffn`` refuses, or whose tensors differ in shape or dtype.

    Raises:
        TypeError: no module.
        ValueError: with both of them.
    """
    first: dict[str, Any] = {}
    checked: set[str] = set()
    for number, mlp in enumerate(mlps):
        # A call takes milliseconds, and models have a thousand experts, all of one build.
        build = f"{type(mlp)} {mlp}"
        if build not in checked:
            check_ffn(mlp, dim)
            checked.add(build)
        state = mlp.state_dict()
        shapes = {name: (list(each.shape), each.dtype) for name, each in state.items()}
        first = first or shapes
        if shapes != first:
            raise ValueError(
                f"mlp: expected experts of equal shapes and dtypes, found {shapes} in expert "
                f"{number}, {first} in expert 0"
            )


def _check_arguments(mlp: nn.Module) -> None:
    try:
        arguments = inspect.signature(mlp.forward)
    except (TypeError, ValueError):  # compiled code does not tell
        return
    try:
        arguments.bind(None)
    except TypeError as error:
        raise ValueError(
            f"expected an FFN that is called with rows [N, D] alone, but {type(mlp).__name__} has "
            f"forward{arguments}: {error}"
        ) from None


ROWS = 3
"""Rows that ``check_ffn`` tries an FFN with."""


@torch.no_grad()
def _call(
    mlp: nn.Module, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(ROWS, dim, dtype=dtype, device=device)
    return rows, mlp.eval()(rows)


def _without_data(mlp: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in mlp.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in mlp.buffers()}
    return copy.deepcopy(mlp, memo)


def same_rows(out: Tensor, rows: Tensor) -> Tensor:
    """Return ``out``.

    Raises:
        ValueError: it has not the shape of ``rows``.
    """
    found = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
    if found != list(rows.shape):
        width = rows.shape[1]
        raise ValueError(
            f"expected an FFN that maps rows [N, {width}] to rows [N, {width}], but it makes "
            f"{found} of {list(rows.shape)}"
        )
    return out


@torch.no_grad()
def redraw(mlp: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw an FFN anew, as timm's ViTs do: truncated normal weights of std 0.02, zero biases."""
    for module in mlp.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif type(module).__name__.endswith(("Norm", "norm")):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:  # to 1 and 0: nothing is drawn
                reset()


@torch.no_grad()
def redraw_units(mlp: nn.Module, share: float, generator: torch.Generator) -> None:
    """Draw a share of the hidden units anew, normal with mean and std of what these had.

    It is done matrix by matrix, biases of the units included (Drop-Upcycling, arXiv 2502.19261).

    Raises:
        ValueError: an FFN whose hidden units are not known.
    """
    if (layout := find_layout(mlp)) is None:
        raise ValueError(
            f"init=copy_redrawn: expected FFNs of plain linear layers, found {type(mlp).__name__}"
        )
    (outer,) = _named(mlp, [layout.outer])
    hidden, device = outer.in_features, outer.weight.device
    units = torch.randperm(hidden, generator=generator, device=device)[: round(share * hidden)]
    for inner in _named(mlp, layout.inner):
        for half in range(len(inner.weight) // hidden):  # gate and up in one
            _redraw_rows(inner.weight[half * hidden :], units, generator)
            if inner.bias is not None:
                _redraw_rows(inner.bias[half * hidden :], units, generator)
    _redraw_rows(outer.weight.t(), units, generator)


def _redraw_rows(x: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    old = x[rows].float()
    noise = torch.randn(old.shape, generator=generator, device=x.device)
    x[rows] = (old.mean() + old.std(correction=0) * noise).to(x.dtype)


@torch.no_grad()
def shared_expert(mlp: nn.Module, init: Init) -> nn.Module:
    """Return an FFN like ``mlp`` that is to be added to the routed experts.

    ``fresh``: newly drawn. Else a copy whose last linear layer is 0: the routed experts start as
    the trained FFN, and so the layer does.

    Raises:
        ConfigError: there is no linear layer.
    """
    made = copy.deepcopy(mlp)
    if init == "fresh":
        redraw(made)
        return made
    if not (names := in_order(made)):
        raise ConfigError(
            f"moe.shared_experts: {type(mlp).__name__} has no linear layer that could start at 0. "
            "Set moe.init=fresh, or moe.shared_experts=0."
        )
    for p in made.get_submodule(names[-1]).parameters():
        p.zero_()
    return made


def with_shared(
    shared: Iterable[nn.Module], y_TD: Tensor, x_TD: Tensor, token_mask_T: Tensor | None
) -> Tensor:
    """Add the outputs of ``shared`` experts, 0 on padding."""
    for expert in shared:
        out_TD = same_rows(expert(x_TD), x_TD).to(y_TD.dtype)
        if token_mask_T is not None:
            out_TD = out_TD.masked_fill(~token_mask_T[:, None], 0)
        y_TD = y_TD + out_TD
    return y_TD


# Split one trained FFN into experts: each takes an equal share of its hidden neurons.

ROUNDS = 100
"""At most so many rounds of k-means; trained FFNs need 10 to 40."""


def split_ffn(mlp: nn.Module, parts: int, how: Literal["cluster", "random"]) -> list[nn.Module]:
    """Return ``parts`` FFNs whose outputs sum to that of ``mlp`` (EMoE, arXiv 2310.10908).

    A neuron's row of the first matrix is its key: neurons with near keys answer the same tokens.
    ``cluster``: neurons grouped by balanced k-means on their keys; ``random``: contiguous slices.
    ``mlp`` has plain linear layers from D to H (one, or a gate and more, or a ``PackedGatedFFN``'s
    one from D to 2 H), then one from H to D without a bias, and nothing else that has parameters.

    Raises:
        ConfigError: H does not divide into ``parts``, or ``mlp`` is of another form.
    """
    names = in_order(mlp)
    *inner, outer = _named(mlp, names)
    hidden, packed = outer.in_features, 1 + isinstance(mlp, PackedGatedFFN)
    plain = all(linear.out_features == packed * hidden for linear in inner)
    plain &= all(is_plain_linear(linear) for linear in (*inner, outer))
    others = len(list(mlp.parameters())) - sum(
        len(list(linear.parameters())) for linear in (*inner, outer)
    )
    if others or not plain or outer.bias is not None:
        raise ConfigError(
            f"moe.init={how}: expected an FFN of plain linear layers to and from its hidden "
            f"neurons, without output bias, found {type(mlp).__name__}. Set moe.init=copy."
        )
    if hidden % parts:
        raise ConfigError(
            f"moe.init={how}: {hidden} hidden neurons do not divide into {parts} experts. "
            f"Set moe.num_experts to a divisor of {hidden}."
        )
    if how == "cluster":
        groups_EN = balanced_clusters(inner[0].weight.detach()[keys(mlp)].float(), parts)
    else:
        groups_EN = torch.arange(hidden).view(parts, -1)
    return [_part(mlp, names, neurons_N.to(outer.weight.device)) for neurons_N in groups_EN]


def _weight(linear: nn.Linear) -> Tensor:
    """The weight of a linear layer as numbers, fp32."""
    weight_OI = linear.weight
    # An export's tensors are of a class of their own.
    plain = is_plain_linear(linear) or torch.compiler.is_exporting()
    return (weight_OI if plain else weight_OI.dequantize()).float()


def linears(mlp: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of an FFN in the order of its modules."""
    return [module for module in mlp.modules() if isinstance(module, nn.Linear)]


def in_order(mlp: nn.Module) -> list[str]:
    """Return the names of an FFN's linear layers: the keys first, the output last.

    As ``find_layout`` tells them; of other FFNs in the order of their modules.
    """
    layout = find_layout(mlp)
    if layout is not None:
        return [*layout.inner, layout.outer]
    return [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]


def _named(mlp: nn.Module, names: Iterable[str]) -> list[Any]:
    return [mlp.get_submodule(name) for name in names]


def balanced_clusters(keys_HD: Tensor, clusters: int) -> Tensor:
    """Group the rows by direction into groups of equal size: their indices, ascending, [E, N].

    K-means whose assignment is the best one with equal sizes, until it stays the same: seconds, at
    4096 rows up to a minute. Centres start at rows drawn from a separate generator with seed 0.
    """
    from scipy.optimize import linear_sum_assignment  # here: the layers need torch alone

    unit_HD = F.normalize(keys_HD.cpu(), dim=1)
    size = len(unit_HD) // clusters
    first_E = torch.randperm(len(unit_HD), generator=torch.Generator().manual_seed(0))[:clusters]
    centres_ED, groups_EN = unit_HD[first_E], None
    for _ in range(ROUNDS):
        # With equal sizes the squared norms of centres add up to a constant: the product decides.
        affinity_HE = unit_HD @ centres_ED.t()
        places_HH = affinity_HE.repeat_interleave(size, 1).numpy()
        _, place_H = linear_sum_assignment(places_HH, maximize=True)
        cluster_H = torch.from_numpy(place_H) // size
        before, groups_EN = groups_EN, cluster_H.argsort(stable=True).view(clusters, size)
        if before is not None and torch.equal(before, groups_EN):
            break
        centres_ED = unit_HD[groups_EN].mean(1)
    assert groups_EN is not None
    return groups_EN


@torch.no_grad()
def _part(mlp: nn.Module, names: Sequence[str], neurons_N: Tensor) -> nn.Module:
    """A copy of ``mlp`` with some of its neurons; the others are never copied."""
    *inner, outer = _named(mlp, names)
    rows_N = neurons_N
    if isinstance(mlp, PackedGatedFFN):  # a neuron has a row in each half
        rows_N = torch.cat([neurons_N, outer.in_features + neurons_N])
    own: dict[int, object] = {}  # deepcopy's memo: takes these for the copies it would make
    for linear in inner:
        for p in linear.parameters():
            own[id(p)] = nn.Parameter(p[rows_N])
    own[id(outer.weight)] = nn.Parameter(outer.weight[:, neurons_N])
    part = copy.deepcopy(mlp, own)
    *inner, outer = _named(part, names)
    for linear in inner:
        linear.out_features = len(rows_N)
    outer.in_features = len(neurons_N)
    return part
