"""Jobs of a sweep that share a composition are checked and named as if each had its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.check import problems
from dynmoe.config.compose import Composer, parse, parser, preflight, search_path, single_values
from dynmoe.config.runs import flat, previous_run, run_name
from dynmoe.config.shared import Shared, Swept, once
from dynmoe.config.sweeps import read_sweep

SWEEPS = {
    "grid": ("sweep=topk_grid task=vit_domainbed seed=0,1 task.optimizer.lr=1e-3,-1", 9),
    "stages": ("sweep=vl_small task=vl seed=0,1 task.optimizer.lr=1e-3,2e-3", 7),
    "two keys": (
        "sweep=smoke task=glue data.batch_size=12,16 trainer.accumulate_grad_batches=1,3",
        2,
    ),
    "types": ("sweep=smoke task=vit_domainbed task.steps=11,1.5,yes trial_seed=0,1", 3),
    "recipes": ("sweep=smoke task=vit_domainbed hparams_seed=0,1 trial_seed=0,1", 3),
}


def facts(cfg: DictConfig) -> Any:
    found = problems(cfg, multirun=True)
    return found or (run_name(cfg), [*flat(cfg).items()], previous_run(cfg), cfg.task.eval_every)


@pytest.mark.parametrize("case", SWEEPS)
def test_as_alone(case: str) -> None:
    text, every = SWEEPS[case]
    words = text.split()
    with search_path():
        overrides, _ = parse(words)
        composer = Composer(overrides, None)
        first = [single for each in overrides for single in single_values(each)[:1]]
        node = composer.compose(first).cfg.hydra.sweeper
        jobs = read_sweep(parser(), node, overrides).jobs
        given = [parse(job.overrides)[0] for job in jobs]
        together = []
        for job in given:
            with composer.shared.job(job) as made:
                together.append(facts(made.cfg))
        compositions = {id(made) for made, _ in composer.shared._made.values()}
        assert len(compositions) < len(jobs) / 2
        assert len({str(each) for each in together}) > len(compositions)
        for number in range(0, len(jobs), every):
            assert together[number] == facts(composer.compose(given[number]).cfg), jobs[number]


def test_a_late_value_is_refused() -> None:
    seeds = ",".join(map(str, [*range(200), -5, *range(201, 300)]))
    found = preflight(["task=vit_domainbed", "sweep=topk_grid", f"seed={seeds}"]).problems
    assert found == ["seed: expected from 0 to 4294967295, found -5"]


def test_kept_by_what_is_read() -> None:
    """Which values a function reads may depend on values, through copies and other functions."""
    made: list[DictConfig] = []
    calls: list[tuple[int, int]] = []

    def compose(overrides: Sequence[Override]) -> DictConfig:
        values = {each.key_or_group: each.value() for each in overrides}
        made.append(OmegaConf.create({**values, "twin": "${b}"}))
        return made[-1]

    def total(cfg: DictConfig) -> int:
        calls.append((cfg.a, cfg.twin if cfg.a > 1 else 0))
        return sum(calls[-1])

    def outer(cfg: DictConfig) -> int:
        return once(cfg, "inner", lambda: total(cfg))

    shared = Shared(compose, lambda cfg: cfg, lambda key: False)
    found = []
    for a, b in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 1), (1, 1)):
        with search_path():
            given, _ = parse([f"++a={a}", f"++b={b}"])
        with shared.job(given) as cfg:
            found.append(once(cfg, "outer", lambda cfg=cfg: outer(cfg)))
    assert found == [1, 1, 3, 4, 3, 1]
    assert calls == [(1, 0), (2, 1), (2, 2)] and len(made) == 1


@pytest.mark.parametrize("text", ["a=null", "a=[1]", "a={b: 1}", "a=${b}", "group=1", "~a"])
def test_more_than_a_value_is_composed(text: str) -> None:
    values = {"a=[1]": [1], "a={b: 1}": {"b": 1}}
    composed: list[Any] = []

    def compose(overrides: Sequence[Override]) -> DictConfig:
        composed.append(overrides)
        return OmegaConf.create({"a": values.get(text), "b": 2, "group": 1})

    shared = Shared(compose, lambda cfg: cfg, lambda key: key == "group")
    with search_path():
        (override,), _ = parse([text])
    with shared.job([override]) as cfg:
        assert not any(isinstance(cfg._get_node(key), Swept) for key in cfg)


def test_a_value_in_a_mapping_that_is_given_too_is_composed() -> None:
    shared = Shared(lambda _: OmegaConf.create({"m": {"a": 1}}), lambda cfg: cfg, lambda _: False)
    for text, kept in (("m={a: 1}", False), ("n=1", True)):
        with search_path():
            given, _ = parse(["m.a=1", text])
        with shared.job(given) as cfg:
            assert isinstance(cfg.m._get_node("a"), Swept) == kept
