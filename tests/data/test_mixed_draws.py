"""Data mixing: the authors' numbers, invariants of the update, and exactness of the draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe.data.mixing import (
    Mixing,
    Mixture,
    Turns,
    held_out,
    load_distances,
    moved_weights,
    probe_slices,
    start_weights,
)
from dynmoe.data.text.batches import Key, MixedDraw
from dynmoe.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "datamix.json").read_text())
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]
METRICS = {"l2": "l2", "cos": "cos", "~l2": "reversed_l2"}
STORED = 1e-8  # inputs are stored with nine digits


@pytest.mark.parametrize("case", CASES)
def test_golden(case: dict[str, Any]) -> None:
    """Each step by itself, and all of them in a row."""
    in_a_row = np.array(case["steps"][0]["weights_before_D"])
    for step in case["steps"]:
        if "counts_DE" in step:
            metric = METRICS[case["metric"]]
            delta = load_distances(step["counts_DE"], metric, case["aggregate"])  # type: ignore[arg-type]
        else:
            delta = np.array(step["loss_D"]) - np.array(case["ref_loss_D"])
        assert delta == pytest.approx(step["delta_D"], abs=STORED)
        settings = case["eta"], case["c"]
        alone = moved_weights(step["weights_before_D"], delta, *settings)
        assert alone == pytest.approx(step["weights_after_D"], abs=STORED)
        in_a_row = moved_weights(in_a_row, delta, *settings)
        assert in_a_row == pytest.approx(step["weights_after_D"], abs=STORED)


def naive_distances(counts: list[list[int]], metric: str) -> list[float]:
    shares = [[n / sum(row) for n in row] for row in counts]

    def far(a: list[float], b: list[float]) -> float:
        if metric == "l2":
            return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
        size = sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / size

    return [sum(far(a, b) for b in shares) / len(shares) for a in shares]


COUNTS = st.integers(2, 5).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(1, 1000), min_size=experts, max_size=experts), min_size=2, max_size=5
    )
)


@given(COUNTS, st.integers(2, 9), st.randoms(use_true_random=False))
@pytest.mark.parametrize("metric", ["l2", "cos", "reversed_l2"])
def test_distances(metric: Any, counts: list[list[int]], scale: int, random: Any) -> None:
    found = load_distances(counts, metric)
    if metric == "reversed_l2":
        plain = load_distances(counts)
        assert sorted(found) == pytest.approx(sorted(plain))
        assert (np.diff(found[np.argsort(plain, kind="stable")]) <= 1e-12).all()
    else:
        assert found == pytest.approx(naive_distances(counts, metric), abs=1e-7)
    more = [[n * (scale + i) for n in row] for i, row in enumerate(counts)]
    assert load_distances(more, metric) == pytest.approx(found, abs=1e-7)  # proportions alone
    order = random.sample(range(len(counts[0])), len(counts[0]))
    permuted = [[row[i] for i in order] for row in counts]
    assert load_distances(permuted, metric) == pytest.approx(found, abs=1e-7)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda w: sum(w) > 0.1),
    st.floats(0, 20),
    st.floats(0, 1),
    st.data(),
)
def test_weights(raw: list[float], eta: float, c: float, data: Any) -> None:
    weights = np.array(raw) / sum(raw)
    sources = len(weights)
    delta = data.draw(st.lists(st.floats(-2, 2), min_size=sources, max_size=sources))
    found = moved_weights(weights, delta, eta, c)
    assert found.sum() == pytest.approx(1) and (found >= c / sources - 1e-12).all()
    alike = moved_weights(weights, np.full(sources, 0.3), eta, c)
    assert alike == pytest.approx((1 - c) * weights + c / sources)


def test_a_source_that_routes_nothing_has_a_distance() -> None:
    assert np.isfinite(load_distances([[0, 0], [3, 1], [1, 3]])).all()
    assert np.isfinite(load_distances([[0, 0], [3, 1], [1, 3]], "cos")).all()


@pytest.mark.parametrize(("experts", "c"), [(4, 0.5), (8, 0.5), (9, 0.05)])
def test_few_experts_pull_to_equal_weights(experts: int, c: float) -> None:
    assert Mixing(rule="dynamic").smoothing(experts) == c
    assert Mixing(rule="dynamic", c=0.2).smoothing(experts) == 0.2


SIZES = {"a": 10, "b": 30, "c": 60}


def test_first_weights() -> None:
    assert start_weights(Mixing(rule="dynamic"), SIZES) == pytest.approx([1 / 3] * 3)
    assert start_weights(Mixing(rule="proportional"), SIZES) == pytest.approx([0.1, 0.3, 0.6])
    own = Mixing(rule="fixed", weights={"b": 3, "a": 1, "c": 0})
    assert start_weights(own, SIZES) == pytest.approx([0.25, 0.75, 0])
    in_order = Mixing(rule="fixed", weights=[1, 3, 0])
    assert start_weights(in_order, SIZES) == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize(
    ("weights", "sizes", "match"),
    [
        ({"a": 1, "b": 1}, SIZES, r"mixing\.weights: .* a, b, c"),
        ({"a": 1, "b": 1, "c": -1}, SIZES, r"mixing\.weights: .*0 or more"),
        ({"a": 0, "b": 0, "c": 0}, SIZES, r"mixing\.weights: .*not all 0"),
        ([1, 2], SIZES, r"mixing\.weights: .*a, b, c"),
        ([1, 2, float("nan")], SIZES, r"mixing\.weights: "),
        (None, {"a": 10}, "two sources or more.* found a.*data=glue_mix"),
    ],
)
def test_weights_of_other_sources_are_refused(weights: Any, sizes: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        start_weights(Mixing(rule="fixed", weights=weights), sizes)


def mixture(weights: list[float], batch: int = 16, every: int | None = 4, seed: int = 0) -> Mixture:
    sizes = {name: 7 * (n + 1) for n, name in enumerate("abcdef"[: len(weights)])}
    return Mixture(sizes, batch, seed, np.array(weights), every)


def test_counts_follow_the_weights_exactly() -> None:
    """Each step has batch x weight of a source, rounded; the mean over steps is unbiased."""
    made = mixture([0.05, 0.61, 0.34], batch=10)
    counts = np.array([made.counts_at(step) for step in range(4000)])
    assert (counts.sum(1) == 10).all()
    expected = 10 * made.start
    assert (np.abs(counts - expected) < 1).all()
    assert counts.mean(0) == pytest.approx(expected, abs=0.03)  # 4 standard errors


@pytest.mark.parametrize("sources", [2, 3, 5, 6])
def test_equal_weights_divide_a_batch_equally(sources: int) -> None:
    made = mixture([1 / sources] * sources, batch=32 * sources)
    assert all((made.counts_at(step) == 32).all() for step in range(500))


def test_weights_act_from_the_second_step_after_a_probe() -> None:
    made = mixture([0.5, 0.5])
    made.move(4, np.array([1.0, 0.0]))
    made.move(8, np.array([0.0, 1.0]))
    first = [made.weights_at(step)[0] for step in range(10)]
    assert first == [0.5] * 5 + [1.0] * 4 + [0.0]
    ends = [made.known_until(step) for step in range(10)]
    assert ends == [4] * 5 + [8] * 4 + [12]
    assert mixture([1.0, 0.0], every=None).known_until(3) > 10**9


def test_a_resumed_mixture_draws_the_same() -> None:
    """In the middle of a window, from the saved weights alone."""
    straight = mixture([0.2, 0.5, 0.3])
    for done in (4, 8):
        straight.move(done, moved_weights(straight.weights, [0.1 * done, 0.2, 0.0], 1.0, 0.1))
    drawn = [straight.drawn_before(step).tolist() for step in range(14)]
    resumed = mixture([0.2, 0.5, 0.3])
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for step in (10, 13, 2):
        assert resumed.drawn_before(step).tolist() == drawn[step]
        assert (resumed.counts_at(step) == straight.counts_at(step)).all()


def test_rows_come_in_turn() -> None:
    """Every row once before any comes again, in an order of its own for each turn and source."""
    rows = np.arange(10, 17)
    whole = Turns(rows, seed=3, source="a").drawn(0, 21)
    turns = whole.reshape(3, 7)
    assert all(sorted(turn) == rows.tolist() for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3
    pieces = [Turns(rows, 3, "a").drawn(start, 3) for start in range(0, 21, 3)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert Turns(rows, 3, "b").drawn(0, 21).tolist() != whole.tolist()
    assert len(Turns(rows, 3, "a").drawn(5, 0)) == 0


def test_a_pass_is_drawn_once_and_not_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    order = Turns.order
    monkeypatch.setattr(
        Turns, "order", lambda self, turn: (made.append(turn), order(self, turn))[1]
    )
    rows = np.arange(10, 17)
    straight, resumed = Turns(rows, 3, "a"), Turns(rows, 3, "a")
    drawn = np.concatenate([straight.drawn(start, 2) for start in range(0, 28, 2)])
    assert made == [0, 1, 2, 3]
    assert [*drawn[24:28]] == [*resumed.drawn(24, 2), *resumed.drawn(26, 2)]
    assert made == [0, 1, 2, 3, 3]


def mixed_draw(counts: bool = False) -> MixedDraw:
    made = mixture([0.2, 0.5, 0.3])
    rows = {name: np.arange(size) for name, size in made.sizes.items()}
    tokens = {name: 1 + rows[name] % 5 for name in rows} if counts else None
    return MixedDraw(made, rows, 0, {name: f"{name}/train" for name in rows}, tokens)


@pytest.mark.parametrize("counts", [False, True])
def test_ranks_and_micro_batches_divide_one_batch(counts: bool) -> None:
    """The weighted mean of the parts' mean losses is the mean loss of the batch."""
    draw = mixed_draw(counts)

    def value(key: Key) -> float:
        return key.row + 100.0 * ord(key.source[0])

    def tokens(key: Key) -> int:
        return 1 + key.row % 5 if counts else 1

    for step in range(6):
        (whole,) = draw(step, 1)
        total = sum(map(tokens, whole))
        mean = sum(value(key) * tokens(key) for key in whole) / total
        for parts in (2, 4, 5):
            cut = draw(step, parts)
            keys = sorted((k.source, k.row) for part in cut for k in part)
            assert keys == sorted((k.source, k.row) for k in whole)
            means = [
                part[0].weight
                * sum(value(k) * tokens(k) for k in part)
                / sum(tokens(k) for k in part)
                for part in cut
            ]
            assert sum(means) / parts == pytest.approx(mean)


def test_a_source_is_seen_evenly_over_steps() -> None:
    draw = mixed_draw()
    seen: dict[str, list[int]] = {}
    for step in range(20):
        for key in draw(step, 1)[0]:
            seen.setdefault(key.source, []).append(key.row)
    for rows in seen.values():
        times = np.unique(rows, return_counts=True)[1]
        assert times.max() - times.min() <= 1


def test_probes_are_held_out() -> None:
    rows = np.arange(100, 200)
    lengths = np.arange(1, 101)
    train, probe = held_out(rows, lengths, 500, seed=0, source="a")
    assert sorted([*train, *probe]) == rows.tolist()
    found = lengths[probe - 100]
    assert found.sum() >= 500 > found.sum() - found.max()
    assert (
        held_out(rows, 17, 100, 0, "a")[1].tolist() != held_out(rows, 17, 100, 0, "b")[1].tolist()
    )
    assert len(held_out(rows, 17, 100, 0, "a")[1]) == 6
    small = held_out(np.arange(10), np.full(10, 20), 2000, 0, "rte")  # a fifth at most
    assert [len(part) for part in small] == [8, 2]
    assert [len(part) for part in held_out(np.arange(2), 9, 2000, 0, "rte")] == [1, 1]
    with pytest.raises(ConfigError, match=r"mixing: rte has 1 training example.*leave it out"):
        held_out(np.arange(1), 9, 2000, 0, "rte")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_probe(world: int) -> None:
    ranks = [probe_slices([5, 1, 8], 2, rank, world) for rank in range(world)]
    assert len({len(each) for each in ranks}) == 1  # batches, some of them empty
    for source, size in enumerate((5, 1, 8)):
        places = [n for rank in ranks for each, own in rank if each == source for n in own]
        assert sorted(places) == list(range(size))
        assert max(len(own) for rank in ranks for _, own in rank) <= 2
