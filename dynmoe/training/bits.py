"""Bits of a model's linear layers: which of them there are, and the policies that choose some.

Shape suffixes: E living experts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from dynmoe.backbones.forms import LIKE_LINEAR
from dynmoe.backbones.mixtures import WithShared
from dynmoe.backbones.surgery import blocks_of
from dynmoe.config.quantize import UNTOUCHED, Choice, Quantisation
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer
from dynmoe.layers.quantized import Rounding
from dynmoe.layers.soft import SoftMoELayer

Kind = Literal["attention", "dense", "shared", "expert"]


@dataclass(frozen=True)
class Place:
    """A linear layer of a block."""

    name: str
    """Dotted, in the backbone."""
    module: Any = field(repr=False)
    kind: Kind
    """``attention`` is all of a block but its FFN, ``dense`` an FFN that is no mixture."""
    block: int
    layer: str = ""
    """The MoE layer of an expert."""
    expert: int = 0

    @property
    def is_transposed(self) -> bool:
        """Whether its weight is [I, O], as in GPT-2's ``Conv1D``."""
        return LIKE_LINEAR.get(type(self.module).__name__, False)

    @property
    def weight_OI(self) -> Tensor:
        """The weight, or a view of it; to be written to in place."""
        weight: Tensor = self.module.weight.detach()
        return weight.t() if self.is_transposed else weight


def blocks_in(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the blocks that may have MoE layers."""
    return blocks_of(getattr(backbone, "language_model", backbone))[0]


def places_in(backbone: nn.Module) -> list[Place]:
    """Return the linear layers of all blocks, in the model's order, but those that route.

    Embeddings, heads, norms, and all that lies outside the blocks are not among them: no vision
    tower of a vision-language model, no projector.
    """
    blocks, form = blocks_of(getattr(backbone, "language_model", backbone))
    names = {id(module): name for name, module in backbone.named_modules()}
    found: list[Place] = []
    for number, block in enumerate(blocks):
        about: dict[int, dict[str, Any]] = {}
        for ffn in form.modules(block):
            about |= {id(module): {"kind": "dense"} for module in ffn.modules()}
        routing: set[int] = set()
        for module in block.modules():
            if isinstance(module, MoELayer | SoftMoELayer):
                routing |= {id(each) for each in module.router.modules()}
                layer = names[id(module)]
                for expert, slot in enumerate(module.experts.slots):
                    each = {"kind": "expert", "layer": layer, "expert": expert}
                    about |= {id(part): each for part in slot.modules()}
                about |= {id(part): {"kind": "shared"} for part in module.shared.modules()}
            elif isinstance(module, WithShared):
                routing |= {id(module.shared_gate)}
                about |= {id(part): {"kind": "shared"} for part in module.shared.modules()}
        found += [
            Place(names[id(module)], module, block=number, **about.get(id(module), ATTENTION))
            for module in block.modules()
            if id(module) not in routing
            and (isinstance(module, nn.Linear) or type(module).__name__ in LIKE_LINEAR)
        ]
    return found


ATTENTION: Mapping[str, Any] = {"kind": "attention"}


@dataclass
class Seen:
    """What the unquantised model shows on calibration data; only what a policy asks for."""

    load: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of each expert, by MoE layer."""
    similarity: dict[int, float] = field(default_factory=dict)
    """Predicted cosine of a block's input and output, by block."""
    outliers: dict[str, float] = field(default_factory=dict)
    """``outlier_score``, by linear layer."""


def bit_map(places: Sequence[Place], how: Quantisation, seen: Seen) -> dict[str, int]:
    """Return the bits of each linear layer by its name; 16: left as it is.

    Raises:
        ConfigError: ``bits.named`` has a name that no module with linear layers in a block has.
    """
    bits = {place.name: how.default for place in places}

    def give(number: int, which: Iterable[Place]) -> None:
        bits.update({place.name: number for place in which})

    draw = random.Random(how.seed)
    for kind, number in (
        ("attention", how.attention),
        ("dense", how.dense),
        ("shared", how.shared),
    ):
        if number is not None:
            give(number, (place for place in places if place.kind == kind))
    if how.shared is not None and not any(place.kind == "shared" for place in places):
        raise ConfigError("quant.bits.shared: this model has no shared experts. Leave it out")
    ffns = [place for place in places if place.kind != "attention"]
    if how.experts is not None:
        chosen = _experts(places, how.experts, seen.load, draw)
        give(how.high, (p for p in places if p.kind == "expert" and (p.layer, p.expert) in chosen))
    if how.blocks is not None:
        blocks = _blocks(places, how.blocks, seen.similarity, draw)
        give(how.high, (place for place in ffns if place.block in blocks))
    if how.linears is not None:
        give(how.high, _linears(ffns, how.linears, seen.outliers, draw))
    for name, number in (how.named or {}).items():
        inside = [p for p in places if p.name == name or p.name.startswith(f"{name}.")]
        if not inside:
            some = ", ".join(place.name for place in places[:3])
            raise ConfigError(
                f"quant.bits.named: no module of a block with linear layers is called {name}. "
                f"Expected such as {some}"
            )
        give(number, inside)
    return bits


def _experts(
    places: Sequence[Place], choice: Choice, load: Mapping[str, Sequence[int]], draw: random.Random
) -> set[tuple[str, int]]:
    """The chosen experts, as (layer, expert): so many of each layer, or a share of all."""
    layers: dict[str, list[tuple[str, int]]] = {}
    for place in places:
        expert = (place.layer, place.expert)
        if place.kind == "expert" and expert not in layers.setdefault(place.layer, []):
            layers[place.layer].append(expert)

    def ranked(experts: list[tuple[str, int]]) -> list[tuple[str, int]]:
        if choice.rule == "random":
            return draw.sample(experts, len(experts))
        sign = 1 if choice.rule == "rare" else -1
        return sorted(experts, key=lambda each: sign * load[each[0]][each[1]])

    if choice.amount >= 1:
        return {each for own in layers.values() for each in ranked(own)[: int(choice.amount)]}
    everyone = [each for own in layers.values() for each in own]
    return set(ranked(everyone)[: math.ceil(choice.amount * len(everyone))])


def mixture_blocks(places: Sequence[Place]) -> list[int]:
    """Return the blocks with an MoE layer; of a dense model all blocks."""
    found = {place.block for place in places if place.kind == "expert"}
    return sorted(found or {place.block for place in places})


def _blocks(
    places: Sequence[Place], choice: Choice, similarity: Mapping[int, float], draw: random.Random
) -> set[int]:
    blocks, number = mixture_blocks(places), int(choice.amount)
    if choice.rule == "last":
        return set(blocks[-number:])
    if choice.rule == "random":
        return set(draw.sample(blocks, min(number, len(blocks))))
    if choice.rule == "predictor":  # the less a block leaves its input as it was, the more it does
        blocks = sorted(blocks, key=lambda block: similarity[block])
    return set(blocks[:number])


def _linears(
    ffns: Sequence[Place], choice: Choice, outliers: Mapping[str, float], draw: random.Random
) -> list[Place]:
    number = math.ceil(choice.amount * len(ffns))
    if choice.rule == "random":
        return draw.sample(ffns, number)
    return sorted(ffns, key=lambda place: -outliers[place.name])[:number]


def average_bits(
    shapes: Mapping[str, tuple[int, int]],
    bits: Mapping[str, int],
    rounding: Rounding,
) -> tuple[float, float]:
    """Return the mean bits of a weight, without and with the grids.

    ``shapes``: outputs and inputs of each linear layer; one of 16 bits has no grid. A grid takes
    16 bits for its scale and as many as a weight for its zero.
    """
    weights = total = grids = 0
    for name, (outputs, inputs) in shapes.items():
        weights += outputs * inputs
        total += outputs * inputs * bits[name]
        if bits[name] != UNTOUCHED:
            grids += outputs * rounding.groups(inputs) * (16 + bits[name])
    return total / weights, (total + grids) / weights
