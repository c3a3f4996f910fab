"""Settings: which configurations are one setting, and its name.

A configuration is the flat `config` of a `run.json`. Configurations of one setting differ in chance
alone: in seeds, in the test environment, in where data and weights lie and how they are read, in
additional evaluations, and in the repetition of the previous stage that they start from. Draws of
hyper-parameters (`hparams_seed`) belong to one setting too: the search is part of the method, as in
DomainBed. So do the values of the keys that a protocol searches over (`protocol.searched`), as the
learning rate on GLUE.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

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


def name_settings(short_names: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """Return the name of each configuration's setting, unique among these configurations.

    It is the short name; where several settings would share it, the keys in which they differ are
    added: `DynMoE, task.optimizer.lr=0.001`.
    """
    identities = _identities(configs)
    sharing: defaultdict[str, dict[str, Config]] = defaultdict(dict)
    for short, identity in zip(short_names, identities, strict=True):
        sharing[short][_text(identity)] = identity
    differing = {short: _differing(list(found.values())) for short, found in sharing.items()}
    return [
        ", ".join(
            [short, *(f"{key}={identity[key]}" for key in differing[short] if key in identity)]
        )
        for short, identity in zip(short_names, identities, strict=True)
    ]


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
