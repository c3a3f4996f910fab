"""Options of ``dynmoe-eval mode=quantize``: how weights are rounded, and which get how many bits.

Every key ``quant.*`` but ``quant.calib.batches`` and ``quant.export`` takes one value or several,
separated by commas; every combination is one quantisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from dynmoe.backbones.families import FAMILIES
from dynmoe.config import models
from dynmoe.config.ranges import COUNT, NOT_NEGATIVE, SEED, Range

PREFIX = "quant."
METHODS = ("gptq", "rtn")
EXPORTS = ("int8", "int4")
BITS = (2, 3, 4, 5, 6, 7, 8)
UNTOUCHED = 16
"""Bits of layers that are left as they are."""

RULES = {
    "experts": ("frequency", "rare", "random"),
    "blocks": ("first", "last", "random", "predictor"),
    "linears": ("outlier", "random"),
}
"""By what each policy chooses the linear layers that get more bits (``quant.bits.high``)."""
TAKES = {
    "experts": "a number for each layer, or a share of the experts of all layers below 1",
    "blocks": "a number",
    "linears": "a share above 0, up to 1",
}


class Choice(NamedTuple):
    """``rule:amount``, as in ``frequency:2``."""

    rule: str
    amount: float

    def __str__(self) -> str:
        return f"{self.rule}:{self.amount:g}"


@dataclass(frozen=True)
class Quantisation:
    """One quantisation; ``BITS_OF`` tells which of its options are keys ``quant.bits.*``.

    Bits are given in this order, later ones win: default, attention, FFNs that are no mixtures,
    shared experts, chosen experts, FFNs of chosen blocks, chosen linear layers of FFNs, named
    modules. None: those of before.
    """

    method: str = "gptq"
    default: int = 4
    attention: int | None = None
    dense: int | None = None
    shared: int | None = None
    experts: Choice | None = None
    blocks: Choice | None = None
    linears: Choice | None = None
    high: int = 4
    named: Mapping[str, int] | None = None
    group_size: int = 128
    sym: bool = True
    mse: bool = False
    percdamp: float = 0.01
    desc_act: bool = False
    static_groups: bool = False
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """The options by their keys below ``quant``, as records hold them."""
        values = {key: getattr(self, name) for key, name in OPTIONS.items()}
        return {k: str(v) if isinstance(v, Choice) else v for k, v in values.items()}


BITS_OF = ("default", "attention", "dense", "shared", *RULES, "high", "named")
OPTIONS = {
    f"bits.{each.name}" if each.name in BITS_OF else each.name: each.name
    for each in fields(Quantisation)
}
"""Names of options by their keys below ``quant``."""
BATCHES = 8
KEYS = tuple(f"{PREFIX}{key}" for key in (*OPTIONS, "calib.batches", "export"))


def quantisations_of(cfg: DictConfig) -> list[Quantisation]:
    """Return every combination of the given values, the last key's moving first."""
    several = {
        OPTIONS[key]: [_value(key, each) for each in _several(value)]
        for key, value in _given(cfg).items()
        if key in OPTIONS
    }
    return [
        Quantisation(**dict(zip(several, values, strict=True)))
        for values in itertools.product(*several.values())
    ]


def batches_of(cfg: DictConfig) -> int:
    """Return the number of training batches that calibrate."""
    return int(_given(cfg).get("calib.batches", BATCHES))


def exports_of(cfg: DictConfig) -> list[str]:
    """Return the formats to export to."""
    given = _given(cfg).get("export")
    return [] if given is None else [str(each) for each in _several(given)]


def quantize_problems(cfg: DictConfig) -> Iterator[str]:
    """Say what is wrong with the keys ``quant.*``, or does not fit this run."""
    for key, value in _given(cfg).items():
        values = _several(value)
        if key == "export":
            wrong = [each for each in values if each not in (*EXPORTS, None)]
        elif key == "calib.batches":
            wrong = [] if _is(value, int, COUNT) else [value]
        else:
            wrong = [each for each in values if not _fits(key, each)]
        if wrong or not values:
            yield f"{PREFIX}{key}: expected {_expected(key)}, found {_shown(wrong)}"
        elif key in ("bits.experts", "bits.shared") and any(each is not None for each in values):
            yield from _unfit(cfg, key, [_value(key, each) for each in values])
        elif key == "bits.blocks":
            yield from _unpredictable(cfg, key, [_value(key, each) for each in values])


def _unfit(cfg: DictConfig, key: str, values: list[Any]) -> Iterator[str]:
    """Policies for experts that this run does not have."""
    moe = cfg.moe
    if moe.get("router") is None:
        yield f"{PREFIX}{key}: this run has no MoE layer. Leave it out, or give another run"
    elif key == "bits.shared":
        family = FAMILIES.get(models.model_type(cfg) or "")
        if not moe.get("shared_experts", 0) and (family is None or family.shared is None):
            yield f"{PREFIX}{key}: this run has no shared experts. Leave it out"
    elif any(each.amount > moe.max_experts for each in values if each is not None):
        yield f"{PREFIX}{key}: a layer has up to {moe.max_experts} experts, found {_shown(values)}"
    elif str(moe.router.get("_target_")).endswith("SoftSlots") and any(
        each.rule != "random" for each in values if each is not None
    ):
        yield (
            f"{PREFIX}{key}: in Soft MoE every expert serves as much as the others. Choose "
            f"{PREFIX}{key}=random:N"
        )


def _unpredictable(cfg: DictConfig, key: str, values: list[Any]) -> Iterator[str]:
    """The predictor, of blocks that do not hand on every token they get."""
    fewer = OmegaConf.select(cfg, "backbone.token_sparsify") is not None
    if fewer and any(each.rule == "predictor" for each in values if each is not None):
        yield (
            f"{PREFIX}{key}: predictor compares each token before and after a block, and "
            "backbone.token_sparsify leaves some out between. Choose first:N, last:N or random:N"
        )


def _given(cfg: DictConfig) -> dict[str, Any]:
    """The keys below ``quant`` that are given, flat; ``bits.named`` keeps its mapping."""
    node = OmegaConf.select(cfg, "quant")
    tree: Any = {} if node is None else OmegaConf.to_container(node)
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        return [yaml.safe_load(word) for word in words]
    return value if isinstance(value, list) else [value]


def _value(key: str, given: Any) -> Any:
    if given is not None and key.removeprefix("bits.") in RULES:
        return _choice(key, given)
    return float(given) if key == "percdamp" else given


def _choice(key: str, given: Any) -> Choice | None:
    """Read ``rule:amount``; None where it is none."""
    rule, _, amount = str(given).partition(":")
    policy = key.removeprefix("bits.")
    try:
        number = float(amount)
    except ValueError:
        return None
    share = 0 < number < 1
    whole = number >= 1 and number == int(number)
    fits = {"experts": share or whole, "blocks": whole, "linears": share or number == 1}
    return Choice(rule, number) if rule in RULES[policy] and fits[policy] else None


def _fits(key: str, value: Any) -> bool:
    policy = key.removeprefix("bits.")
    if policy in RULES:
        return value is None or _choice(key, value) is not None
    if policy == "named":
        return value is None or (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(n, str) and _is_bits(bits) for n, bits in value.items())
        )
    if key.startswith("bits."):
        return _is_bits(value) or (value is None and policy in ("attention", "dense", "shared"))
    if key == "method":
        return value in METHODS
    if key == "group_size":
        return _is(value, int, COUNT) or value == -1
    if key == "percdamp":
        return _is(value, int | float, NOT_NEGATIVE)
    return _is(value, int, SEED) if key == "seed" else isinstance(value, bool)


def _is(value: Any, kind: Any, within: Range) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and within.holds(value)


def _is_bits(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (*BITS, UNTOUCHED)


def _expected(key: str) -> str:
    policy = key.removeprefix("bits.")
    if policy in RULES:
        rules = " or ".join(f"{rule}:N" for rule in RULES[policy])
        return f"{rules}, N {TAKES[policy]}"
    if policy == "named":
        return "names of modules with their bits, as in {blocks.0.attn: 8}, 2 to 8 or 16"
    if key.startswith("bits."):
        return "bits of a weight, 2 to 8, or 16 for a layer that is left as it is"
    return {
        "method": " or ".join(METHODS),
        "export": " or ".join(EXPORTS),
        "group_size": "a number of input columns, or -1 for all of a row",
        "percdamp": NOT_NEGATIVE.words,
        "seed": SEED.words,
        "calib.batches": f"a number of training batches, {COUNT.words}",
    }.get(key, "true or false")


def _shown(wrong: list[Any]) -> str:
    return ", ".join(repr(str(e) if isinstance(e, Choice) else e) for e in wrong) or "none"
