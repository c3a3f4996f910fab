"""The MoE layers of a model as stacked tensors, for libraries that know no slots.

Shape suffixes: E experts, D model width, H hidden neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynmoe.backbones.forms import Bias
from dynmoe.backbones.mixtures import WithShared
from dynmoe.errors import ConfigError
from dynmoe.layers.experts import Experts
from dynmoe.layers.ffn import common_layout, read_ffns
from dynmoe.layers.fixed_routers import AverageKeyRouter, CosineTopKRouter, TopKRouter
from dynmoe.layers.moe import moe_layers
from dynmoe.layers.routers import Router, TopAnyRouter

Tensors = dict[str, Tensor]


@dataclass
class Place:
    """One MoE layer of a model, by the parts of the block around it."""

    num_experts: int
    output_bias: Tensor | None = None
    """Of the FFN that the experts replaced, where it stayed outside them."""
    bias_path: str = ""
    left_out: list[str] = field(default_factory=list)
    """Paths of other parts of that FFN, which compute nothing now."""
    tensors: Tensors = field(default_factory=dict)
    """``router.*`` and ``experts.*``, as in ``modeling_mixture``."""


class Mixtures(NamedTuple):
    """All MoE layers of a model, whose routers and experts are of one form."""

    router: str
    """Name of a class of ``modeling_mixture``."""
    options: dict[str, Any]
    """``top_k``, ``scale``, ``normalised``, ``projection``, where the router has them."""
    gated: bool
    biased: bool
    activation: str
    """Its name in transformers."""
    width: int
    hidden: int
    places: dict[str, Place]


def mixtures_of(model: nn.Module, dense: nn.Module) -> Mixtures:
    """Describe the MoE layers of a model, without slots that hold no expert.

    ``dense`` is the model before it got them; it needs no data (meta device).

    Raises:
        ConfigError: a router or experts that cannot be written so, or layers of several forms.
    """
    places, forms = {}, []
    for name, each in moe_layers(model).items():
        layer = each if len(each.live) == each.max_experts else each.compact()
        if len(layer.shared):
            raise ConfigError(
                f"format: {name} has shared experts, which the form lacks. Train with "
                "moe.shared_experts=0"
            )
        router = _router(name, layer.router, layer.experts)
        experts = _experts(name, list(layer.experts.slots))
        tensors = {f"router.{key}": tensor for key, tensor in router.tensors.items()}
        tensors |= {f"experts.{key}": tensor for key, tensor in experts.tensors.items()}
        places[_place(name, model, dense)] = Place(len(layer.experts.slots), tensors=tensors)
        forms.append((router[:2], experts[:4], layer.dim))
    if any(form != forms[0] for form in forms):
        raise ConfigError("format: expected MoE layers of one form, found several")
    for path, module in model.named_modules():
        within = any(path.startswith(f"{place}.") for place in places)
        if isinstance(module, WithShared):
            raise ConfigError(
                f"format: {path} has a shared FFN beside its experts, which this format has no "
                "place for"
            )
        if isinstance(module, Bias):
            place = places[_nearest(path, places)]
            place.output_bias, place.bias_path = module.bias.detach(), path
            place.left_out += [] if within else [path]
        elif within:
            continue
        elif type(module) is nn.Identity and type(dense.get_submodule(path)) is not nn.Identity:
            places[_nearest(path, places)].left_out.append(path)
    (router_name, options), (gated, biased, activation, hidden), width = forms[0]
    return Mixtures(router_name, options, gated, biased, activation, width, hidden, places)


def _place(name: str, model: nn.Module, dense: nn.Module) -> str:
    """Return the path of the module whose place an MoE layer took, with its output bias perhaps.

    Raises:
        ConfigError: it is part of a module that transformers does not have.
    """
    known = {path for path, _ in dense.named_modules()}
    above = name.rpartition(".")[0]
    around = model.get_submodule(above)
    if name in known:
        return name
    parts = [type(each) for part, each in around.named_children() if f"{above}.{part}" != name]
    if above in known and type(around) is nn.Sequential and {*parts} <= {Bias, nn.Dropout}:
        return above
    raise ConfigError(
        f"format: {name} is a part of {type(around).__name__}, expected an MoE layer in the place "
        "of an FFN of transformers"
    )


def _nearest(path: str, places: dict[str, Place]) -> str:
    """Return the layer whose block has this path: the names agree longest."""

    def shared(name: str) -> int:
        pairs = list(zip(name.split("."), path.split("."), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    return max(places, key=shared)


class _Router(NamedTuple):
    name: str
    options: dict[str, Any]
    tensors: Tensors


def _top_any(router: TopAnyRouter, experts: Experts) -> _Router:
    _check_alone("combine", router.combine, router.combine != "tutel")
    directions_ED = torch.stack(list(router.directions))
    thresholds_E = torch.stack(list(router.thresholds))
    return _Router("TopAny", {}, {"weight": directions_ED, "thresholds": thresholds_E})


def _top_k(router: TopKRouter, experts: Experts) -> _Router:
    return _Router("TopK", _softmax(router), {"weight": router.weight})


def _cosine(router: CosineTopKRouter, experts: Experts) -> _Router:
    tensors = {
        "weight": router.embeddings,
        "project.weight": router.project.weight,
        "project.bias": router.project.bias,
        "log_scale": router.log_scale,
    }
    options = {**_softmax(router), "projection": router.projection}
    return _Router("CosineTopK", options, tensors)


def _average_key(router: AverageKeyRouter, experts: Experts) -> _Router:
    keys_ED = experts.mean_keys(range(router.num_slots))
    return _Router("TopKeys", _fixed(router), {"weight": keys_ED})


def _check_alone(option: str, value: Any, alone: bool) -> None:
    if not alone:
        raise ConfigError(
            f"router: with {option}={value} a token's output depends on the others of its batch, "
            "which no other software computes"
        )


def _softmax(router: TopKRouter) -> dict[str, Any]:
    options = _fixed(router)
    return {**options, "scale": options["scale"] * router.scale, "normalised": router.renormalise}


def _fixed(router: Any) -> dict[str, Any]:
    _check_alone("capacity_factor", router.capacity_factor, router.capacity_factor is None)
    forced = getattr(router, "forced_balance", False)
    _check_alone("forced_balance", forced, not forced)
    scale = float(router.top_k) if router.weights_sum == "k" else 1.0
    return {"top_k": router.top_k, "scale": scale}


ROUTERS: dict[type[Router], Callable[[Any, Experts], _Router]] = {
    TopAnyRouter: _top_any,
    TopKRouter: _top_k,
    CosineTopKRouter: _cosine,
    AverageKeyRouter: _average_key,
}


def _router(name: str, router: Router, experts: Experts) -> _Router:
    known = ROUTERS.get(type(router))
    if known is None:
        raise ConfigError(
            f"format: {name} has a {type(router).__name__}, expected one of "
            f"{', '.join(each.__name__ for each in ROUTERS)}"
        )
    found = known(router, experts)
    tensors = {key: tensor.detach() for key, tensor in found.tensors.items()}
    return found._replace(tensors=tensors)


class _Stacked(NamedTuple):
    gated: bool
    biased: bool
    activation: str
    hidden: int
    tensors: Tensors


ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
"""Names in transformers of those of ``layers.ffn``."""


def _experts(name: str, experts: Sequence[nn.Module]) -> _Stacked:
    """Stack FFNs: ``w2 act(w1 x)``, or ``down(act(gate x) * up x)``."""
    layout = common_layout(experts)
    if layout is None or any(read_ffns([mlp], layout) is None for mlp in experts):
        raise ConfigError(
            f"format: {name} has experts of {type(experts[0]).__name__}, expected FFNs of plain "
            f"linear layers (two, or a gate, up and down) around one of {', '.join(ACTIVATIONS)}. "
            "Merge adapters, and use weights that are not quantised"
        )
    parts: list[tuple[list[Any], Any]] = [
        ([mlp.get_submodule(inner) for inner in layout.inner], mlp.get_submodule(layout.outer))
        for mlp in experts
    ]

    def joined(of: Callable[[nn.Linear], Tensor]) -> Tensor:
        """The inner matrices of each expert as one, the gate's first, or their biases."""
        whole_ER = torch.stack([torch.cat([of(each) for each in inner]) for inner, _ in parts])
        return whole_ER if layout.gate != 1 else torch.cat(whole_ER.chunk(2, 1)[::-1], 1)

    up = "up_proj" if layout.gate is None else "gate_up_proj"
    down_EDH = torch.stack([outer.weight for _, outer in parts])
    tensors = {up: joined(lambda linear: linear.weight), "down_proj": down_EDH}
    biased = any(each.bias is not None for inner, outer in parts for each in (*inner, outer))
    if biased:  # transformers knows experts that have all biases, or none
        tensors[f"{up}_bias"] = joined(_bias)
        tensors["down_proj_bias"] = torch.stack([_bias(outer) for _, outer in parts])
    tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    activation = ACTIVATIONS[layout.activation]
    return _Stacked(layout.gate is not None, biased, activation, down_EDH.shape[2], tensors)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
