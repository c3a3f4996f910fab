"""Weights of several training sets, and how many examples of each a step draws.

Source: Zhu et al., "Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts",
NAACL 2025, arXiv 2406.11256; Spico197/MoE-SFT, src/callbacks.py.

A training set is a *source*. Every draw is a function of (seed, step) and of the weights in force
at each step up to it: a resumed run needs the weights alone, and all ranks draw alike.

Shape suffixes: D sources, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dynmoe.errors import ConfigError
from dynmoe.seeding import IntArray, seed_hash

Rule = Literal["dynamic", "uniform", "proportional", "fixed", "ref_loss", "random"]
Metric = Literal["l2", "cos", "reversed_l2"]
Aggregate = Literal["mean", "min", "max"]
FloatArray = npt.NDArray[np.float64]

MOST = 0.2
"""Share of a source's examples, at most, that is held out for probes."""

FEW = 8
"""Experts up to which loads differ so much that the authors' c lets one source take over."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the weights of sources start and move; the keys of the configuration's `mixing` node."""

    rule: Rule
    """dynamic, ref_loss and random move the weights after every probe; the others keep them."""
    every: int | None = None
    """Optimizer steps between two probes; None: none, where the weights do not move."""
    probe_tokens: int = 2000
    """Tokens of a source that are held out of training and probed; fewer of a small source:
    `MOST`."""
    metric: Metric = "l2"
    """See `load_distances`."""
    aggregate: Aggregate = "mean"
    layers: Sequence[int] = (-1,)
    """MoE layers that are compared, from the first, 0, or from the end; their distances' mean."""
    eta: float = 10.0
    """How far a distance, or a loss, moves the weights."""
    c: float | Literal["auto"] = "auto"
    """Share of the uniform distribution in the new weights, so that c / D is the least of them."""
    weights: Mapping[str, float] | Sequence[float] | None = None
    """The first weights, by source or in the order of their names; None: equal ones. Of `fixed`
    those of all steps."""
    reference: str | Mapping[str, float] | Sequence[float] | None = None
    """Of `ref_loss`: the loss of each source, likewise, or the folder of a run that recorded
    them."""

    @property
    def moves(self) -> bool:
        return self.rule in ("dynamic", "ref_loss", "random")

    def smoothing(self, experts: int) -> float:
        """The value of `c`. auto: 0.05, which LLaMA-MoE has with 8 experts, 2 of them per token.

        Few experts have loads so unlike that one source would take over half of the samples within
        8 probes: 0.5 for up to 8 (MoLM has 0.8 with 4).
        """
        return (0.5 if experts <= FEW else 0.05) if self.c == "auto" else float(self.c)


def load_distances(
    counts_DE: npt.ArrayLike, metric: Metric = "l2", aggregate: Aggregate = "mean"
) -> FloatArray:
    """How unlike the others each source uses the experts, [D]: larger is more unlike.

    `counts_DE`: picks of each expert; only their proportions count. The distance to the source
    itself, 0, is one of the D that are aggregated. `cos`: 1 - cosine. `reversed_l2`, a control:
    the source that is most unlike gets the least distance, and so on.
    """
    counts = np.asarray(counts_DE, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)  # a source may route nothing
    if metric == "cos":
        units = shares / np.maximum(np.linalg.norm(shares, axis=1, keepdims=True), 1e-300)
        between = 1 - units @ units.T
    else:
        between = np.linalg.norm(shares[:, None] - shares[None], axis=2)
    delta: FloatArray = getattr(between, aggregate)(axis=1)
    if metric == "reversed_l2":
        order = np.argsort(delta, kind="stable")
        delta[order] = delta[order[::-1]]
    return delta


def moved_weights(
    weights_D: npt.ArrayLike, delta_D: npt.ArrayLike, eta: float, c: float
) -> FloatArray:
    """(1 - c) softmax(log w + eta delta) + c / D, over its sum. A weight of 0 grows by c alone."""
    weights = np.asarray(weights_D, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(weights) + eta * np.asarray(delta_D, dtype=np.float64)
    grown = np.exp(logits - logits.max())
    mixed: FloatArray = (1 - c) * grown / grown.sum() + c / len(weights)
    return mixed / mixed.sum()


def start_weights(mixing: Mixing, sizes: Mapping[str, int]) -> FloatArray:
    """Weights of the first step, in the order of `sizes`: the examples of each source.

    Raises:
        ConfigError: fewer than two sources, or `mixing.weights` that are not theirs.
    """
    names = [*sizes]
    if len(names) < 2:
        raise ConfigError(
            f"mixing={mixing.rule}: expected two sources or more to mix, found "
            f"{', '.join(names) or 'none'}. Leave mixing out, or choose data with several: "
            "data=glue_mix, several training environments, several conversation files"
        )
    if mixing.rule == "proportional":
        found = np.array([*sizes.values()], dtype=np.float64)
    elif mixing.weights is None:
        found = np.ones(len(names))
    else:
        given = numbers_of(mixing.weights, names)
        if given is None or min(given) < 0 or sum(given) <= 0:
            raise ConfigError(
                "mixing.weights: expected a weight of 0 or more for each of "
                f"{', '.join(names)}, not all 0, found {mixing.weights}"
            )
        found = np.array(given, dtype=np.float64)
    return found / found.sum()


def numbers_of(
    given: Mapping[str, float] | Sequence[float], names: Sequence[str]
) -> list[float] | None:
    """The numbers of the sources `names`, from a mapping or in their order; None where they are not
    one finite number for each."""
    if isinstance(given, Mapping):
        by_name = {str(name): number for name, number in given.items()}
        found = [by_name[name] for name in names] if by_name.keys() == set(names) else []
    else:
        found = list(given)
    fine = [n for n in found if isinstance(n, int | float) and math.isfinite(n)]
    return fine if len(fine) == len(names) == len(found) else None


@dataclass(eq=False)
class Mixture:
    """The sources of a run, ordered by name, and their weights over its steps.

    A probe that ends when `step` optimizer steps are done moves the weights from step + 1 on: the
    batch of the step between is fetched already, by Lightning, which looks one batch ahead.
    """

    sizes: Mapping[str, int]
    """Examples that are trained on, by source."""
    batch_size: int
    """Examples of a step, of all sources together."""
    seed: int
    start: FloatArray
    every: int | None = None
    """Steps between two probes; None: the weights stay as they are."""
    probe: Mapping[str, int] = field(default_factory=dict)
    """Examples held out for probes, by source."""

    def __post_init__(self) -> None:
        assert [*self.sizes] == sorted(self.sizes)
        self._history: list[tuple[int, FloatArray]] = [(0, self.start)]
        self._drawn = 0, np.zeros(len(self.sizes), dtype=np.int64)

    @property
    def names(self) -> list[str]:
        return [*self.sizes]

    @property
    def weights(self) -> FloatArray:
        """The newest."""
        return self._history[-1][1]

    @property
    def facts(self) -> dict[str, Any]:
        """For `run.json`: by source the examples of training and of probes, and the first
        weights."""
        start = dict(zip(self.names, self.start.tolist(), strict=True))
        return {"sizes": dict(self.sizes), "probe": dict(self.probe), "start": start}

    def weights_at(self, step: int) -> FloatArray:
        """Those that the batch of a step, counted from 0, is drawn with."""
        return next(weights for first, weights in reversed(self._history) if first <= step)

    def move(self, steps_done: int, weights_D: FloatArray) -> None:
        """Take other weights, found when `steps_done` optimizer steps were done."""
        self._history.append((steps_done + 1, weights_D))

    def known_until(self, step: int) -> int:
        """The last step whose weights are those of `step`, or are known when it is fetched."""
        if self.every is None:
            return step + 2**40
        return max(1, -(-step // self.every)) * self.every

    def counts_at(self, step: int) -> IntArray:
        """Examples of each source in the batch of a step, [D]: batch_size * weight, rounded up or
        down so that its mean over steps is exact (systematic sampling)."""
        # NOTE: the hash has 31 bits; between two of its values no boundary is at a rounding error.
        offset = (seed_hash(self.seed, "mix", step) + 0.5) / 2**31
        edges = np.ceil(self.batch_size * np.cumsum(self.weights_at(step)) - offset)
        edges[-1] = self.batch_size
        counts: IntArray = np.diff(edges.clip(0, self.batch_size), prepend=0).astype(np.int64)
        return counts

    def drawn_before(self, step: int) -> IntArray:
        """Examples of each source in all batches before that of `step`, [D]."""
        at, drawn = self._drawn
        if at > step:
            at, drawn = 0, np.zeros_like(drawn)
        for each in range(at, step):
            drawn = drawn + self.counts_at(each)
        self._drawn = step, drawn
        return drawn

    def state_dict(self) -> dict[str, list[tuple[int, list[float]]]]:
        return {"weights": [(first, weights.tolist()) for first, weights in self._history]}

    def load_state_dict(self, state: Mapping[str, Sequence[tuple[int, list[float]]]]) -> None:
        self._history = [(first, np.array(weights)) for first, weights in state["weights"]]
        self._drawn = 0, np.zeros(len(self.sizes), dtype=np.int64)


@dataclass(eq=False)
class Turns:
    """The `rows` of a source in a new order, again and again.

    The order of a pass is a function of (seed, source, pass).
    """

    rows: IntArray
    seed: int
    source: str

    def __post_init__(self) -> None:
        self._kept_order = lru_cache(maxsize=1)(self.order)  # many steps ask for the same one

    def order(self, turn: int) -> IntArray:
        rng = np.random.default_rng(seed_hash(self.seed, "turn", self.source, turn))
        return rng.permutation(self.rows)

    def drawn(self, start: int, count: int) -> IntArray:
        """Draws `start` to `start + count`."""
        found: list[IntArray] = []
        while count:
            turn, place = divmod(start, len(self.rows))
            found.append(self._kept_order(turn)[place : place + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found) if found else self.rows[:0]


def held_out(
    rows: IntArray, tokens: IntArray | int, wanted: int, seed: int, source: str
) -> tuple[IntArray, IntArray]:
    """Cut a source's `rows` into those to train on and those to probe, each ascending.

    `tokens`: of each row, or of all alike. The probe has `wanted` tokens or more, but not more
    than the share `MOST` of the rows.

    Raises:
        ConfigError: there is one row alone.
    """
    order = np.random.default_rng(seed_hash(seed, "probe", source)).permutation(len(rows))
    lengths = np.broadcast_to(tokens, len(rows))[order]
    count = int(np.searchsorted(np.cumsum(lengths), wanted)) + 1
    if len(rows) < 2:
        raise ConfigError(
            f"mixing: {source} has {len(rows)} training example, and probes are held out of "
            "training. Give it more, leave it out, or choose mixing=uniform without probes"
        )
    count = min(count, max(1, int(MOST * len(rows))))
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def probe_slices(
    sizes: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[tuple[int, list[int]]]:
    """(source, places in its probe) of each batch of a rank: each place once over all ranks.

    All ranks have equally many batches, of which some may be empty.
    """
    found = []
    for source, size in enumerate(sizes):
        own = list(range(size))[rank::world_size]
        most = math.ceil(math.ceil(size / world_size) / batch_size)
        found += [(source, own[i * batch_size : (i + 1) * batch_size]) for i in range(most)]
    return found
