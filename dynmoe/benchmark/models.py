"""One backbone, dense and with MoE layers of every kind.

Shape suffixes: T tokens, E experts, P pairs, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dynmoe.backbones.surgery import blocks_of
from dynmoe.benchmark.candidates import built
from dynmoe.benchmark.layer import fit_thresholds
from dynmoe.benchmark.results import Facts
from dynmoe.benchmark.workload import LabelledBatch, Workload, calls_of_sample, model_name
from dynmoe.errors import ConfigError
from dynmoe.layers import Experts, Router, Routing, TopAnyRouter, TopKRouter, moe_layers
from dynmoe.runtime import set_fused_attention
from dynmoe.training.build import add_layers


def build(
    cfg: DictConfig,
    work: Workload,
    cases: Sequence[str],
    ks: Sequence[float],
    given_layers: bool,
    fused_attention: bool,
    amp: bool,
) -> tuple[dict[str, nn.Module], Facts]:
    """The ``cases`` of ``plan.step_cases``, and what they have in common.

    ``given_layers``: MoE layers are where the configuration says, else in every second block, 1,
    3, 5, ... ``amp``: routers are fitted in the precision they are used in.

    Raises:
        ConfigError: a backbone that cannot be built, MoE layers nowhere or that do not fit.
    """
    torch.manual_seed(0)
    dense: nn.Module = built(cfg.backbone, **work.backbone_arguments)
    set_fused_attention(dense, fused_attention)
    device = work.batches[0].label.device
    dense.to(device)
    layers = moe_blocks(cfg, dense, given_layers)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        models = build_models(cfg, dense, layers, cases, ks, work.batches)
    return models, facts(cfg, work, layers)


def moe_blocks(cfg: DictConfig, dense: nn.Module, given: bool) -> list[int] | str:
    """Where the MoE layers are: as ``given``, else in every second block, 1, 3, 5, ...

    Raises:
        ConfigError: nowhere.
    """
    host = getattr(dense, "language_model", dense)
    layers = cfg.moe.layers if given else list(range(1, len(blocks_of(host)[0]), 2))
    if layers == "none" or not len(layers):
        raise ConfigError(f"moe.layers={layers}: expected some blocks with MoE layers, e.g. [0]")
    return layers if isinstance(layers, str) else list(layers)


def facts(cfg: DictConfig, work: Workload, layers: list[int] | str) -> Facts:
    """What all models of a run have in common."""
    return {
        "model": model_name(cfg.backbone),
        "options": str(cfg.backbone.options),
        **work.facts,
        "moe_layers": layers,
        "experts": cfg.moe.num_experts,
    }


def build_models(
    cfg: DictConfig,
    dense: nn.Module,
    layers: list[int] | str,
    cases: Sequence[str],
    ks: Sequence[float],
    batches: Sequence[LabelledBatch],
) -> dict[str, nn.Module]:
    """The ``cases`` of ``plan.step_cases``, fitted to k on the first of the ``batches``, or on all
    of them where they are of different shapes.

    Raises:
        ConfigError: MoE layers that do not fit, or a router without thresholds.
    """
    moe, device = cfg.moe, next(dense.parameters()).device
    fresh = moe.init == "fresh" or (moe.init == "auto" and not cfg.backbone.pretrained)
    top_any: Any = built(moe.router) if moe.router else None
    if getattr(top_any, "func", None) is not TopAnyRouter:
        raise ConfigError(
            f"moe={moe.name}: expected the top-any router, as in moe=dynmoe; top-1 and top-2 are"
            " cases of their own"
        )

    def with_router(router: Callable[[int, int], Router], slots: int) -> nn.Module:
        torch.manual_seed(0)  # equal experts and directions in all cases of equal routers
        model = copy.deepcopy(dense)
        init = "fresh" if fresh else "copy"
        add_layers(moe, model, router=router, max_experts=slots, layers=layers, init=init)
        return model.to(device)

    def top_k(k: int) -> nn.Module:
        return with_router(partial(TopKRouter, top_k=k), moe.num_experts)

    def dynmoe(k: float, experts: Callable[[Experts], Experts] = lambda own: own) -> nn.Module:
        model = with_router(top_any, moe.max_experts)
        for layer in moe_layers(model).values():
            layer.experts = experts(layer.experts)
        fit(model, k, batches[: calls_of_sample(batches)])
        return model

    def as_in_training(model: nn.Module) -> nn.Module:
        parts = cfg.task.module.get("trains")
        if parts is not None:
            from dynmoe.backbones.vlm import train_only  # imports transformers

            train_only(model, parts)  # type: ignore[arg-type]
        return model

    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "top-1": partial(top_k, 1),
        "top-2": partial(top_k, 2),
        **{f"dynmoe {k:g}": partial(dynmoe, k) for k in ks},
        "loop": partial(dynmoe, ks[0], Loop),
        "all then mask": partial(dynmoe, ks[0], AllThenMask),
    }
    return {case: as_in_training(makers[case]()) for case in cases}


@torch.no_grad()
def fit(model: nn.Module, k: float, batches: Sequence[LabelledBatch]) -> None:
    """Fit the thresholds of one layer after the other: what it sees depends on those before it."""
    for layer in moe_layers(model).values():
        seen: list[Tensor] = []
        with layer.register_forward_pre_hook(partial(_see, seen)):
            for batch in batches:
                model(*batch.inputs)
        assert isinstance(layer.router, TopAnyRouter)
        fit_thresholds(layer.router, layer.live, torch.cat(seen), k)


def _see(seen: list[Tensor], layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """The layer's tokens, without padding."""
    mask = layer.token_mask
    seen.append((inputs[0] if mask is None else inputs[0][mask]).reshape(-1, layer.dim))


class Loop(Experts):
    """What one writes first: for each expert select its tokens by the mask, add its results."""

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.slots = experts.slots

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e, slot in enumerate(live):
            token_P = routing.mask_TE[:, e].nonzero().squeeze(1)
            out_PD = self.slots[slot](x_TD[token_P]) * routing.weights_TE[token_P, e, None]
            y_TD.index_add_(0, token_P, out_PD.to(y_TD.dtype))
        return y_TD


class AllThenMask(Loop):
    """Every expert on every token, then the weights, which are 0 outside the mask."""

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        out_TED = torch.stack([self.slots[slot](x_TD) for slot in live], dim=1)
        weights_T1E = (routing.weights_TE * routing.mask_TE)[:, None].to(out_TED.dtype)
        return (weights_T1E @ out_TED).squeeze(1).to(x_TD.dtype)
