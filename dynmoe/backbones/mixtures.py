"""Models that are mixtures of experts already: their experts and routers as ours, weights kept.

transformers keeps the weights of all experts of a block in two tensors. Each expert becomes an FFN
of its own whose weights are views of them: nothing is copied.

Shape suffixes: T tokens, E experts, D model width, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from dynmoe.backbones.families import Family, jitter, not_ours
from dynmoe.backbones.forms import activation_of
from dynmoe.errors import ConfigError
from dynmoe.layers import TopKRouter
from dynmoe.layers.ffn import PLAIN, PackedGatedFFN


class OwnRouting(NamedTuple):
    """The top-k router of a block as ``TopKRouter`` computes it."""

    weight_ED: nn.Parameter
    top_k: int
    renormalise: bool
    scale: float


def own_router(
    dim: int,
    num_slots: int,
    own: OwnRouting,
    noise: float = 0.0,
    aux: Literal["load_balance", "importance_load"] = "load_balance",
    capacity_factor: float | None = None,
    min_capacity: int = 0,
) -> TopKRouter:
    """A top-k router with the weights and the settings of the model's ``own``.

    ``moe=native``; the surgery passes ``own``. The other options are those of ``TopKRouter``.
    """
    router = TopKRouter(
        dim,
        num_slots,
        own.top_k,
        noise,
        aux,
        capacity_factor,
        min_capacity=min_capacity,
        renormalise=own.renormalise,
        scale=own.scale,
    )
    router.weight = own.weight_ED
    return router


def read_routing(mixture: nn.Module, family: Family, model_type: str) -> OwnRouting:
    """Read the router of a mixture.

    Raises:
        ConfigError: a router that ``TopKRouter`` does not compute, or one with noise in training.
    """
    gate: Any = mixture.get_submodule(family.router)
    unlike = family.unlike
    noise = float(getattr(mixture, "jitter_noise", 0.0))
    if family.weights == "scaled" and gate.topk_method != "greedy":
        unlike = f"its router chooses groups of experts first (topk_method={gate.topk_method})"
    if unlike:
        raise ConfigError(not_ours(model_type, unlike))
    if noise:
        raise ConfigError(jitter(noise))
    return OwnRouting(
        gate.weight,
        gate.top_k,
        family.weights == "normalised"
        or (family.weights == "configured" and bool(gate.norm_topk_prob)),
        float(gate.routed_scaling_factor) if family.weights == "scaled" else 1.0,
    )


def split_experts(mixture: nn.Module, act: nn.Module, dropout: float) -> list[nn.Module]:
    """Make one FFN of each expert, its weights views of the stacked ones.

    Raises:
        ConfigError: experts of another form than ``down(act(gate) * up)`` without biases.
    """
    stacked: Any = mixture.experts
    gate_up, down = stacked.gate_up_proj, stacked.down_proj
    plain = type(gate_up) in PLAIN and type(down) in PLAIN
    biased = getattr(stacked, "has_bias", False) or getattr(stacked, "is_transposed", False)
    if not plain or biased or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        raise ConfigError(
            f"backbone: experts of {type(stacked).__name__} with weights {list(gate_up.shape)} and "
            f"{list(down.shape)} of type {type(gate_up).__name__}: expected plain ones, [E, 2 H, D]"
            " and [E, D, H], without biases. Load weights that are not quantised"
        )
    pairs = zip(gate_up.detach().unbind(), down.detach().unbind(), strict=True)
    return [PackedGatedFFN(_linear(w13), act, _linear(w2), dropout) for w13, w2 in pairs]


def _linear(weight_OI: Tensor) -> nn.Linear:
    made = nn.Linear(weight_OI.shape[1], len(weight_OI), bias=False, device="meta")
    made.weight = nn.Parameter(weight_OI)
    return made


class WithShared(nn.Module):
    """An MoE layer beside an FFN that serves every token: ``moe(x) + [sigmoid(gate(x))] ffn(x)``.

    Qwen2-MoE weights the shared FFN by a gate; DeepSeek adds it as it is.
    """

    def __init__(self, moe: nn.Module, shared: nn.Module, shared_gate: nn.Module | None) -> None:
        super().__init__()
        self.moe, self.shared, self.shared_gate = moe, shared, shared_gate

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(x).sigmoid() * shared
        return self.moe(x) + shared


@dataclass(frozen=True)
class Mixture:
    """Experts, a router and perhaps a shared FFN in one module of the block (``families.py``)."""

    model_type: str
    family: Family

    def is_in(self, block: nn.Module) -> bool:
        """Whether the block is a mixture; some models begin with dense ones."""
        return hasattr(getattr(block, self.family.place, None), "experts")

    def experts(self, block: nn.Module, dropout: float | None) -> list[nn.Module]:
        """Make the block's experts, with its weights; ``dropout`` as in ``Form.expert``."""
        mixture: Any = block.get_submodule(self.family.place)
        return split_experts(mixture, activation_of(mixture, "experts.act_fn"), dropout or 0.0)

    def routing(self, block: nn.Module) -> OwnRouting:
        """Read the block's own router."""
        return read_routing(block.get_submodule(self.family.place), self.family, self.model_type)

    def put(self, block: Any, layer: nn.Module) -> None:
        mixture = block.get_submodule(self.family.place)
        shared, gate = (
            getattr(mixture, name) if name else None
            for name in (self.family.shared, self.family.shared_gate)
        )
        whole = layer if shared is None else WithShared(layer, shared, gate)
        block.set_submodule(self.family.place, whole)

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.get_submodule(self.family.place)]
