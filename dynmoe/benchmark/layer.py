"""``dynmoe-bench layer``: one routed layer, computed in every way on the same routing.

Shape suffixes: T tokens, E experts, P pairs, C capacity of an expert, K most experts of a token,
D model width, H hidden width.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby
from statistics import fmean
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe import runtime
from dynmoe.benchmark import results, timing
from dynmoe.benchmark.options import LAYER_CASES, LAYER_NOTE, Shape
from dynmoe.benchmark.results import MIB, PEAK, RATIO, ROUNDS, Column, Row
from dynmoe.layers import Experts, MoELayer, Routing, TopAnyRouter, TopKRouter, record_routing

TITLE = (
    "{shape}: {tokens} tokens, dim {dim}, hidden {hidden}, {experts} experts; k {k:g}"
    " (mean {mean_k:.4g})"
)
COLUMNS = (
    Column("case", "case"),
    Column("ms", "median_ms"),
    Column("quartiles", "quartiles_ms"),
    *RATIO,
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
    ("tokens", "dim", "hidden", "experts", "k", "case"), ("shape", "k", "case"), _compared
)


def run(args: argparse.Namespace, output: results.Output) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: a device or baseline that does not fit; nothing has run then.
    """
    device = timing.device_of(args)
    asked = {"matmul_precision": args.matmul_precision, "malloc": args.malloc}
    settings = runtime.apply({**asked, "fused_attention": "auto"}, device.type)
    del settings["fused_attention"]  # a layer has no attention
    conditions = results.Conditions(timing.machine_facts(device, args.dtype), settings, {})
    baseline = results.Baseline(args.baseline, RULES) if args.baseline else None
    if baseline:
        baseline.require(conditions, "machine", "settings")
    combinations = [(shape, k) for shape in args.shape for k in args.k]
    with output.progress() as new_bar:
        for number, (shape, k) in enumerate(combinations, 1):
            advance = new_bar(f"shape {shape.name}, k {k:g} ({number}/{len(combinations)})")
            rows = measure(shape, k, args.only, args.rounds, args.dtype, device, advance)
            output.add(rows, conditions)
    output.show(
        *results.tables(output.rows, ("shape", "k"), TITLE, COLUMNS),
        LAYER_NOTE + "\n",
        summary(output.rows),
        *([baseline.table(output.rows)] if baseline else []),
    )


def measure(
    shape: Shape,
    k: float,
    names: Sequence[str],
    rounds: int,
    dtype: str,
    device: torch.device,
    advance: results.Advance,
) -> list[Row]:
    """Return a row for ``limit`` and for each named case that exists at this k.

    Its own fields: those of ``Shape``, its name as ``shape``; ``k``, asked for; ``mean_k`` over the
    batches of tokens; ``gflops``, useful GFLOP/s of two products forward and four backward over the
    routed pairs; ``kept_bytes``, input rows and bytes kept for the backward pass, without the
    output; ``kept_ratio``, those over the limit's; ``peak_bytes`` of forward and backward beyond
    input, weights and incoming gradient; ``router_share`` of ``layer`` if ``experts`` ran too:
    1 - experts / layer, the median over rounds.
    """
    cases = build_cases(shape, k, names, dtype, device)
    samples = timing.interleave(cases, rounds, device, advance=advance)
    kept = {name: _kept_and_peak(case, device) for name, case in cases.items()}
    share = None
    if "layer" in samples and "experts" in samples:
        share = 1 - timing.paired(samples["experts"], samples["layer"]).median
    return [
        {
            **{"shape" if field == "name" else field: v for field, v in shape._asdict().items()},
            "k": k,
            "mean_k": case.pairs / shape.tokens,
            "case": name,
            "reference": "limit",
            **timing.speed(
                samples[name],
                samples["limit"],
                12 * case.pairs * shape.dim * shape.hidden / 1e9,
                "gflops",
            ),
            "kept_bytes": kept[name][0],
            "kept_ratio": kept[name][0] / kept["limit"][0],
            "peak_bytes": kept[name][1],
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


def _kept_and_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Return the bytes for the backward pass, input rows included and output rows not; the peak.

    They are those of the first draw, whose k is the one asked for. The input rows count because
    they differ: [P, D] for the limit, [T, D] for a layer. The output does not: the next module of a
    model keeps it.
    """
    first = case.draws[0]
    memory = timing.peak_and_kept(
        partial(case.forward, first), partial(case.backward, first), device
    )
    return memory.kept + first.x_TD.nbytes - memory.output, memory.peak


# The cases.

DRAWS = 16
"""Batches of tokens. In training the loads of experts are new in every step, and on a CPU oneDNN
compiles a kernel for every new number of rows, which a single repeated batch would hide."""


class Draw(NamedTuple):
    """A batch of tokens and its routing by the fitted router; tokens and weights are leaves."""

    x_TD: Tensor
    routing: Routing


@dataclass
class Case:
    """A forward and a backward pass; each call takes the next draw and returns its gradients."""

    compute: Callable[[Draw], timing.Outputs]
    """The output rows, then scalars such as the auxiliary loss."""
    parameters: list[Tensor]
    """Tensors that get a gradient besides the draw's tokens and weights."""
    draws: Sequence[Draw]
    pairs: float
    """FFN rows of useful work, the mean over the draws."""
    amp: bool

    def __post_init__(self) -> None:
        self.grad = torch.randn_like(self.draws[0].x_TD)
        self._next = cycle(self.draws)

    def forward(self, draw: Draw) -> timing.Outputs:
        with torch.autocast(self.grad.device.type, torch.bfloat16, enabled=self.amp):
            return self.compute(draw)

    def backward(self, draw: Draw, outputs: timing.Outputs) -> tuple[Tensor | None, ...]:
        inputs = [draw.x_TD, draw.routing.weights_TE, *self.parameters]
        grads = [self.grad, *(None for _ in outputs[1:])]
        return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    def __call__(self) -> tuple[Tensor | None, ...]:
        draw = next(self._next)
        return self.backward(draw, self.forward(draw))


def build_cases(
    shape: Shape, k: float, names: Sequence[str], dtype: str, device: torch.device
) -> dict[str, Case]:
    """Return the named cases, and always ``limit``, in the order of ``LAYER_CASES``.

    The top-any router of ``layer`` is fitted to the first of ``DRAWS`` batches of tokens
    (``fit_thresholds``); the loads of the others fluctuate by themselves. The other cases get its
    masks and weights as they are. ``limit`` has as many rows as there are pairs on average, always:
    a dense FFN's shape is fixed. ``top_k`` routes with its own, freshly drawn, nearly balanced
    router, and exists for an integer k only. The ``dtype`` "bf16" holds everything in bf16, "amp"
    fp32 weights under autocast, "fp32" everything in fp32.
    """
    torch.manual_seed(0)
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    live = range(shape.experts)

    def on_device(module: nn.Module) -> nn.Module:
        return module.to(device, stored)

    def tokens(rows: int) -> Tensor:
        return torch.randn(rows, shape.dim, device=device, dtype=stored, requires_grad=True)

    mlp = nn.Sequential(
        nn.Linear(shape.dim, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.dim)
    )
    layer = MoELayer(mlp, shape.dim, TopAnyRouter, shape.experts, init="fresh")
    on_device(layer)
    assert isinstance(layer.router, TopAnyRouter)
    batches = [tokens(shape.tokens) for _ in range(DRAWS)]
    fit_thresholds(layer.router, live, batches[0], k)
    draws = [Draw(x_TD, _routing(layer.router, x_TD, live)) for x_TD in batches]
    pairs = fmean(int(draw.routing.mask_TE.sum()) for draw in draws)

    def case(
        compute: Callable[[Draw], timing.Outputs],
        parameters: Sequence[Tensor],
        draws: Sequence[Draw] = draws,
        pairs: float = pairs,
    ) -> Case:
        return Case(compute, list(parameters), draws, pairs, amp=dtype == "amp")

    def alone(experts: Experts) -> Case:
        return case(lambda d: (experts(d.x_TD, d.routing, live),), list(experts.parameters()))

    def limit() -> Case:
        on_device(mlp)
        rows = Draw(tokens(round(pairs)), draws[0].routing)
        return case(lambda d: (mlp(d.x_TD),), list(mlp.parameters()), [rows], round(pairs))

    def recompute() -> Case:
        experts = Experts(mlp, shape.experts, recompute=True)
        on_device(experts).load_state_dict(layer.experts.state_dict())
        return alone(experts)

    def top_k() -> Case:
        router = partial(TopKRouter, top_k=int(k))
        other = MoELayer(mlp, shape.dim, router, shape.experts, init="fresh")
        on_device(other)
        return case(
            partial(_with_aux, other), list(other.parameters()), pairs=int(k) * shape.tokens
        )

    def rival(name: str) -> Case:
        ffn, rows_of = stack(layer.experts), RIVALS[name]
        return case(lambda d: (rows_of(d.x_TD, d.routing.weights_TE, d.routing.mask_TE, ffn),), ffn)

    makers: dict[str, Callable[[], Case]] = {
        "limit": limit,
        "layer": lambda: case(partial(_with_aux, layer), list(layer.parameters())),
        "experts": lambda: alone(layer.experts),
        "recompute": recompute,
        "top_k": top_k,
        **{name: partial(rival, name) for name in RIVALS},
    }
    wanted = {"limit", *names} if float(k).is_integer() else {"limit", *names} - {"top_k"}
    return {name: makers[name]() for name in LAYER_CASES if name in wanted}


def stack(experts: Experts) -> StackedFFN:
    """Return a pool of Linear-GELU-Linear in stacked leaf tensors, as the rivals take it."""
    layers = [list(slot.children()) for slot in experts.slots]
    each = [(fc1.weight, fc1.bias, fc2.weight, fc2.bias) for fc1, _, fc2 in layers]
    return StackedFFN(
        *(torch.stack(tensors).detach().requires_grad_() for tensors in zip(*each, strict=True))
    )


@torch.no_grad()
def _routing(router: TopAnyRouter, x_TD: Tensor, live: Sequence[int]) -> Routing:
    routing: Routing = router(x_TD, live)
    return routing._replace(weights_TE=routing.weights_TE.requires_grad_())


def _with_aux(layer: MoELayer, draw: Draw) -> timing.Outputs:
    with record_routing(layer) as tape:
        y_TD = layer(draw.x_TD)
    (calls,) = tape.values()
    return y_TD, *(call.aux for call in calls)


# Rivals: how others compute a sparse layer. Each maps ``(x_TD, weights_TE, mask_TE, ffn)`` to
# ``y_t = sum of weight_te * ffn_e(x_t)`` over the experts in the token's mask, differentiable in
# the tokens, the weights and the FFNs.


class StackedFFN(NamedTuple):
    """Linear-GELU-Linear of all experts in stacked tensors, as all of these libraries hold it."""

    w1_EHD: Tensor
    b1_EH: Tensor
    w2_EDH: Tensor
    b2_ED: Tensor

    def one(self, e: int, x_PD: Tensor) -> Tensor:
        """Expert e on its rows. Indexing has a backward that fills a whole [E, ...] tensor."""
        h_PH = F.gelu(F.linear(x_PD, self.w1_EHD[e], self.b1_EH[e]))
        return F.linear(h_PH, self.w2_EDH[e], self.b2_ED[e])

    def batched(self, x_ECD: Tensor) -> Tensor:
        """Every expert on its own C rows."""
        h_ECH = F.gelu(torch.baddbmm(self.b1_EH[:, None], x_ECD, self.w1_EHD.mT))
        return torch.baddbmm(self.b2_ED[:, None], h_ECH, self.w2_EDH.mT)


Rival = Callable[[Tensor, Tensor, Tensor, StackedFFN], Tensor]


def naive_loop(
    x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, one: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The usual first version: select each expert's tokens by a mask, add ``one(e, rows)``."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(mask_TE.shape[1]):
        token_P = mask_TE[:, e].nonzero().squeeze(1)
        out_PD = one(e, x_TD[token_P]) * weights_TE[token_P, e, None]
        y_TD.index_add_(0, token_P, out_PD.to(y_TD.dtype))
    return y_TD


def hf_loop(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """MixtralExperts.forward of Hugging Face transformers 5 (models/mixtral/modeling_mixtral.py).

    Its experts are gated (three matrices); here they are the two-matrix FFN of all cases. It takes
    K indices per token, so a token with fewer gets the id E, which the loop skips.
    """
    experts = mask_TE.shape[1]
    with torch.no_grad():
        index_TE = torch.where(mask_TE, torch.arange(experts, device=mask_TE.device), experts)
        index_TK = index_TE.sort(dim=1).values[:, : int(mask_TE.sum(1).max())]
        hit_EKT = F.one_hot(index_TK, experts + 1).permute(2, 1, 0)
        hit_E = (hit_EKT.sum((-1, -2)) > 0).nonzero()
    weights_TK = F.pad(weights_TE, (0, 1)).gather(1, index_TK)
    y_TD = torch.zeros_like(x_TD)
    for (e,) in hit_E.tolist():
        if e == experts:
            continue
        place_P, token_P = torch.where(hit_EKT[e])
        out_PD = ffn.one(e, x_TD[token_P]) * weights_TK[token_P, place_P, None]
        y_TD.index_add_(0, token_P, out_PD.to(y_TD.dtype))
    return y_TD


def padded(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """One-hot einsum dispatch of GShard (arXiv 2006.16668, Algorithm 1) and DeepSpeed.

    deepspeed/moe/sharded_moe.py; DynMoE's published code follows it. Dropless: the capacity is the
    load of the busiest expert.
    """
    place_C = torch.arange(int(mask_TE.sum(0).max()), device=mask_TE.device)
    hit_TEC = (mask_TE.cumsum(0) - 1)[..., None] == place_C
    dispatch_TEC = (hit_TEC & mask_TE[..., None]).to(x_TD.dtype)
    combine_TEC = weights_TE.to(x_TD.dtype)[..., None] * dispatch_TEC
    out_ECD = ffn.batched(torch.einsum("tec,td->ecd", dispatch_TEC, x_TD))
    return torch.einsum("tec,ecd->td", combine_TEC.to(out_ECD.dtype), out_ECD)


def padded_bmm(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """The same padding by index instead of one-hot products, as Tutel does (arXiv 2206.03382)."""
    experts, capacity = mask_TE.shape[1], int(mask_TE.sum(0).max())
    token_P, expert_P = mask_TE.nonzero(as_tuple=True)
    place_P = expert_P * capacity + (mask_TE.cumsum(0) - 1)[mask_TE]
    rows_RD = x_TD.new_zeros(experts * capacity, x_TD.shape[1]).index_copy(
        0, place_P, x_TD[token_P]
    )
    out_PD = ffn.batched(rows_RD.view(experts, capacity, -1)).flatten(0, 1)[place_P]
    out_PD = out_PD * weights_TE[mask_TE][:, None]
    return torch.zeros_like(x_TD).index_add(0, token_P, out_PD.to(x_TD.dtype))


def dense_then_mask(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """Every expert on every token: the short way to write a soft or thresholded mixture."""
    out_ETD = ffn.batched(x_TD.expand(mask_TE.shape[1], -1, -1))
    return torch.einsum("te,etd->td", (weights_TE * mask_TE).to(out_ETD.dtype), out_ETD)


RIVALS: dict[str, Rival] = {
    "naive loop": lambda x_TD, weights_TE, mask_TE, ffn: naive_loop(
        x_TD, weights_TE, mask_TE, ffn.one
    ),
    "hf loop": hf_loop,
    "padded": padded,
    "padded_bmm": padded_bmm,
    "dense then mask": dense_then_mask,
}


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
