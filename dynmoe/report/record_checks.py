"""The entries of records that reports need, checked as they are read: an error names the place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

from dynmoe.records import Record, RecordError, RunFolder
from dynmoe.report.run import Run
from dynmoe.selection import RULES

Keys = Mapping[str, type | tuple[type, ...]]

NUMBER = (int, float)
KNOWN_OR_NOT = (dict, type(None))
FACTS: Keys = {
    **dict.fromkeys(("dataset", "protocol", "selection", "modality", "measure"), str),
    **dict.fromkeys(("backbone", "weights", "data_hash", "device"), str),
    **dict.fromkeys(("seed", "trial_seed", "hparams_seed", "threads"), int),
    **dict.fromkeys(("steps", "batch_size", "samples_per_step"), int),
    **dict.fromkeys(("env_names", "test_envs", "class_names"), list),
    **dict.fromkeys(("config", "selects", "reported", "costs", "start_experts"), dict),
    **dict.fromkeys(("sizes", "versions", "machine", "runtime"), dict),
}
CONFIG: Keys = {"moe.algorithm": str, "moe.num_experts": int, "hparams_seed": int}
COSTS: Keys = {"parameters": dict, "slots": dict, "flops": KNOWN_OR_NOT}
RESULT: Keys = {
    **dict.fromkeys(("args", "scores"), dict),
    **dict.fromkeys(("step_time", "eval_time", "mem_gb"), NUMBER),
}
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


def check_config(place: str, config: Any) -> None:
    """Raises RecordError where a flat configuration, at `place`, lacks what a report needs."""
    _expect(place, config, CONFIG)


def check_facts(folder: RunFolder, facts: Record) -> None:
    """Raises RecordError where `run.json` lacks what a report needs."""
    file = folder.path / "run.json"
    _expect(str(file), facts, FACTS)
    check_config(f"{file}, config", facts["config"])
    _expect(f"{file}, costs", facts["costs"], COSTS)
    layers = facts["costs"]["slots"]
    _expect(f"{file}, start_experts", facts["start_experts"], dict.fromkeys(layers, int))
    for role in ("selects", "reported"):
        _expect(f"{file}, {role}", facts[role], {"sets": list, "measure": str})
    if facts["selection"] not in RULES:
        raise _error(str(file), f"`selection` as one of {', '.join(RULES)}", facts["selection"])
    if not all(index in range(len(facts["env_names"])) for index in facts["test_envs"]):
        raise _error(str(file), "`test_envs` as positions in `env_names`", facts["test_envs"])


def check_results(folder: RunFolder, facts: Record, results: Sequence[Record]) -> None:
    """Raises RecordError where a result lacks a score that selects or is reported."""
    file = folder.path / "results.jsonl"
    scores = [
        (name, {facts[role]["measure"]: NUMBER})
        for role in ("selects", "reported")
        for name in facts[role]["sets"]
    ]
    for number, record in enumerate(results, start=1):
        place = f"{file}, line {number}"
        _expect(place, record, RESULT)
        for name, measure in scores:
            if not _is_as(record["scores"].get(name), measure):
                _expect(f"{place}, scores of {name}", record["scores"].get(name), measure)
        for key in ("test_envs", "hparams_seed"):  # by which selection finds a run's records
            if record["args"].get(key) != facts[key]:
                expected = f"`{key}` {facts[key]} in `args`, as in run.json"
                raise _error(place, expected, record["args"].get(key, "none"))


def check_losses(folder: RunFolder, facts: Record, results: Sequence[Record]) -> None:
    """Raises RecordError where a set that selects or is reported has no loss."""
    names = dict.fromkeys(chain(facts["selects"]["sets"], facts["reported"]["sets"]))
    lacking = [
        name for name in names if any("loss" not in each["scores"][name] for each in results)
    ]
    if lacking:
        raise RecordError(
            f"{folder.path}: no loss was recorded on {', '.join(lacking)} (questions without a "
            "reference answer have none); leave --by-loss out"
        )


def check_routing(run: Run) -> None:
    """Read the routing and events that reports need; they are kept, and not read again.

    Raises:
        RecordError: a damaged line, or a layer or an environment without its line.
    """
    file = run.folder.path / "routing.jsonl"
    try:
        lines = [*run.routing_at_outcome, *([] if run.kind == "fixed" else run.training_routing)]
    except ValueError:  # it does not know the line; reading all of them does
        lines = run.folder.read("routing")
    for line in lines:
        _expect(f"{file}, step {line['step']}", line, ROUTING)
    for event in run.events:
        _expect(f"{file.with_name('events.jsonl')}, step {event['step']}", event, EVENT)
    lines = [line for line in run.routing_at_outcome if line["source"] != "train"]
    found = {(line["layer"], line["source"]) for line in lines}
    if found and found != set(product(run.facts["start_experts"], run.facts["env_names"])):
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


def _is_as(content: Any, keys: Keys) -> bool:
    return isinstance(content, dict) and all(
        key in content and isinstance(content[key], kind) for key, kind in keys.items()
    )


def _error(place: str, expected: str, found: object) -> RecordError:
    return RecordError(
        f"{place}: expected {expected}, found {str(found)[:60]}; run it again with overwrite=true"
    )
