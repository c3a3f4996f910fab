"""Replace the FFNs of chosen Transformer blocks by MoE layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from dynmoe.backbones.ffns import blocks_of
from dynmoe.errors import ConfigError
from dynmoe.layers.experts import Init, linears
from dynmoe.layers.moe import MoELayer

Placement = (
    Literal["none", "all", "every_two", "last_two", "sparse", "first_half", "second_half", "dense"]
    | Sequence[int]
)


def placed_blocks(layers: Placement, depth: int) -> list[int]:
    """Indices (from 0) of the blocks whose FFN becomes an MoE layer.

    ``every_two``: two MoE layers with a dense block after each, at depth 12 blocks 8 and 10. This
    is GMoE's placement (which its paper calls "last two": the last two even layers) and DynMoE's
    vision runs' (which their code calls "every two"). ``last_two``: the last two blocks. As in
    MoE-LLaVA: ``sparse``, every second block from the first; ``first_half``, ``second_half``;
    ``dense``, which is ``all``.

    Raises:
        ConfigError: an index outside the model, or a depth too small for the placement.
    """
    named = {
        "none": [],
        "all": list(range(depth)),
        "dense": list(range(depth)),
        "sparse": list(range(0, depth, 2)),
        "first_half": list(range(depth // 2)),
        "second_half": list(range(depth // 2, depth)),
        "every_two": [depth - 4, depth - 2],
        "last_two": [depth - 2, depth - 1],
    }
    blocks = named[layers] if isinstance(layers, str) else sorted(set(layers))
    if blocks and not (blocks[0] >= 0 and blocks[-1] < depth):
        raise ConfigError(
            f"moe.layers={layers}: the backbone has {depth} blocks, 0 to {depth - 1}. Choose "
            "moe.layers=all, last_two, or a list of some of them"
        )
    return blocks


def add_moe_layers(
    backbone: nn.Module,
    *,
    router: Callable[[int, int], nn.Module] | None,
    num_experts: int,
    max_experts: int,
    layers: Placement,
    init: Init,
    expert_dropout: float | None = None,
    recompute: bool = False,
    keep_origin: bool = False,
) -> None:
    """Turn the FFNs of the chosen blocks into MoE layers, in place.

    ``init="copy"``: every expert starts as a copy of the block's FFN (GMoE, DynMoE), and so the
    layer as that FFN where a token's weights sum to 1, which top-1's do not (``TopKRouter``);
    ``cluster`` or ``random``: as a part of it (EMoE); ``fresh``: drawn anew, for training from
    scratch.
    ``expert_dropout`` acts after the activation inside experts only (0.1 in GMoE); None keeps the
    FFN's own. ``recompute``: see ``MoELayer``. All of an MoE layer is trained, whatever was frozen.

    Raises:
        ConfigError: blocks that are not there, or whose FFN is of a form not known or cannot be
            split.
    """
    if layers == "none":
        return
    host = getattr(backbone, "language_model", backbone)
    blocks, form = blocks_of(host, parts=init in ("cluster", "random"))
    for index in placed_blocks(layers, len(blocks)):
        assert router is not None, "moe.layers asks for MoE layers, but moe.router is null"
        try:
            expert = form.expert(blocks[index], expert_dropout)
        except AttributeError as error:
            raise ConfigError(
                f"moe.layers={layers}: block {index} of {type(backbone).__name__} has no FFN as "
                f"timm's Vision Transformers or known transformers models have ({error})"
            ) from error
        expert.requires_grad_(True)
        dim = linears(expert)[0].in_features
        layer = MoELayer(
            expert, dim, router, num_experts, max_experts, init, keep_origin, recompute
        )
        form.put(blocks[index], layer)
