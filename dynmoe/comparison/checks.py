"""What reports need of a run's records, checked as they are read: a damaged one is named there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from dynmoe.comparison.run import Run
from dynmoe.records import Record, RecordError, RunFolder
from dynmoe.selection import RULES, judging_set, on_sets

Keys = Mapping[str, type | tuple[type, ...]]

NUMBER = (int, float)
KNOWN_OR_NOT = (dict, type(None))
FACTS: Keys = {
    **dict.fromkeys(("dataset", "protocol", "selection", "backbone", "weights"), str),
    **dict.fromkeys(("seed", "trial_seed", "hparams_seed", "steps", "batch_size"), int),
    **dict.fromkeys(("env_names", "test_envs", "class_names"), list),
    **dict.fromkeys(("config", "parameters", "start_experts"), dict),
}
CONFIG: Keys = {"moe.algorithm": str, "moe.num_experts": int, "hparams_seed": int}
COSTS: Keys = {"parameters": dict, "slots": dict, "flops": KNOWN_OR_NOT}
ROUTING: Keys = {
    **dict.fromkeys(("layer", "source"), str),
    **dict.fromkeys(("slots", "load"), list),
    **dict.fromkeys(("tokens", "mean_k"), NUMBER),
}
EVENT: Keys = {"layer": str, "after": int}
KINDS: Mapping[object, str] = {
    str: "text",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    NUMBER: "a number",
    KNOWN_OR_NOT: "an object or null",
}


def check_facts(folder: RunFolder, facts: Record) -> None:
    """Raises RecordError where `run.json` lacks what a report needs."""
    file = folder.path / "run.json"
    if "config" not in facts:
        raise RecordError(
            f"{folder.path}: expected `config` in run.json, found a run of an earlier version; "
            "run it again with overwrite=true"
        )
    _expect(str(file), facts, FACTS)
    check_config(f"{file}, config", facts["config"])
    if facts.get("costs") is not None:  # which early versions did not record
        _expect(f"{file}, costs", facts["costs"], COSTS)
    _expect(f"{file}, parameters", facts["parameters"], {"layers": dict})
    layers = facts["parameters"]["layers"]
    _expect(f"{file}, start_experts", facts["start_experts"], dict.fromkeys(layers, int))
    if facts["selection"] not in RULES:
        raise _error(str(file), f"`selection` as one of {', '.join(RULES)}", facts["selection"])
    if not all(index in range(len(facts["env_names"])) for index in facts["test_envs"]):
        raise _error(str(file), "`test_envs` as positions in `env_names`", facts["test_envs"])


def check_config(place: str, config: Any) -> None:
    """Raises RecordError where a configuration does not tell what its mixture is called."""
    _expect(place, config, CONFIG)


def check_results(folder: RunFolder, facts: Record, results: Sequence[Record]) -> None:
    """Raises RecordError where a result lacks an accuracy or a score."""
    rule, names = facts["selection"], facts["env_names"]
    if on_sets(rule):
        keys = [f"{name}_score" for name in (*names, judging_set(facts))]
    else:
        keys = [f"env{env}_{split}_acc" for env in range(len(names)) for split in ("in", "out")]
    measures: Keys = dict.fromkeys(keys, NUMBER)
    for number, record in enumerate(results, start=1):
        place = f"{folder.path / 'results.jsonl'}, line {number}"
        times: Keys = {key: NUMBER for key in ("step_time", "eval_time") if key in record}
        _expect(place, record, {"args": dict, **measures, **times})
        for key in ("test_envs", "hparams_seed"):  # by which selection finds a run's records
            if record["args"].get(key) != facts[key]:
                expected = f"`{key}` {facts[key]} in `args`, as in run.json"
                raise _error(place, expected, record["args"].get(key, "none"))


def check_routing(run: Run) -> None:
    """Read what reports read of a run's routing and events; it is kept, and not read again.

    Raises:
        RecordError: a damaged line, or a layer or an environment without its line.
    """
    file = run.folder.path / "routing.jsonl"
    try:
        lines = [*run.routing_at_outcome, *(run.routing if run.kind == "adaptive" else [])]
    except ValueError:  # it does not know the line; reading all of them does
        lines = run.folder.read("routing")
    for line in lines:
        _expect(f"{file}, step {line['step']}", line, ROUTING)
    for event in run.events:
        _expect(f"{file.with_name('events.jsonl')}, step {event['step']}", event, EVENT)
    layers = run.facts["parameters"]["layers"]
    sources = [f"env{index}" for index in range(len(run.facts["env_names"]))]
    lines = [line for line in run.routing_at_outcome if line["source"] != "train"]
    found = {(line["layer"], line["source"]) for line in lines}
    if found and found != set(product(layers, sources)):
        raise _error(
            str(file),
            f"a line for every layer and environment at step {run.outcome.step}",
            f"{len(found)} lines",
        )


def _expect(place: str, content: Any, keys: Keys) -> None:
    if not isinstance(content, dict):
        raise _error(place, "an object", content)
    for key, kind in keys.items():
        if key not in content or not isinstance(content[key], kind):
            raise _error(place, f"`{key}` as {KINDS[kind]}", content.get(key, "none"))


def _error(place: str, expected: str, found: object) -> RecordError:
    return RecordError(
        f"{place}: expected {expected}, found {str(found)[:60]}; run it again with overwrite=true"
    )
