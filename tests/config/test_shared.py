"""Jobs of a sweep that share a composition are checked and named as if each had its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dynmoe.config import options
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
        composer = Composer(overrides)
        jobs = sweep_jobs(composer, overrides)
        given = [parse(job)[0] for job in jobs]
        together = []
        for job in given:
            with composer.shared.job(job) as made:
                together.append(facts(made.cfg))
        compositions = {id(made) for made, *_ in composer.shared._made.values()}
        assert len(compositions) < len(jobs) / 2
        assert len({str(each) for each in together}) > len(compositions)
        for number in range(0, len(jobs), every):
            assert together[number] == facts(composer.compose(given[number]).cfg), jobs[number]


def sweep_jobs(composer: Composer, overrides: Sequence[Override]) -> list[tuple[str, ...]]:
    firsts = [single for each in overrides for single in single_values(each)[:1]]
    node = composer.compose(firsts).cfg.hydra.sweeper
    return [job.overrides for job in read_sweep(parser(), node, overrides).jobs]


def plain(cfg: DictConfig) -> Any:
    """What is written, in its order; of Hydra's own keys those that the jobs' overrides set not."""
    found: Any = OmegaConf.to_container(cfg)
    del found["hydra"]["overrides"], found["hydra"]["job"]["override_dirname"]
    return json.dumps(found, default=str)


def test_every_mixture_is_put_into_its_place() -> None:
    """As if Hydra composed it, whatever mixture the task has without it."""
    with search_path():
        for task in ("vit_domainbed", "glue"):
            for name in options.options("moe")[task == "glue" :: 5]:
                lines = [f"task={task}", f"moe={name}", "hydra.sweeper.max_batch_size=3"]
                made = Composer([]).compose(parse(lines)[0])
                assert made.apart == "moe"
                assert plain(made.cfg) == plain(compose("config", lines, return_hydra_config=True))


def test_a_mixture_that_others_change_is_composed() -> None:
    lines = ["task=glue", "moe=dynmoe", "schedule=glue_code"]
    with search_path():
        made = Composer([]).compose(parse(lines)[0])
        assert made.apart == ""
        assert plain(made.cfg) == plain(compose("config", lines, return_hydra_config=True))


@pytest.mark.parametrize("text", ["", "optional "])
def test_files_that_follow_the_mixture_are_composed(tmp_path: Path, text: str) -> None:
    """Hydra knows the choice `${moe}` in the groups before it."""
    for folder, content in {
        "backbone": f"defaults: [vit_digits, {{{text}/own@_global_: '${{moe}}'}}, _self_]",
        "own": "backbone: {seen: true}",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "topk.yaml").write_text(content)
    lines = ["task=vit_domainbed", "moe=topk", "backbone=topk"]
    search = f"hydra.searchpath=[file://{tmp_path}]"
    with search_path():
        overrides = parse([search, *lines])[0]
        made = Composer(overrides).compose(overrides)
    assert (made.cfg.moe.name, made.cfg.backbone.seen, made.apart) == ("topk", True, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "task"),
    [
        *(("routers", task) for task in ("vit_domainbed", "glue", "lm", "vl")),
        *((name, "lm") for name in ("ablation", "frontier", "frontier_routers", "lm_small")),
        *(("glue_small", "glue"), ("paper_glue", "glue"), ("vl_small", "vl")),
        *((name, "vit_domainbed") for name in ("pacs_small", "paper_vision", "smoke", "topk_grid")),
    ],
)
def test_every_shipped_sweep_is_checked_and_named_as_hydra_composes_it(
    sweep: str, task: str
) -> None:
    with search_path():
        overrides, _ = parse([f"sweep={sweep}", f"task={task}", "seed=5,6", "name=x"])
        composer = Composer(overrides)
        jobs = sweep_jobs(composer, overrides)
        together = []
        for job in jobs:
            with composer.shared.job(parse(job)[0]) as made:
                together.append(facts(made.cfg))
        for job, found in list(zip(jobs, together, strict=True))[::3]:
            assert found == facts(compose("config", list(job), return_hydra_config=True)), job


def test_results_that_read_no_mixture_are_shared() -> None:
    """And those that read it, through a copy or by Hydra's word for its choice, are not."""
    calls: list[str] = []

    def made(overrides: Sequence[Override]) -> DictConfig:
        values = {each.key_or_group: each.value() for each in overrides}
        moe = {"k": values["moe.k"], "name": values["moe"]}
        others = {"a": values["a"], "copy": "${moe.k}", "node": {"b": 1, "up": "${..moe.name}"}}
        choices = {"runtime": {"choices": {"moe": values["moe"]}}}
        return OmegaConf.create({**others, "moe": moe, "hydra": choices})

    def read(cfg: DictConfig, key: str) -> Any:
        def compute() -> Any:
            calls.append(key)
            return OmegaConf.select(cfg, key)

        return once(cfg, key, compute)

    shared = Shared(made, lambda cfg: cfg, lambda key: key == "moe", lambda _: "moe")
    found = []
    for name, k, a in ((1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 1), (1, 1, 2)):
        with search_path():
            given, _ = parse([f"moe=m{name}", f"moe.k={k}", f"a={a}"])
        with shared.job(given) as cfg:
            found.append(
                (
                    *(read(cfg, key) for key in ("a", "copy", "moe.k", "node.b", "node.up")),
                    read(cfg.moe, "k"),
                    read(cfg.node, "up"),
                    read(cfg, "hydra.runtime.choices.moe"),
                )
            )
            m = f"m{name}"
            assert found[-1] == (a, k, k, 1, m, k, m, m)
    assert calls.count("a") == 2 and calls.count("node.b") == 1 and calls.count("node.up") == 2
    assert calls.count("copy") == 4 and calls.count("k") == 4 and calls.count("up") == 2


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
