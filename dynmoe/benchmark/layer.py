"""``dynmoe-bench layer``: one routed layer, computed in every way on the same routing.

Shape suffixes: T tokens, E experts, P pairs, K experts of a token.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, groupby
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe import runtime
from dynmoe.benchmark import against, results, timing
from dynmoe.benchmark.against import Build
from dynmoe.benchmark.cases import LAYER_CASES, Shape
from dynmoe.benchmark.options import LAYER_NOTE
from dynmoe.benchmark.results import MIB, PEAK, RATIO, ROUNDS, Column, Row
from dynmoe.benchmark.rivals import HF, RIVALS, stack, transformers_experts
from dynmoe.layers import (
    Experts,
    MoELayer,
    Router,
    TopAnyRouter,
    TopKRouter,
    moe,
    record_routing,
)
from dynmoe.layers.ffn import GatedFFN

TITLE = (
    "{shape}, {mode}, {ffn}: {tokens} tokens, dim {dim}, hidden {hidden}, {experts} experts;"
    " k {k:g} (mean {mean_k:.4g})"
)
COLUMNS = (
    Column("case", "case"),
    Column("ms", "median_ms"),
    Column("quartiles", "quartiles_ms"),
    *RATIO,
    *against.COLUMNS,
    Column("GFLOP/s", "gflops"),
    Column("kept\nMiB", "kept_bytes", unit=MIB),
    Column("kept,\nx limit", "kept_ratio", ".2f"),
    PEAK,
    *ROUNDS,
)
SUMMARY = (
    Column("shape", "shape"),
    Column("layer,\nof limit", "ratio", ".3f"),
    Column("worst", "worst"),
    Column("router\nshare", "router_share", ".1%"),
    Column("time per row,\nx top_k's", "per_row", ".3f"),
    Column("kept,\nx limit", "layer_kept", ".2f"),
    Column("recompute\nkept, x limit", "recompute_kept", ".2f"),
)


def _compared(row: Row) -> results.Compared:
    """Machines drift, so only the limit is compared in time, the others to their own limit."""
    if row["case"] == "limit":
        return results.Compared("median_ms", "quartiles_ms", "{:.4g} ms")
    return results.Compared("ratio", "ratio_quartiles", "{:.3f} of limit")


RULES = results.BaselineRules(
    ("tokens", "dim", "hidden", "experts", "ffn", "mode", "k", "case"),
    ("shape", "k", "case"),
    _compared,
)


def run(args: argparse.Namespace, output: results.Output) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: a device or baseline that does not fit; nothing has run then.
    """
    device, settings = _set_up(args)
    conditions = results.Conditions(timing.machine_facts(device, args.dtype), settings, {})
    baseline = results.Baseline(args.baseline, RULES) if args.baseline else None
    if baseline:
        baseline.require(conditions, "machine", "settings")
    build = Build(args.against, __name__, args) if args.against else None
    every = _works(args)
    with output.progress() as new_bar:
        for number, work in enumerate(every, 1):
            advance = new_bar(f"shape {work.shape.name}, k {work.k:g} ({number}/{len(every)})")
            rows = measure(work, args.only, args.rounds, device, advance, build)
            output.add(rows, conditions)
    if build:
        build.close()
    output.show(
        *results.tables(output.rows, ("shape", "k"), TITLE, COLUMNS),
        LAYER_NOTE + "\n",
        summary(output.rows),
        *([baseline.table(output.rows)] if baseline else []),
        *([build.note()] if build else []),
    )


def elsewhere(args: argparse.Namespace) -> Iterator[dict[str, Case]]:
    """Yield the cases of each table, for the process of another build."""
    device, _ = _set_up(args)
    for work in _works(args):
        yield build_cases(work, args.only, device)


def _set_up(args: argparse.Namespace) -> tuple[torch.device, results.Facts]:
    device = timing.device_of(args)
    asked = {"matmul_precision": args.matmul_precision, "malloc": args.malloc}
    settings = runtime.apply({**asked, "fused_attention": "auto"}, device.type)
    del settings["fused_attention"]  # a layer has no attention
    return device, settings


def _works(args: argparse.Namespace) -> list[Work]:
    return [Work(shape, args.ffn, k, args.mode, args.dtype) for shape in args.shape for k in args.k]


class Work(NamedTuple):
    """The layer that all cases of a table compute."""

    shape: Shape
    ffn: str
    """``mlp``: Linear, GELU, Linear; ``gated``: down(silu(gate(x)) * up(x)), without biases."""
    k: float
    mode: str
    """``train``: forward and backward; ``inference``: forward alone, nothing is recorded."""
    dtype: str
    """``fp32``; ``bf16``, everything in it; ``amp``, fp32 weights under bf16 autocast."""

    @property
    def flops_per_pair(self) -> int:
        """Of the products of an FFN, which go backward twice: by the input, by the weights."""
        products = 3 if self.ffn == "gated" else 2
        passes = 3 if self.mode == "train" else 1
        return 2 * self.shape.dim * self.shape.hidden * products * passes


def measure(
    work: Work,
    names: Sequence[str],
    rounds: int,
    device: torch.device,
    advance: results.Advance,
    build: Build | None = None,
) -> list[Row]:
    """Return a row for ``limit`` and for each named case that exists for this work.

    Its own fields: those of ``Shape``, its name as ``shape``; ``ffn``, ``mode``; ``k``, asked for;
    ``mean_k`` over the batches of tokens; ``gflops``, useful GFLOP/s over the routed pairs;
    ``ratio``, those over the limit's; ``kept_bytes``, input rows and bytes kept for the backward
    pass, without the output, None in inference; ``kept_ratio``, those over the limit's;
    ``peak_bytes`` beyond input, weights and incoming gradient; ``router_share`` of ``layer`` if
    ``experts`` ran too: 1 - experts / layer, the median over rounds; those of ``against.ratios``.
    """
    cases = build_cases(work, names, device)
    others = build.next_cases() if build else {}
    samples = timing.interleave({**cases, **others}, rounds, device, advance=advance)
    memory = {name: case.memory(device) for name, case in cases.items()}
    size = {name: case.pairs * work.flops_per_pair / 1e9 for name, case in cases.items()}
    share = None
    if "layer" in samples and "experts" in samples:
        share = 1 - timing.paired(samples["experts"], samples["layer"]).median
    return [
        {
            "shape": work.shape.name,
            **dict(zip(Shape._fields[1:], work.shape[1:], strict=True)),
            "ffn": work.ffn,
            "mode": work.mode,
            "k": work.k,
            "mean_k": case.pairs / work.shape.tokens,
            "case": name,
            "reference": "limit",
            **timing.speed(samples[name], samples["limit"], size[name], "gflops", size["limit"]),
            **against.ratios(samples, name),
            "kept_bytes": memory[name].kept,
            "kept_ratio": _over(memory[name].kept, memory["limit"].kept),
            "peak_bytes": memory[name].peak,
            "router_share": share if name == "layer" else None,
        }
        for name, case in cases.items()
    ]


def summary(rows: Sequence[Row]) -> Table:
    """Return a table with a line for each shape: means over its k."""
    lines = []
    for shape, group in groupby(rows, key=lambda row: row["shape"]):
        by_case: defaultdict[str, dict[float, Row]] = defaultdict(dict)
        for row in group:
            by_case[row["case"]][row["k"]] = row
        layers, top_k = by_case["layer"], by_case["top_k"]
        worst = min(layers.values(), key=lambda row: row["ratio"], default=None)
        # Speeds in useful GFLOP/s: the work of a routed pair is the same in both.
        per_row = [top_k[k]["gflops"] / layers[k]["gflops"] for k in layers if k in top_k]
        lines.append(
            {
                "shape": shape,
                "ratio": _mean(layers, "ratio"),
                "worst": worst and f"{worst['ratio']:.3f} (k {worst['k']:g})",
                "router_share": _mean(layers, "router_share"),
                "per_row": fmean(per_row) if per_row else None,
                "layer_kept": _mean(layers, "kept_ratio"),
                "recompute_kept": _mean(by_case["recompute"], "kept_ratio"),
            }
        )
    (table,) = results.tables(lines, (), "Summary, over all k", SUMMARY)
    return table


def _mean(rows: Mapping[float, Row], field: str) -> float | None:
    values = [row[field] for row in rows.values() if row[field] is not None]
    return fmean(values) if values else None


def _over(part: int | None, whole: int | None) -> float | None:
    return None if part is None or whole is None else part / whole


# The cases.

DRAWS, SHORT = 16, 512
"""Batches of tokens, four times as many of fewer than ``SHORT`` tokens. In training the loads of
experts are new in every step, and on a CPU oneDNN compiles a kernel for every new number of rows,
which a single repeated batch would hide."""
HF_LIMIT = 2**30
"""Bytes: transformers' batched_mm, which copies an expert's weights for every pair, is left out
above."""


class Draw(NamedTuple):
    """A batch of tokens and its routing; tokens and weights are leaves."""

    x_TD: Tensor
    weights: Tensor
    """Of the chosen experts: those of the routing, [T, E], or [T, K]."""
    routing: Any
    """A ``Routing``, or the indices [T, K] of the chosen experts."""


class Memory(NamedTuple):
    """Bytes of a call."""

    kept: int | None
    peak: int


@dataclass
class Case:
    """A forward and a backward pass; each call takes the next draw and returns its gradients.
    In inference a forward pass alone, and its output."""

    compute: Callable[[Draw], timing.Outputs]
    """The output rows, then scalars such as the auxiliary loss."""
    parameters: list[Tensor]
    """Tensors that get a gradient besides the draw's tokens and weights."""
    draws: Sequence[Draw]
    pairs: float
    """FFN rows of useful work, the mean over the draws."""
    amp: bool
    train: bool

    def __post_init__(self) -> None:
        self.grad = torch.randn_like(self.draws[0].x_TD)
        self._next = cycle(self.draws)

    def forward(self, draw: Draw) -> timing.Outputs:
        with (
            torch.autocast(self.grad.device.type, torch.bfloat16, enabled=self.amp),
            torch.inference_mode(not self.train),
        ):
            return self.compute(draw)

    def backward(self, draw: Draw, outputs: timing.Outputs) -> tuple[Tensor | None, ...]:
        inputs = [draw.x_TD, draw.weights, *self.parameters]
        grads = [self.grad, *(None for _ in outputs[1:])]
        return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    def __call__(self) -> tuple[Tensor | None, ...]:
        draw = next(self._next)
        outputs = self.forward(draw)
        return self.backward(draw, outputs) if self.train else outputs

    def memory(self, device: torch.device) -> Memory:
        """Return the bytes for the backward pass, input rows included and output rows not; the
        peak.

        They are those of the first draw, whose k is the one asked for. The input rows count because
        they differ: [P, D] for the limit, [T, D] for a layer. The output does not: the next module
        of a model keeps it.
        """
        first = self.draws[0]
        backward = partial(self.backward, first) if self.train else lambda outputs: None
        memory = timing.peak_and_kept(partial(self.forward, first), backward, device)
        kept = memory.kept + first.x_TD.nbytes - memory.output if self.train else None
        return Memory(kept, memory.peak)


def build_cases(work: Work, names: Sequence[str], device: torch.device) -> dict[str, Case]:
    """Return the named cases, and always ``limit``, in the order of ``LAYER_CASES``.

    The top-any router of ``layer`` is fitted to the first of ``DRAWS`` batches of tokens
    (``fit_thresholds``); the loads of the others fluctuate by themselves. In inference a token
    without an expert takes its best one, so k is above the one asked for. The other cases get its
    masks and weights as they are. ``limit`` has as many rows as there are pairs on average, always:
    a dense FFN's shape is fixed. The cases of a fixed k exist for an integer k only, and share one
    freshly drawn, nearly balanced router.
    """
    torch.manual_seed(0)
    shape, k, train = work.shape, work.k, work.mode == "train"
    stored = torch.bfloat16 if work.dtype == "bf16" else torch.float32
    live = range(shape.experts)

    def placed(module: nn.Module) -> nn.Module:
        module = module.to(device, stored).train(train)
        if not train and hasattr(moe, "constant_weights"):  # an earlier build has none
            # Entered and never left, as within one long generation.
            moe.constant_weights(module, stack=shape.tokens < SHORT).__enter__()
        return module

    def tokens(rows: int) -> Tensor:
        return torch.randn(rows, shape.dim, device=device, dtype=stored, requires_grad=True)

    def routed(router: Router) -> list[Draw]:
        with torch.no_grad():
            each = [(x_TD, router(x_TD, live)) for x_TD in batches]
        return [Draw(x, r.weights_TE.requires_grad_(), r) for x, r in each]

    mlp = new_ffn(shape, work.ffn)
    layer = MoELayer(mlp, shape.dim, TopAnyRouter, shape.experts, init="fresh")
    placed(layer)
    assert isinstance(layer.router, TopAnyRouter)
    batches = [tokens(shape.tokens) for _ in range(DRAWS * (4 if shape.tokens < SHORT else 1))]
    fit_thresholds(layer.router, live, batches[0], k)
    draws = routed(layer.router)
    pairs = fmean(int(draw.routing.mask_TE.sum()) for draw in draws)

    def case(
        compute: Callable[[Draw], timing.Outputs],
        parameters: Iterable[Tensor],
        draws: Sequence[Draw] = draws,
        pairs: float = pairs,
    ) -> Case:
        return Case(compute, list(parameters), draws, pairs, work.dtype == "amp", train)

    def whole(layer: MoELayer, *own: Any) -> Case:
        return case(partial(_with_aux if train else _alone, layer), layer.parameters(), *own)

    def alone(experts: Experts, *own: Any) -> Case:
        return case(lambda d: (experts(d.x_TD, d.routing, live),), experts.parameters(), *own)

    def limit() -> Case:
        placed(mlp)
        rows = draws[0]._replace(x_TD=tokens(round(pairs)))
        return case(lambda d: (mlp(d.x_TD),), mlp.parameters(), [rows], round(pairs))

    def recompute() -> Case:
        experts = Experts(mlp, shape.experts, recompute=True)
        placed(experts).load_state_dict(layer.experts.state_dict())
        return alone(experts)

    def rival(name: str) -> Case:
        ffn, rows_of = stack(layer.experts), RIVALS[name]
        return case(lambda d: (rows_of(d.x_TD, d.weights, d.routing.mask_TE, ffn),), ffn.parameters)

    @cache
    def fixed() -> tuple[MoELayer, list[Draw], float]:
        router = partial(TopKRouter, top_k=int(k))
        other = MoELayer(mlp, shape.dim, router, shape.experts, init="fresh")
        placed(other)
        return other, routed(other.router), k * shape.tokens

    def transformers(name: str) -> Case:
        other, routed, pairs = fixed()
        module = transformers_experts(stack(other.experts), HF[name])
        return case(
            lambda d: (module(d.x_TD, d.routing, d.weights),),
            module.parameters(),
            [_chosen(draw) for draw in routed],
            pairs,
        )

    makers: dict[str, Callable[[], Case]] = {
        "limit": limit,
        "layer": lambda: whole(layer),
        "experts": lambda: alone(layer.experts),
        "recompute": recompute,
        "top_k": lambda: whole(*fixed()),
        "top_k experts": lambda: alone(fixed()[0].experts, *fixed()[1:]),
        **{name: partial(rival, name) for name in RIVALS},
        **{name: partial(transformers, name) for name in HF},
    }
    wanted = {"limit", *names} - absent(work)
    return {name: makers[name]() for name in LAYER_CASES if name in wanted}


def new_ffn(shape: Shape, ffn: str) -> nn.Module:
    """Return an FFN of a kind of ``Work.ffn``."""
    up, down = (shape.dim, shape.hidden), (shape.hidden, shape.dim)
    if ffn == "mlp":
        return nn.Sequential(nn.Linear(*up), nn.GELU(), nn.Linear(*down))
    gate, value, out = (nn.Linear(*sizes, bias=False) for sizes in (up, up, down))
    return GatedFFN(gate, value, nn.SiLU(), out, dropout=0.0)


def absent(work: Work) -> set[str]:
    """Return the cases that do not exist for this work."""
    found = set()
    if not float(work.k).is_integer():
        found |= {"top_k", "top_k experts", *HF}
    if work.ffn != "gated":
        found |= {*HF}
    if work.mode != "train":
        found |= {"recompute"}
    item = 4 if work.dtype == "fp32" else 2
    copied = work.k * work.shape.tokens * 3 * work.shape.dim * work.shape.hidden * item
    return found | ({"hf batched_mm"} if copied > HF_LIMIT else set())


def _chosen(draw: Draw) -> Draw:
    """The same routing as transformers' routers tell it."""
    mask_TE = draw.routing.mask_TE
    index_TK = mask_TE.nonzero()[:, 1].view(len(mask_TE), -1)
    weights_TK = draw.weights.detach().gather(1, index_TK)
    return Draw(draw.x_TD, weights_TK.requires_grad_(), index_TK)


def _alone(layer: MoELayer, draw: Draw) -> timing.Outputs:
    return (layer(draw.x_TD),)


def _with_aux(layer: MoELayer, draw: Draw) -> timing.Outputs:
    with record_routing(layer) as tape:
        y_TD = layer(draw.x_TD)
    (calls,) = tape.values()
    return y_TD, *(call.aux for call in calls)


# Routing of a chosen amount and skew by a real router, whose thresholds are fitted to the tokens.

SKEW = 0.8  # Zipf exponent of the experts' popularity


def zipf_loads(tokens: int, experts: int, k: float) -> Tensor:
    """Return the tokens of each expert, int64 [E]: popularity rank^-0.8, in total
    ``round(k * tokens)``.

    No expert gets more than all tokens: the excess goes to the others by popularity.
    """
    share_E = torch.arange(1, experts + 1, dtype=torch.float64) ** -SKEW
    load_E = torch.zeros(experts, dtype=torch.float64)
    free_E = torch.ones(experts, dtype=torch.bool)
    while free_E.any():  # each pass fills at least one expert, or is the last
        left = k * tokens - load_E[~free_E].sum()
        load_E[free_E] = left * share_E[free_E] / share_E[free_E].sum()
        over_E = free_E & (load_E > tokens)
        if not over_E.any():
            break
        load_E[over_E] = tokens
        free_E &= ~over_E
    return load_E.cumsum(0).round().diff(prepend=load_E.new_zeros(1)).long()


@torch.no_grad()
def fit_thresholds(router: TopAnyRouter, live: Sequence[int], x_TD: Tensor, k: float) -> None:
    """Set the thresholds so that ``x_TD`` activates k experts per token on average, Zipf-skewed.

    Expert e's threshold is put between the scores of its last wanted token and the next one.
    Where the two scores are equal in fp32 after the sigmoid, the load is off by that token.
    """
    scores_TE = router(x_TD, live).scores_TE.sort(dim=0, descending=True).values
    edges_TE = F.pad(F.pad(scores_TE, (0, 0, 1, 0), value=2.0), (0, 0, 0, 1), value=-2.0)
    for e, load in enumerate(zipf_loads(len(x_TD), len(live), k).tolist()):
        router.thresholds[live[e]].copy_(edges_TE[load : load + 2, e].mean())
