"""Keys, types and allowed words of the nodes that dynmoe defines itself.

Nodes with a `_target_` need no schema: the signature of their target is one.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

from dynmoe.config.targets import Parameter, Signature

Selection = Literal[
    "training_domain_validation",
    "oracle",
    "leave_one_domain_out",
    "best_dev",
    "heldout",
    "validation",
    "last_step",
]
Placement = Literal["last_two", "every_two", "sparse", "first_half", "second_half", "all", "none"]


@dataclass
class Paths:
    outputs: str
    cache: str


@dataclass
class Recipe:
    """Settings of a protocol; an entry of `datasets` names only what differs from `defaults`."""

    steps: int = 0
    eval_every: int | None = 0
    epochs: int = 0
    batch_size: int = 0
    lr: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    trains: list[str] = field(default_factory=list)


@dataclass
class Recipes:
    """The recipes of one stage; `scratch` says what differs where no weights are pretrained."""

    defaults: dict[str, Any]
    datasets: dict[str, Any]
    scratch: dict[str, Any] | None = None


@dataclass
class Protocol:
    name: str
    holdout_fraction: float
    defaults: dict[str, Any] | None = None
    datasets: dict[str, Any] | None = None
    scratch: dict[str, Any] | None = None
    augment_eval: bool = False  # images only
    stages: dict[str, Any] | None = None  # recipes by stage, instead of defaults and datasets
    selection: Selection | None = None  # these three: not of images
    patience: int | None = None
    searched: list[str] | None = None


@dataclass
class MoE:
    name: str
    algorithm: str
    num_experts: int
    max_experts: int
    layers: Placement | list[int]
    init: Literal["auto", "copy", "cluster", "random", "fresh", "keep"]
    expert_dropout: float | None
    recompute: bool
    aux_weight: float
    router: dict[str, Any] | None
    adaptation: dict[str, Any] | None
    backend: Literal["auto", "loop", "per_expert", "grouped_mm"] = "auto"
    shared_experts: int = 0
    conflict: dict[str, Any] | None = None
    top_k: int = 1  # fixed routers only


@dataclass
class Conflict:
    weight: float
    threshold: float = 0.0
    proxy: Literal["output", "bias", "full"] = "output"
    every: int = 1
    start: int = 0


@dataclass
class TokenSparsify:
    keep: float | list[float] = 0.7
    blocks: Literal["quarters"] | list[int] = "quarters"
    fuse: bool = True
    shrink_start: int = 0
    shrink_steps: int = 0


@dataclass
class AdapterOptions:
    dim: int = 64
    inner: int = 32
    links: bool = True
    link_embeddings: bool = False
    link_last: bool = True
    freeze: bool | None = None


@dataclass
class Mixing:
    rule: Literal["dynamic", "uniform", "proportional", "fixed", "ref_loss", "random"]
    every: int | None
    probe_tokens: int
    metric: Literal["l2", "cos", "reversed_l2"] = "l2"
    aggregate: Literal["mean", "max", "min"] = "mean"
    layers: list[int] = field(default_factory=list)
    eta: float = 10.0
    c: float | Literal["auto"] = "auto"
    weights: Any = None
    reference: Any = None


@dataclass
class Stage:
    name: str
    after: str | None
    start: str | None
    suffix: str
    template: str


@dataclass
class Task:
    name: str
    selection: Selection
    placement: Placement
    steps: int
    eval_every: int | None
    optimizer: dict[str, Any]
    module: dict[str, Any]
    epochs: int | None = None
    save_every: int | None = None
    async_save: bool = False
    patience: int | None = None
    on_nonfinite: Literal["stop", "continue"] = "stop"
    routing_every: int = 1
    scheduler: dict[str, Any] | None = None


@dataclass
class Runtime:
    matmul_precision: Literal["auto", "highest", "high", "medium"]
    malloc: Literal["auto", "tuned", "system"]
    fused_attention: Literal["auto"] | bool
    progress_every: float


@dataclass
class EstimateSettings:
    tflops: float | None
    utilisation: float
    mean_k: float | None
    mean_tokens: float | None
    conversations: int | None


@dataclass
class Root:
    protocol: dict[str, Any]
    backbone: dict[str, Any]
    data: dict[str, Any]
    moe: dict[str, Any]
    trainer: dict[str, Any]
    logger: dict[str, Any] | None
    paths: dict[str, Any]
    task: dict[str, Any]
    name: str
    seed: int
    trial_seed: int
    hparams_seed: int
    mode: Literal["train", "check", "plan"]
    runtime: dict[str, Any]
    overwrite: bool
    stage: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    mixing: dict[str, Any] | None = None


# The schema of a node by its path; "" is the root, `*` any one key.
SCHEMAS: dict[str, type] = {
    "": Root,
    "protocol": Protocol,
    "protocol.defaults": Recipe,
    "protocol.datasets.*": Recipe,
    "protocol.scratch": Recipe,
    "protocol.stages.*.defaults": Recipe,
    "protocol.stages.*.datasets.*": Recipe,
    "protocol.stages.*.scratch": Recipe,
    "protocol.stages.*": Recipes,
    "stage": Stage,
    "mixing": Mixing,
    "moe": MoE,
    "moe.conflict": Conflict,
    "backbone.token_sparsify": TokenSparsify,
    "backbone.adapter": AdapterOptions,
    "paths": Paths,
    "plan": EstimateSettings,
    "runtime": Runtime,
    "task": Task,
}


@lru_cache
def schema(path: str) -> Signature | None:
    """Keys and types of the plain node at `path`, None where it has no schema."""
    for pattern, node in SCHEMAS.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), path):
            return Signature(
                {
                    f.name: Parameter(
                        str(f.type), __name__, {f.default, f.default_factory} != {MISSING}
                    )
                    for f in fields(node)
                }
            )
    return None
