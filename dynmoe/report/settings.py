"""Which configurations are one setting, and what it is called.

A configuration is the flat `config` of a `run.json`. Those of one setting differ in chance alone:
in seeds, in the environment they are tested on, in where data and weights lie and how they are
read, in what is evaluated besides, and in which repetition of the stage before they start from.
Draws of hyper-parameters (`hparams_seed`) belong to one setting too: the search is part of the
method, as in DomainBed. So do the values of the keys that a protocol searches over
(`protocol.searched`), as the learning rate on GLUE.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

# What distinguishes repetitions of one setting.
REPETITION = ("seed", "trial_seed", "data.test_envs")

# Where data lie, how they are read, and what is evaluated or fitted besides.
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

# What hparams_seed > 0 draws at random (dynmoe/config/stages.py).
DRAWN = ("task.optimizer.lr", "task.optimizer.weight_decay", "data.batch_size")


def name_settings(short_names: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """The name of each configuration's setting, unique among these configurations.

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
    """What a run starts from, whichever repetition: `vl_instruct/scenes_dense`; None: nothing."""
    start = config.get("stage.start")
    return OF_SEED.sub("", start) if start else None


def _identities(configs: Sequence[Config]) -> list[Config]:
    """Each configuration without what does not distinguish settings."""
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
    # hparams_seed 0, the protocol's own values, is the first of the draws. But where somebody has
    # varied these values by hand, none of them can be told to be that.
    by_hand: defaultdict[str, set[str]] = defaultdict(set)
    for config, found, drawn in zip(plain, without_draw, is_draw, strict=True):
        if not drawn:
            by_hand[_text(found)].add(_text(config))
    return [
        found if drawn or (_text(found) in searches and len(by_hand[_text(found)]) == 1) else config
        for config, found, drawn in zip(plain, without_draw, is_draw, strict=True)
    ]


def _by_name(config: Config) -> Config:
    """With the last part of a path for the path: weights are known by the folder's name, or by the
    hub's, wherever they lie. The run of the stage before goes without its seed."""
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
