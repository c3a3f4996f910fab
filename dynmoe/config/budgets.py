"""What ``dynmoe-eval mode=budget`` is asked for: rules, and means or cuts to evaluate at.

Keys: ``budget.rule`` (one; null: all that fit the run's router), ``budget.targets`` (mean numbers
of experts per token), or ``budget.values`` (cuts of one rule, as they are).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dynmoe.config.ranges import BELOW_ONE, COUNT, Range

KEYS = ("budget.rule", "budget.targets", "budget.values")
TARGETS = (1.0, 1.5, 2.0, 3.0)
RULES: dict[str, Range | None] = {
    "threshold": None,
    "entropy": BELOW_ONE,
    "ratio": BELOW_ONE,
    "quantile": None,
    "top_k": COUNT,
}
"""The rules of `dynmoe.layers.posthoc`, and the range of the cuts of each; None: any number."""


def targets_of(cfg: DictConfig) -> list[float]:
    """Return the wanted means, ascending; those that ``TARGETS`` has for the run's experts."""
    given = _numbers(OmegaConf.select(cfg, "budget.targets"))
    if not given:
        given = [each for each in TARGETS if each <= cfg.moe.max_experts]
    return sorted({float(each) for each in given})


def values_of(cfg: DictConfig) -> list[float]:
    """Return the given cuts, ascending."""
    return sorted({float(each) for each in _numbers(OmegaConf.select(cfg, "budget.values")) or []})


def rule_of(cfg: DictConfig) -> str | None:
    """Return the one rule that was asked for, if any."""
    rule = OmegaConf.select(cfg, "budget.rule")
    return None if rule is None else str(rule)


def budget_problems(cfg: DictConfig) -> Iterator[str]:
    """Say what is wrong with the keys ``budget.*``, and with a run that has nothing to cut."""
    if cfg.moe.get("router") is None:
        yield "mode=budget: this run has no MoE layer. Give a run with a router (moe=dynmoe, topk)"
        return
    rule = rule_of(cfg)
    if rule is not None and rule not in RULES:
        yield f"budget.rule: expected one of {', '.join(RULES)}, found {rule!r}"
        return
    targets, values = (OmegaConf.select(cfg, f"budget.{key}") for key in ("targets", "values"))
    if targets is not None and values is not None:
        yield "budget.values: found beside budget.targets. Give one of them"
    elif values is not None and rule is None:
        yield "budget.values: cuts of one rule. Add budget.rule=..., or give budget.targets"
    most = cfg.moe.max_experts
    within = Range(f"more than 0, up to {most}, the experts of a layer", lambda n: 0 < n <= most)
    found = [
        *_wrong("targets", targets, within),
        *_wrong("values", values, RULES.get(rule or "")),
    ]
    yield from found
    if rule == "top_k" and not found:
        for key, given in (("targets", targets), ("values", values)):
            parts = [each for each in _numbers(given) or [] if each != int(each)]
            if parts:
                yield f"budget.{key}: budget.rule=top_k takes whole numbers, found {parts}"


def _numbers(given: Any) -> list[Any] | None:
    plain = OmegaConf.to_container(given) if OmegaConf.is_list(given) else given
    if plain is None:
        return None
    return plain if isinstance(plain, list) else [plain]


def _wrong(key: str, given: Any, within: Range | None) -> Iterator[str]:
    numbers: Sequence[Any] | None = _numbers(given)
    if numbers is None:
        return
    if not numbers:
        yield f"budget.{key}: expected numbers, as in budget.{key}=[1,2], found none"
    for each in numbers:
        is_number = isinstance(each, int | float) and not isinstance(each, bool)
        if not is_number or each != each or each in (float("inf"), float("-inf")):
            yield f"budget.{key}: expected numbers, as in budget.{key}=[1,2], found {each!r}"
        elif within is not None and not within.holds(each):
            yield f"budget.{key}: expected {within.words}, found {each}"
