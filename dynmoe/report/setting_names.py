"""The settings of a problem: which configurations are one, and a name that no other one has."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynmoe.report.run import DENSE, Config, Run, short_name

# Keys that distinguish repetitions of one setting.
REPETITION = ("seed", "trial_seed", "data.test_envs")

# Keys of where data lie, how they are read, and what is evaluated or fitted besides.
READING = (
    "data.root",
    "data.source",
    "data.eval_batch_size",
    "data.ood",
    "data.ood_root",
    "data.linear_baseline",
    "data.content.root",
    "data.question_sets",
    "data.examples",
)

# The end of a run folder's name: one of the repetitions of a configuration.
OF_SEED = re.compile(r"_seed\d+_[0-9a-f]{8}$")

# Keys that hparams_seed > 0 draws at random.
DRAWN = ("task.optimizer.lr", "task.optimizer.weight_decay", "data.batch_size")


ABSENT = "absent"
FEW = 4
"""Up to so many settings of one short name say every key in which they differ."""


def name_settings(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with the names of their settings, unique within a problem.

    A name is the short name; where several settings would share it, the keys in which they differ
    are added: `DynMoE, task.optimizer.lr=0.001`. Where more than ``FEW`` share it and most have a
    key alike, the others alone name their value: those with one part changed.
    """
    named = list(runs)
    for problem in dict.fromkeys(run.problem for run in runs):
        members = [position for position, run in enumerate(runs) if run.problem == problem]
        shorts = [short_name(runs[position]) for position in members]
        identities = _identities([runs[position].config for position in members])
        sharing: defaultdict[str, dict[str, Config]] = defaultdict(dict)
        for short, identity in zip(shorts, identities, strict=True):
            sharing[short][_text(identity)] = identity
        words = {short: _words(found) for short, found in sharing.items()}
        for position, short, identity in zip(members, shorts, identities, strict=True):
            setting = ", ".join([short, *words[short][_text(identity)]])
            named[position] = runs[position].named(setting)
    return named


def _words(identities: Mapping[str, Config]) -> dict[str, list[str]]:
    """The keys that tell settings of one short name apart, with their values, by setting."""
    differing = _differing(list(identities.values()))
    usual = {}
    for key in differing:
        counts = Counter(_text({key: each.get(key, ABSENT)}) for each in identities.values())
        value, count = counts.most_common(1)[0]
        usual[key] = value if 2 * count > len(identities) > FEW else None
    found = {
        name: [
            f"{key}={each[key]}"
            for key in differing
            if key in each and _text({key: each[key]}) != usual[key]
        ]
        for name, each in identities.items()
    }
    if len({*map(tuple, found.values())}) == len(found):
        return found
    return {  # two that differ only in what one of them lacks
        name: [f"{key}={each[key]}" for key in differing if key in each]
        for name, each in identities.items()
    }


def start_name(config: Config) -> str | None:
    """Return the run of the stage before without its seed: `vl_instruct/scenes_dense`; or None."""
    start = config.get("stage.start")
    return OF_SEED.sub("", start) if start else None


def _identities(configs: Sequence[Config]) -> list[Config]:
    """Return each configuration without the keys that do not distinguish settings."""
    chance = (*REPETITION, "hparams_seed", *READING)
    plain = [
        {
            key: value
            for key, value in _by_name(config).items()
            if key not in (*chance, *(config.get("protocol.searched") or ()))
        }
        for config in configs
    ]
    without_draw = [{**config, **dict.fromkeys(DRAWN, "drawn")} for config in plain]
    is_draw = [config.get("hparams_seed", 0) > 0 for config in configs]
    searches = {_text(found) for found, drawn in zip(without_draw, is_draw, strict=True) if drawn}
    # NOTE: hparams_seed 0, the protocol's own values, is the first of the draws. But where these
    # values were varied by hand, none of the variants is known to be it.
    by_hand: defaultdict[str, set[str]] = defaultdict(set)
    for config, found, drawn in zip(plain, without_draw, is_draw, strict=True):
        if not drawn:
            by_hand[_text(found)].add(_text(config))
    return [
        found if drawn or (_text(found) in searches and len(by_hand[_text(found)]) == 1) else config
        for config, found, drawn in zip(plain, without_draw, is_draw, strict=True)
    ]


def _by_name(config: Config) -> Config:
    """Replace paths by their last part: weights are known by the name of their folder or on the
    hub. The run of the stage before is named without its seed."""
    found = dict(config)
    if config.get("moe.router", "") is None:
        found["moe.algorithm"] = DENSE
    if "stage.start" in found:
        found["stage.start"] = start_name(config)
    if "backbone.path" in found:
        found["backbone.model"] = found.pop("backbone.path") or found.get("backbone.model")
    for key in ("backbone.model", "backbone.vision.path", "data.tokenizer_path"):
        if found.get(key):
            found[key] = Path(found[key]).name
    return found


def _differing(identities: Sequence[Config]) -> list[str]:
    keys = sorted({key for identity in identities for key in identity})
    return [
        key
        for key in keys
        if len({_text({key: found[key]} if key in found else {}) for found in identities}) > 1
    ]


def _text(config: Config) -> str:
    return json.dumps(config, sort_keys=True)
