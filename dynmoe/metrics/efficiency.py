"""The costs of a model: parameters and FLOPs, from its shapes and from its routing.

``count`` reads the shapes, before training. The other functions are arithmetic on its result: they
need no PyTorch, so a report can use them on records. ``experts`` holds the living experts of
each MoE layer by name, ``mean_k`` how many of them a token activates on average.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dynmoe.layers import MoELayer

Costs = dict[str, Any]
Numbers = Mapping[str, float]


def total(costs: Costs) -> int:
    """Return the parameters of the model in training, empty slots included."""
    return exported(costs, costs["slots"])


def exported(costs: Costs, experts: Mapping[str, int]) -> int:
    """Return the parameters after compaction: empty slots are gone."""
    layers: dict[str, Costs] = costs["parameters"]["layers"]
    inside = sum(
        experts[name] * (size["expert"] + size["router"]) + _for_each_token(size)
        for name, size in layers.items()
    )
    return int(costs["parameters"]["other"] + inside)


def activated(costs: Costs, experts: Mapping[str, int], mean_k: Numbers) -> float:
    """Return the parameters a token uses: every living expert is scored, k of them are computed."""
    layers: dict[str, Costs] = costs["parameters"]["layers"]
    inside = sum(
        mean_k[name] * size["expert"] + experts[name] * size["router"] + _for_each_token(size)
        for name, size in layers.items()
    )
    outside = costs["parameters"]["other"] - costs["parameters"].get("idle", 0)
    return float(outside + inside)


def flops(costs: Costs, experts: Mapping[str, int], mean_k: Numbers) -> float | None:
    """Return the FLOPs of the forward pass of one sample; None where ``count`` found none.

    A training step takes three times as many: the backward pass has two products for each one of
    the forward pass, except that the first layer's input needs no gradient. Not counted are
    products whose size does not depend on the batch (the directions' Gram matrix in DynMoE's
    auxiliary loss), the recomputation of ``recompute`` and gradient checkpointing, and experts that
    ``gate_grad=all`` computes for their gradient alone.
    """
    if costs["flops"] is None:
        return None
    layers: dict[str, Costs] = costs["flops"]["layers"]
    inside = sum(
        each["tokens"]
        * (mean_k[name] * each["expert"] + experts[name] * each["router"] + _for_each_token(each))
        for name, each in layers.items()
    )
    return float(costs["flops"]["other"] + inside)


def _for_each_token(size: Costs) -> int:
    return int(size["router_fixed"] + size.get("shared", 0))


def count(model: nn.Module, *sample: Any) -> Costs:
    """Count the sizes from which the functions above compute.

    ``sample``: inputs of a batch of one, tensors or containers of them.

    - ``parameters``: ``{"other": n, "idle": n, "layers": {name: {"expert", "router",
      "router_fixed"}}}``, all outside MoE layers, and those of them that a token does not use, of
      a model that is a mixture by itself; of a layer those of one expert, the router's for each
      expert, and its fixed ones; "shared" besides, of all shared experts, where there are some. The
      copy of the FFN that ``keep_origin`` holds is not part of the model.
    - ``flops``: ``{"other": n, "layers": {name: {"tokens", "expert", "router", "router_fixed"}}}``:
      outside MoE layers per sample; of a layer its tokens per sample, and per token one expert's,
      the router's for each living expert, and its fixed ones; "shared" as above. None where a
      router does not know its FLOPs, or where the computation depends on the values of its data.
    - ``slots``: ``{name: max_experts}``.

    The model is neither run nor changed.
    """
    from dynmoe.layers import moe_layers

    layers = moe_layers(model)
    inside = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    outside = sum(p.numel() for p in model.parameters()) - inside
    return {
        "parameters": {
            "other": outside,
            "idle": sum(
                sum(p.numel() for p in experts.parameters()) * (number - k) // number
                for experts, number, k in _stacked(model)
            ),
            "layers": {name: _parameters(layer) for name, layer in layers.items()},
        },
        "flops": _flops(model, sample),
        "slots": {name: layer.max_experts for name, layer in layers.items()},
    }


def _parameters(layer: MoELayer) -> dict[str, int]:
    router = sum(p.numel() for p in layer.router.parameters())
    each = sum(p.numel() for p in layer.router.slot_parameters(0))
    shared = sum(p.numel() for p in layer.shared.parameters())
    return {
        "expert": sum(p.numel() for p in layer.experts.slots[0].parameters()),
        "router": each,
        "router_fixed": router - each * layer.max_experts,
        **({"shared": shared} if len(layer.shared) else {}),
    }


def _stacked(model: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    """The experts that transformers stacks in two tensors [E, ...], their number, and k."""
    from torch import nn

    for module in model.modules():
        experts: Any = getattr(module, "experts", None)
        weight = getattr(experts, "gate_up_proj", None)
        chosen: list[Any] = [child.top_k for child in module.children() if hasattr(child, "top_k")]
        if isinstance(weight, nn.Parameter) and weight.ndim == 3 and chosen:
            yield experts, len(weight), int(chosen[0])


def _flops(model: nn.Module, sample: tuple[Any, ...]) -> Costs | None:
    """Count two passes of shapes without data, in which every token has the first expert alone.

    One of them has the sample twice. The difference is the cost of a sample: products that are made
    once for a batch of any size, as DeBERTa's of relative positions, are in both.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map
    from torch.utils.flop_counter import FlopCounterMode

    from dynmoe.layers import moe_layers

    shell = _shapes_of(model)
    layers = moe_layers(shell)
    routers: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        known = layer.router.flops(layer.dim)
        if known is None:
            return None
        routers[name] = known
    tokens = Counter[str]()

    def first_expert(name: str, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        x_TD = x.reshape(-1, layers[name].dim)
        tokens[name] += len(x_TD)
        y_TD: Tensor = layers[name].experts.slots[0](x_TD)
        for expert in layers[name].shared:
            y_TD = y_TD + expert(x_TD)
        return y_TD.view(x.shape)

    for name, layer in layers.items():
        layer.forward = partial(first_expert, name)  # type: ignore[method-assign]
    # The counter knows no grouped product.
    for experts, _, k in _stacked(shell):
        experts.forward = partial(_k_times_the_first, experts, k)

    def products(mode: AbstractContextManager[Any]) -> list[Counter[str]]:
        """Products by module, of the sample twice and once."""
        passes = []
        with mode as fake:
            once = tree_map(lambda x: x.to("meta"), sample)
            if fake is not None:
                once = tree_map(fake.from_tensor, once)
            for batch in (tree_map(lambda x: torch.cat([x, x]), once), once):
                tokens.clear()
                with FlopCounterMode(display=False) as counter:
                    shell(*batch)
                counts = counter.get_flop_counts()
                passes.append(Counter({name: sum(each.values()) for name, each in counts.items()}))
        return passes

    try:
        passes = products(nullcontext())
    except (RuntimeError, NotImplementedError):
        # Models of transformers ask whether there is padding: fake tensors answer, five times as
        # slow as plain ones on the meta device.
        try:
            passes = products(FakeTensorMode(allow_non_fake_inputs=True))
        except RuntimeError:  # what it does depends on data
            return None
    found = passes[0] - passes[1]
    # The counter's names begin with the class of the outermost module. "Global" is the sum.
    of = f"{type(shell).__name__}.{{}}".format
    inside = {name: found[of(name)] for name in layers}
    shared = {
        name: sum(found[of(f"{name}.shared.{i}")] for i in range(len(layer.shared)))
        for name, layer in layers.items()
    }
    return {
        "other": found["Global"] - sum(inside.values()),
        "layers": {
            name: {
                "tokens": tokens[name],
                "expert": (inside[name] - shared[name]) // max(1, tokens[name]),
                "router": routers[name][0],
                "router_fixed": routers[name][1],
                **({"shared": shared[name] // max(1, tokens[name])} if len(layer.shared) else {}),
            }
            for name, layer in layers.items()
        },
    }


def _k_times_the_first(experts: Any, k: int, x_TD: Tensor, *_: Any, **__: Any) -> Tensor:
    """The products of k experts of a token, whichever they are."""
    gate_up, down = experts.gate_up_proj[0], experts.down_proj[0]
    if not getattr(experts, "is_transposed", False):
        gate_up, down = gate_up.t(), down.t()
    hidden_RI = x_TD.repeat_interleave(k, 0) @ gate_up
    y_RD: Tensor = hidden_RI[:, : len(down)] @ down
    return y_RD[: len(x_TD)]


def _shapes_of(model: nn.Module) -> nn.Module:
    """Copy a model, in evaluation mode, to the meta device: no computation, no random number."""
    import torch
    from torch import nn

    from dynmoe.layers import moe_layers

    # Gradients, although none is asked for: without, nn.MultiheadAttention hides its products.
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.is_floating_point())
        for p in model.parameters()
    }
    shapes |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    tapes = (layer.tape for layer in moe_layers(model).values())
    shapes |= {id(tape): [] for tape in tapes if tape is not None}
    return copy.deepcopy(model, shapes).eval()
