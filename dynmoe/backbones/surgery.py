"""Replace the FFNs of chosen Transformer blocks by MoE layers.

The surgery asks for blocks by placement, and leaves to a ``Form`` where a kind of block keeps its
FFN and how an MoE layer takes its place.

Shape suffixes: N rows, D model width, I and O inputs and outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from dynmoe.errors import ConfigError
from dynmoe.layers.experts import Init, linears
from dynmoe.layers.ffn import GatedFFN, is_plain_linear
from dynmoe.layers.moe import MoELayer
from dynmoe.layers.routers import Router
from dynmoe.layers.soft import SoftMoELayer, SoftSlots

Placement = (
    Literal["none", "all", "every_two", "last_two", "sparse", "first_half", "second_half"]
    | Sequence[int]
)


def placed_blocks(layers: Placement, depth: int) -> list[int]:
    """Return the indices (from 0) of the blocks whose FFN becomes an MoE layer.

    ``every_two``: two MoE layers with a dense block after each, at depth 12 blocks 8 and 10. This
    is GMoE's placement (which its paper calls "last two": the last two even layers) and DynMoE's
    vision runs' (which their code calls "every two"). ``last_two``: the last two blocks.
    MoE-LLaVA's are ``sparse``, every second block from the first, ``first_half`` and
    ``second_half``.

    Raises:
        ConfigError: an index outside the model, or a depth too small for the placement.
    """
    named = {
        "none": [],
        "all": list(range(depth)),
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
    router: Callable[[int, int], Router] | None,
    num_experts: int,
    max_experts: int,
    layers: Placement,
    init: Init,
    expert_dropout: float | None = None,
    recompute: bool = False,
    shared_experts: int = 0,
    keep_origin: bool = False,
) -> None:
    """Turn the FFNs of the chosen blocks into MoE layers, in place.

    ``init="copy"``: every expert starts as a copy of the block's FFN (GMoE, DynMoE), and so the
    layer as that FFN where a token's weights sum to 1, which top-1's do not (``TopKRouter``);
    ``cluster`` or ``random``: as a part of it (EMoE); ``fresh``: drawn anew, for training from
    scratch.
    A list as the router's ``target_k`` has one number for each layer.
    ``expert_dropout`` acts after the activation inside experts only (0.1 in GMoE); None keeps the
    FFN's own. ``recompute``, ``shared_experts``: see ``MoELayer``. All of an MoE layer is trained,
    whatever was frozen.

    Raises:
        ConfigError: blocks that are not there, or whose FFN is of a form not known or cannot be
            split; options of the router that it refuses; a causal model for a router that
            ``sees_batch``.
    """
    if layers == "none":
        return
    host: Any = getattr(backbone, "language_model", backbone)
    blocks, form = blocks_of(host, parts=init in ("cluster", "random"))
    places = placed_blocks(layers, len(blocks))
    assert router is not None or not places, (
        "moe.layers asks for MoE layers, but moe.router is null"
    )
    before: Any = None
    for index, make in zip(places, _routers(router, len(places)), strict=True):
        if before is not None and before.hands_on:
            make = partial(make, after=before)
        try:
            expert = form.expert(blocks[index], expert_dropout)
        except AttributeError as error:
            raise ConfigError(
                f"moe.layers={layers}: block {index} of {type(backbone).__name__} has no FFN as "
                f"timm's Vision Transformers or known transformers models have ({error})"
            ) from error
        expert.requires_grad_(True)
        dim = linears(expert)[0].in_features
        options: Any = {"init": init, "recompute": recompute, "shared_experts": shared_experts}
        if _is_soft(router):
            layer: Any = SoftMoELayer(expert, dim, make, num_experts, **options)
        else:
            options |= {"max_experts": max_experts, "keep_origin": keep_origin}
            layer = MoELayer(expert, dim, make, num_experts, **options)
        if layer.router.sees_batch and _is_causal(host):
            raise ConfigError(
                f"moe.router: experts of a {type(layer.router).__name__} see other tokens of a "
                f"batch, but '{host.config.model_type}' models are causal: a token may not be told "
                "what follows. Choose moe=expert_threshold"
            )
        form.put(blocks[index], layer)
        before = layer.router


def _is_soft(router: Any) -> bool:
    made = getattr(router, "func", router)
    return isinstance(made, type) and issubclass(made, SoftSlots)


def _is_causal(model: Any) -> bool:
    config = getattr(model, "config", None)
    if config is None:
        return False
    return config.model_type in CAUSAL or bool(getattr(config, "is_decoder", False))


def _routers(router: Any, layers: int) -> list[Callable[..., Any]]:
    """One maker for each MoE layer: a list as ``target_k`` has one number for each.

    Raises:
        ConfigError: a list of another length; in a maker, options that the router refuses.
    """
    makers = [router] * layers
    targets = getattr(router, "keywords", {}).get("target_k")
    if isinstance(targets, Sequence):
        if len(targets) != layers:
            raise ConfigError(
                f"moe.router.target_k: expected one number, or {layers}, one for each MoE layer, "
                f"found {len(targets)}: {list(targets)}"
            )
        makers = [partial(router, target_k=target) for target in targets]
    return [partial(_made, maker) for maker in makers]


def _made(maker: Callable[..., Router], dim: int, slots: int, **more: Any) -> Router:
    try:
        return maker(dim, slots, **more)
    except ValueError as error:
        raise ConfigError(f"moe.router: {error}") from error


# Activations of transformers by class name, as PyTorch's own, which the fast path knows.
ACTIVATIONS = {
    "GELUActivation": lambda: nn.GELU(),
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "FastGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": lambda: nn.SiLU(),
}


class Form(Protocol):
    """One way to build an FFN into a block."""

    def expert(self, block: nn.Module, dropout: float | None) -> nn.Module:
        """Make a module ``[N, D] -> [N, D]`` of the block's FFN, with the block's weights.

        ``dropout``: the ``expert_dropout`` of ``add_moe_layers``.

        Raises:
            AttributeError: the block has no such FFN.
        """

    def put(self, block: Any, layer: nn.Module) -> None:
        """Put an MoE layer of such experts into the block."""

    def modules(self, block: Any) -> list[nn.Module]:
        """Return the modules that hold the FFN's parameters, or the MoE layer's in its place."""


@dataclass(frozen=True)
class Chain:
    """Linear, activation, linear, by their paths in the block.

    The output bias stays in the block, added once whatever the experts: they have none. Where
    ``place`` is given the layer takes the place of this module, which holds no more than the first
    two; else that of ``first``. Where ``whole`` is given, the module that holds all three and no
    more, the layer takes its place, and experts have output biases of their own.
    """

    first: str
    activation: str
    second: str
    place: str | None = None
    dropout: str | None = None
    """Between the activation and the second linear layer, where there is one."""
    whole: str | None = None

    def expert(self, block: nn.Module, dropout: float | None) -> nn.Module:
        first = linear(block.get_submodule(self.first), bias=True)
        second = linear(block.get_submodule(self.second), bias=self.whole is not None)
        parts = [first, torch_activation(block.get_submodule(self.activation))]
        if dropout is not None:
            parts.append(nn.Dropout(dropout))
        elif self.dropout is not None:
            parts.append(block.get_submodule(self.dropout))
        return nn.Sequential(*parts, second)

    def put(self, block: Any, layer: nn.Module) -> None:
        if self.whole is not None:
            block.set_submodule(self.whole, layer)
            return
        # NOTE: weights of experts that sum to less than 1 must not scale the output bias down, nor
        # sums of parts count it once for each of them: it stays outside.
        bias_D = getattr(block.get_submodule(self.second), "bias", None)
        block.set_submodule(self.second, nn.Identity() if bias_D is None else Bias(bias_D))
        block.set_submodule(self.activation, nn.Identity())
        if self.dropout is not None:
            block.set_submodule(self.dropout, nn.Identity())
        block.set_submodule(self.place or self.first, layer)

    def modules(self, block: Any) -> list[nn.Module]:
        paths = [self.whole] if self.whole is not None else [self.place or self.first, self.second]
        return [block.get_submodule(path) for path in paths]


@dataclass(frozen=True)
class Gated:
    """``down(act(gate(x)) * up(x))`` in ``block.mlp``, as in Llama. Such FFNs have no biases."""

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        mlp = block.mlp
        activation = torch_activation(mlp.act_fn)
        return GatedFFN(mlp.gate_proj, mlp.up_proj, activation, mlp.down_proj, dropout or 0.0)

    def put(self, block: Any, layer: nn.Module) -> None:
        block.mlp = layer

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.mlp]


@dataclass(frozen=True)
class TimmMlp:
    """timm's ``block.mlp`` with all it holds: experts keep their output biases, as GMoE's do."""

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        mlp = block.mlp
        _ = mlp.fc1, mlp.fc2  # AttributeError where there are none
        if dropout is not None:
            mlp.drop1 = nn.Dropout(dropout)  # drop2, after the second layer, stays as it is
        return mlp

    def put(self, block: Any, layer: nn.Module) -> None:
        block.mlp = layer

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.mlp]


BERT = Chain(
    "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", place="intermediate"
)
GPT2 = Chain("mlp.c_fc", "mlp.act", "mlp.c_proj")
TIMM_PARTS = Chain("mlp.fc1", "mlp.act", "mlp.fc2", dropout="mlp.drop1")

# By ``model_type`` of a transformers configuration.
FORMS: dict[str, Form] = {
    "bert": BERT,
    "camembert": BERT,
    "deberta": BERT,
    "deberta-v2": BERT,
    "electra": BERT,
    "mpnet": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "distilbert": Chain("ffn.lin1", "ffn.activation", "ffn.lin2"),
    "gpt2": GPT2,
    "gpt_neo": GPT2,
    "gpt_neox": Chain("mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    # MoE-LLaVA's and DynMoE's checkpoints have an output bias in every expert.
    "phi": Chain("mlp.fc1", "mlp.activation_fn", "mlp.fc2", whole="mlp"),
    "gemma": Gated(),
    "llama": Gated(),
    "mistral": Gated(),
    "qwen2": Gated(),
    "qwen3": Gated(),
    "smollm3": Gated(),
    "stablelm": Gated(),
}

# Decoders among them: a token sees those before it alone.
CAUSAL = (
    *("gpt2", "gpt_neo", "gpt_neox", "phi", "gemma", "llama", "mistral", "qwen2", "qwen3"),
    *("smollm3", "stablelm"),
)


def blocks_of(model: nn.Module, parts: bool = False) -> tuple[Sequence[nn.Module], Form]:
    """Return the blocks of a timm ViT or a transformers model, and the form of their FFNs.

    ``parts``: experts will be parts of the FFN whose outputs add up, so that it must be separated
    from its output bias everywhere.

    Raises:
        ConfigError: a kind of model that is not known, or one that cuts its FFNs' input in chunks.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        blocks: Any = model.blocks
        return blocks, TIMM_PARTS if parts else TimmMlp()
    form = FORMS.get(config.model_type)
    if form is None:
        raise ConfigError(
            f"backbone: MoE layers in '{config.model_type}' models: not known where their FFNs "
            f"are. Known: {', '.join(FORMS)}. Another is a line in FORMS of "
            "dynmoe/backbones/surgery.py; moe=dense needs none."
        )
    if parts and isinstance(form, Chain):
        form = replace(form, whole=None)
    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if chunk:
        raise ConfigError(
            f"backbone.options.chunk_size_feed_forward: expected 0 with MoE layers, found {chunk}: "
            "they route whole texts, whose padding they are told of. Set it to 0, or moe=dense."
        )
    # The list of blocks has another name in every family; its length is always the depth.
    depth = config.num_hidden_layers
    lists: Any = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return next(lists), form


class Bias(nn.Module):
    """The output bias of an FFN that became an MoE layer."""

    def __init__(self, bias_D: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias_D.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


def linear(layer: Any, bias: bool) -> nn.Linear:
    """Make an ``nn.Linear`` of the weights of one, or of GPT-2's transposed ``Conv1D``.

    Raises:
        ConfigError: it is neither, so that its weights alone do not say what it computes.
    """
    weight_OI = layer.weight.detach()
    if type(layer).__name__ == "Conv1D":
        weight_OI = weight_OI.t().contiguous()
    elif not is_plain_linear(layer):
        raise ConfigError(
            f"backbone: an MoE layer needs plain linear layers in the FFN it replaces, found "
            f"{type(layer).__name__} with weights of type {type(layer.weight).__name__}. Merge "
            "adapters, remove parametrizations and hooks, and load weights that are not quantised."
        )
    made = nn.Linear(weight_OI.shape[1], len(weight_OI), bias=False, device="meta")
    made.weight = nn.Parameter(weight_OI)
    if bias:
        made.bias = layer.bias
    return made


def torch_activation(module: nn.Module) -> nn.Module:
    """Return PyTorch's own activation where it computes the same, else the module itself."""
    maker = ACTIVATIONS.get(type(module).__name__)
    return module if maker is None else maker()
