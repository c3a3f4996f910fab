"""Model types of transformers whose FFNs are mixtures of experts already. No PyTorch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its mixtures, and how their routers weight the experts of a token.

    Paths are those of modules: ``place`` in the block, the others in the mixture.
    """

    weights: Literal["normalised", "configured", "probabilities", "scaled"] | None
    """Of the k largest probabilities of a softmax: ``normalised`` to sum to 1; so where the model's
    ``norm_topk_prob`` says it, ``configured``; as they are, ``probabilities``; or times its
    ``routed_scaling_factor``, ``scaled``. None: another router, whose place ours may take."""
    place: str = "mlp"
    router: str = "gate"
    shared: str | None = None
    """An FFN beside the experts that serves every token."""
    shared_gate: str | None = None
    """The linear layer whose sigmoid weights it."""
    unlike: str = ""
    """The reason for ``weights=None``."""


BIASED = "its router chooses by sigmoid scores plus a bias, in groups of experts"

# By ``model_type`` of a transformers configuration.
FAMILIES: dict[str, Family] = {
    "mixtral": Family("normalised"),
    "minimax": Family("normalised"),
    "olmoe": Family("configured"),
    "flex_olmo": Family("configured"),
    "mellum": Family("configured"),
    "qwen3_moe": Family("configured"),
    "qwen2_moe": Family("configured", shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_next": Family("configured", shared="shared_expert", shared_gate="shared_expert_gate"),
    "granitemoe": Family("normalised", place="block_sparse_moe", router="router"),
    "granitemoeshared": Family("normalised", place="block_sparse_moe", router="router"),
    "jamba": Family("probabilities", place="feed_forward", router="router"),
    "deepseek_v2": Family("scaled", shared="shared_experts"),
    "deepseek_v3": Family(None, shared="shared_experts", unlike=BIASED),
    "dots1": Family(None, shared="shared_experts", unlike=BIASED),
    "glm4_moe": Family(None, shared="shared_experts", unlike=BIASED),
    "ernie4_5_moe": Family(
        None, shared="shared_experts", unlike="a bias takes part in the choice of its router"
    ),
    "phimoe": Family(
        None, router="router", unlike="its router, SparseMixer, chooses one expert after the other"
    ),
}


def not_ours(model_type: str, reason: str) -> str:
    """Explain that a model's own router is not to be had."""
    return (
        f"moe: native keeps the router of a '{model_type}' model, but {reason}. Exchange it, which "
        "keeps the experts: moe=dynmoe or moe=topk"
    )


def jitter(noise: float) -> str:
    """Explain that noise on the input of experts is not to be had."""
    return (
        f"backbone.options.router_jitter_noise: expected 0 with moe=native, found {noise:g}: this "
        "noise on the input of the experts in training is left out. Set it to 0"
    )


# Names of the number of experts in a configuration.
NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
