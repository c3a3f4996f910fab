"""Replace the FFNs of chosen Transformer blocks by MoE layers.

The surgery asks for blocks by placement, and leaves to a ``Form`` where a kind of block keeps its
FFN and how an MoE layer takes its place.

Shape suffixes: N rows, D model width, I and O inputs and outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dynmoe.backbones.families import FAMILIES
from dynmoe.backbones.forms import Chain, Form, Gated, Packed, Timm, Whole
from dynmoe.backbones.mixtures import Mixture, own_router
from dynmoe.errors import ConfigError
from dynmoe.layers.conflict import ConflictLoss
from dynmoe.layers.experts import Backend, Init, linears
from dynmoe.layers.moe import MoELayer
from dynmoe.layers.routers import Router
from dynmoe.layers.soft import SoftMoELayer, SoftSlots

Start = Init | Literal["keep"]

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
    init: Start,
    expert_dropout: float | None = None,
    recompute: bool = False,
    backend: Backend = "auto",
    shared_experts: int = 0,
    keep_origin: bool = False,
    conflict: Mapping[str, Any] | None = None,
) -> None:
    """Turn the FFNs of the chosen blocks into MoE layers, in place.

    ``init="copy"``: every expert starts as a copy of the block's FFN (GMoE, DynMoE), and so the
    layer as that FFN where a token's weights sum to 1, which top-1's do not (``TopKRouter``);
    ``cluster`` or ``random``: as a part of it (EMoE); ``fresh``: drawn anew, for training from
    scratch. ``keep``: of a model that is a mixture already, which takes no other: its experts as
    they are, all of them. Named placements then count its mixtures alone, and the router may be
    ``own_router``. Blocks that are not chosen stay as they are.
    A list as the router's ``target_k`` has one number for each layer.
    ``expert_dropout`` acts after the activation inside experts only (0.1 in GMoE); None keeps the
    FFN's own. ``recompute``, ``backend``, ``shared_experts``: see ``MoELayer``. ``conflict``: the
    options of ``ConflictLoss``. All of an MoE layer is trained, whatever was frozen.

    Raises:
        ConfigError: blocks that are not there, or whose FFN is of a form not known or cannot be
            split; experts of a mixture and another ``init`` or ``num_experts``, or ``own_router``
            where there is none; options of the router that it refuses; a causal model for a router
            that ``sees_batch``.
    """
    if layers == "none":
        return
    host: Any = getattr(backbone, "language_model", backbone)
    blocks, form = blocks_of(host, parts=init in ("cluster", "random"))
    if isinstance(form, Mixture):
        _keep_experts(
            host,
            form,
            _mixtures_among(blocks, form, layers),
            router,
            num_experts=num_experts,
            max_experts=max_experts,
            init=init,
            dropout=expert_dropout,
            recompute=recompute,
            backend=backend,
            shared_experts=shared_experts,
            keep_origin=keep_origin,
            conflict=conflict,
        )
        return
    if init == "keep" or is_own(router):
        key = "init=keep" if init == "keep" else "router"
        raise ConfigError(
            f"moe.{key}: expected a model that is a mixture already, one of "
            f"{', '.join(FAMILIES)}, found {type(backbone).__name__} with dense FFNs. Set "
            "moe.init=auto with moe=dynmoe or moe=topk"
        )
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
                f"timm's Vision Transformers or known transformers models have ({error}). "
                "docs/models.md lists those that work; moe=dense needs none."
            ) from error
        expert.requires_grad_(True)
        dim = linears(expert)[0].in_features
        options: Any = {"init": init, "recompute": recompute, "shared_experts": shared_experts}
        if is_soft(router):
            layer: Any = SoftMoELayer(expert, dim, make, num_experts, **options)
        else:
            options |= {"max_experts": max_experts, "keep_origin": keep_origin, "backend": backend}
            options |= {"conflict": _conflict(conflict)}
            layer = MoELayer(expert, dim, make, num_experts, **options)
        if layer.router.sees_batch:
            _check_not_causal(host, layer.router)
        form.put(blocks[index], layer)
        before = layer.router
        blocks[index].train(blocks[index].training)  # what is new begins in training mode


def _conflict(options: Mapping[str, Any] | None) -> ConflictLoss | None:
    """One for each layer, which counts its own pairs."""
    return None if options is None else ConflictLoss(**options)


def _check_not_causal(host: Any, router: Any) -> None:
    config = getattr(host, "config", None)
    kind = getattr(config, "model_type", None)
    decodes = bool(getattr(config, "is_decoder", False))
    if kind is not None and (decodes or kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        raise ConfigError(
            f"moe.router: experts of a {type(router).__name__} see other tokens of a batch, but "
            f"'{kind}' models are causal: a token may not be told what follows. Choose "
            "moe=expert_threshold"
        )


def is_soft(router: Any) -> bool:
    """Whether a maker is one of Soft MoE's slots, whose layer is another."""
    made = getattr(router, "func", router)
    return isinstance(made, type) and issubclass(made, SoftSlots)


def _routers(router: Any, layers: int) -> list[Callable[..., Any]]:
    """One maker for each MoE layer: a list as ``target_k`` has one number for each.

    Raises:
        ConfigError: a list of another length; in a maker, options that the router refuses.
    """
    targets = getattr(router, "keywords", {}).get("target_k")
    if not isinstance(targets, Sequence):
        return [partial(_made, router)] * layers
    if len(targets) != layers:
        raise ConfigError(
            f"moe.router.target_k: expected one number, or {layers}, one for each MoE layer, found "
            f"{len(targets)}: {list(targets)}"
        )
    return [partial(_made, partial(router, target_k=target)) for target in targets]


def _made(maker: Callable[..., Router], dim: int, slots: int, **more: Any) -> Router:
    try:
        return maker(dim, slots, **more)
    except ValueError as error:
        raise ConfigError(f"moe.router: {error}") from error


def is_mixture(backbone: nn.Module) -> bool:
    """Whether a model is a mixture already, whose experts can be kept."""
    host = getattr(backbone, "language_model", backbone)
    return getattr(getattr(host, "config", None), "model_type", None) in FAMILIES


def is_own(router: object) -> bool:
    """Whether a maker of routers is ``own_router``, which needs a model's own."""
    return getattr(router, "func", router) is own_router


def _mixtures_among(
    blocks: Sequence[nn.Module], form: Mixture, layers: Placement
) -> dict[int, nn.Module]:
    """The chosen blocks by index; names count mixtures alone.

    Raises:
        ConfigError: there are none, or a block that is dense.
    """
    found = [index for index, block in enumerate(blocks) if form.is_in(block)]
    chosen = placed_blocks(layers, len(found if isinstance(layers, str) else blocks))
    if isinstance(layers, str):
        chosen = [found[place] for place in chosen]
    if dense := sorted(set(chosen).difference(found)):
        raise ConfigError(
            f"moe.layers={layers}: expected blocks that are mixtures, which this model has at "
            f"{found}, found dense blocks {dense}. Leave them out, or set moe.layers=all"
        )
    if not found:
        raise ConfigError(
            f"moe.layers={layers}: no block of this model is a mixture. Choose moe=dense"
        )
    return {index: blocks[index] for index in chosen}


def _keep_experts(
    host: Any,
    form: Mixture,
    blocks: dict[int, nn.Module],
    router: Any,
    *,
    num_experts: int,
    max_experts: int,
    init: Start,
    dropout: float | None,
    recompute: bool,
    backend: Backend,
    shared_experts: int,
    keep_origin: bool,
    conflict: Mapping[str, Any] | None,
) -> None:
    """Turn the mixtures of the chosen blocks into MoE layers of the same experts."""
    kind = host.config.model_type
    if init != "keep":
        raise ConfigError(
            f"moe.init={init}: makes experts of one FFN, but a '{kind}' model has experts already. "
            "Set moe.init=keep"
        )
    if keep_origin:
        raise ConfigError(
            "moe.adaptation.init=pretrained: takes the FFN that experts were made from, but those "
            f"of a '{kind}' model were made from none. Set moe.adaptation.init=copy_most_used"
        )
    if is_soft(router):
        raise ConfigError(
            f"moe.router: Soft MoE makes experts of one FFN, but a '{kind}' model has experts "
            "already. Choose moe=native, moe=topk or moe=dynmoe"
        )
    before: Any = None
    for block, made in zip(blocks.values(), _routers(router, len(blocks)), strict=True):
        if before is not None and before.hands_on:
            made = partial(made, after=before)
        experts = form.experts(block, dropout)
        if len(experts) != num_experts:
            raise ConfigError(
                f"moe.num_experts={num_experts}: this '{kind}' model has {len(experts)} experts in "
                f"a block, and moe.init=keep keeps them all. Set moe.num_experts={len(experts)} "
                f"moe.max_experts={max(max_experts, len(experts))}"
            )
        for expert in experts:
            expert.requires_grad_(True)
        if is_own(router):
            own = form.routing(block)
            own.weight_ED.requires_grad_(True)
            made = partial(router, own=own)
        dim = linears(experts[0])[0].in_features
        layer = MoELayer(
            experts,
            dim,
            made,
            num_experts,
            max_experts,
            recompute=recompute,
            backend=backend,
            shared_experts=shared_experts,
            conflict=_conflict(conflict),
        )
        form.put(block, layer)
        before = layer.router
        block.train(block.training)  # as above
    # Its balance loss would be of routers that are gone; the layers have their own.
    if blocks and hasattr(host.config, "output_router_logits"):
        host.config.output_router_logits = False


BERT = Chain(
    "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", place="intermediate"
)
GPT2 = Chain("mlp.c_fc", "mlp.act", "mlp.c_proj")
GPTJ = Chain("mlp.fc_in", "mlp.act", "mlp.fc_out")
NEOX = Chain("mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h")
NEMOTRON = Chain("mlp.up_proj", "mlp.act_fn", "mlp.down_proj")
FC = Chain("mlp.fc1", "mlp.activation_fn", "mlp.fc2")
FAIRSEQ = Chain("fc1", "activation_fn", "fc2", dropout="activation_dropout")
MODERNBERT = Packed("mlp.Wi", "mlp.Wo", "mlp.act", dropout="mlp.drop")
LFM2 = Gated(
    *("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"), nn.SiLU, place="feed_forward"
)

# By ``model_type`` of a transformers configuration.
FORMS: dict[str, Form] = {
    # Two matrices.
    "apertus": NEMOTRON,
    "arcee": NEMOTRON,
    "bert": BERT,
    "bert-generation": BERT,
    "biogpt": FAIRSEQ,
    "bloom": Chain("mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h"),
    "camembert": BERT,
    "codegen": GPTJ,
    "ctrl": Chain("ffn.0", "ffn.1", "ffn.2"),
    "data2vec-text": BERT,
    "deberta": BERT,
    "deberta-v2": BERT,
    "distilbert": Chain("ffn.lin1", "ffn.activation", "ffn.lin2"),
    "electra": BERT,
    "ernie": BERT,
    "esm": Chain("intermediate.dense", nn.GELU, "output.dense", place="intermediate"),
    "falcon": NEOX,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": GPT2,
    "gpt_neox": NEOX,
    "gpt_neox_japanese": NEOX,
    "gptj": GPTJ,
    "jais2": NEMOTRON,
    "jina_embeddings_v3": FC,
    "luke": BERT,
    "megatron-bert": BERT,
    "mpnet": BERT,
    "mpt": Chain("ffn.up_proj", "ffn.act", "ffn.down_proj"),
    "nanochat": FC,
    "nemotron": NEMOTRON,
    "openai-gpt": GPT2,
    "opt": Chain("fc1", "activation_fn", "fc2"),
    "persimmon": NEOX,
    # MoE-LLaVA's and DynMoE's checkpoints have an output bias in every expert.
    "phi": Chain("mlp.fc1", "mlp.activation_fn", "mlp.fc2", whole="mlp"),
    "rembert": BERT,
    "roberta": BERT,
    # Its norm lies before the first matrix, beside it.
    "roberta-prelayernorm": replace(BERT, place=None),
    "roc_bert": BERT,
    "roformer": BERT,
    "starcoder2": GPT2,
    "xglm": FAIRSEQ,
    "xlm-roberta": BERT,
    "xlm-roberta-xl": BERT,
    "xmod": BERT,
    # A gate and two matrices.
    "bamba": Gated(
        *("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
        *("feed_forward.act_fn", "feed_forward"),
    ),
    "cohere": Gated(),
    "cohere2": Gated(),
    "cwm": Gated(),
    "diffllama": Gated(),
    "doge": Gated(),
    "ernie4_5": Gated(),
    "esmc": Gated(),
    "eurobert": Gated(),
    "exaone": Gated(),
    "exaone4": Gated(),
    "flint": Gated(),
    "gemma": Gated(),
    "gemma2": Gated(),
    "gemma3_text": Gated(),
    "gemma4_text": Gated(),
    "granite": Gated(),
    "granite_swa": Gated(),
    "gte": Gated(dropout="mlp.dropout"),
    "helium": Gated(),
    "hunyuan_v1_dense": Gated(),
    "hyperclovax": Gated(),
    "internlm3": Gated(),
    "iquestcoder": Gated(),
    "lfm2": LFM2,
    "lfm3": LFM2,
    "llama": Gated(),
    "minicpm3": Gated(),
    "ministral": Gated(),
    "ministral3": Gated(),
    "mistral": Gated(),
    "nomic_bert": Gated(),
    "olmo": Gated(),
    "olmo2": Gated(),
    "olmo3": Gated(),
    "olmo_hybrid": Gated(),
    "qwen2": Gated(),
    "qwen3": Gated(),
    "qwen3_5_text": Gated(),
    "recurrent_gemma": Gated(
        *("mlp_block.gate_proj", "mlp_block.up_proj", "mlp_block.down_proj"),
        *("mlp_block.act_fn", "mlp_block"),
    ),
    "seed_oss": Gated(after="mlp.residual_dropout"),
    "smollm3": Gated(),
    "stablelm": Gated(),
    "ultrabert": Gated(),
    "vaultgemma": Gated(),
    "youtu": Gated(),
    # The same in two matrices, gate and up in one.
    "glm": Packed(),
    "glm4": Packed(),
    "modernbert": MODERNBERT,
    "modernbert-decoder": MODERNBERT,
    "moshi": Packed("mlp.fc1", "mlp.fc2"),
    "phi3": Packed(),
    # Norms, multipliers or more between these matrices.
    "beam": Whole("mlp"),
    "bitnet": Whole("mlp"),
    "falcon_h1": Whole("feed_forward"),
    "gemma3n_text": Whole("mlp"),
}

# Why others have none, where a user may ask for them: their types, between spaces.
REFUSED = {
    "its blocks share their FFNs": "albert zamba zamba2",
    "each of its blocks has four FFNs, narrower than its tokens": "mobilebert",
    "its experts have biases, and a gate of their own that is clamped": "gpt_oss",
    "its attention heads are experts too": "jetmoe",
    "its router weights the input of its experts, not their output": "llama4_text",
    "its FFNs are mixtures of experts already, of another build than moe.init=keep knows": (
        "aria_text axk1 axk2 bailing_hybrid cohere2_moe dbrx deepseek_v32 deepseek_v4 exaone_moe "
        "glm4_moe_lite glm_moe_dsa granitemoehybrid hunyuan_v1_moe hy_v4 kimi_linear lfm2_moe "
        "longcat_flash minimax_m2 mistral4 qwen3_5_moe_text solar_open zaya"
    ),
    "it has no FFNs, or they are blocks of their own": "falcon_mamba mamba mamba2 nemotron_h xlstm",
    "its FFNs are convolutions in groups": "squeezebert",
    "its FFNs compute with quantised numbers": "ibert",
    "its FFNs mix each token with the one before": "rwkv",
    "its FFNs are not in its blocks": "flaubert xlm",
    "its blocks see texts in other lengths or another order than their padding mask": (
        "big_bird canine funnel longformer perceiver reformer xlnet"
    ),
    "padding changes its other tokens, with dense FFNs too": "convbert fnet nystromformer",
    "it has two stacks of blocks, an encoder and a decoder": (
        "bart bigbird_pegasus blenderbot led marian mbart mt5 mvp pegasus plbart prophetnet t5 "
        "t5gemma umt5 whisper"
    ),
}

# Options of transformers that change what an FFN is, and why MoE layers need them off.
OPTIONS = {
    "chunk_size_feed_forward": "they route whole texts, whose padding they are told of",
    "enable_moe_block": "its blocks then have experts of their own",
    "is_moe": "its FFNs then are mixtures already",
    "slow_but_exact": "its blocks then read slices of a matrix that experts have instead",
}


def blocks_of(model: nn.Module, parts: bool = False) -> tuple[Sequence[nn.Module], Form | Mixture]:
    """Return the blocks of a timm ViT or a transformers model, and the form of their FFNs.

    ``parts``: experts will be parts of the FFN whose outputs add up, so that it must be separated
    from its output bias everywhere.

    Raises:
        ConfigError: a kind of model that is not known, or with options under which its FFNs are
            others, or FFNs that have no parts.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        blocks: Any = model.blocks
        return blocks, Timm(parts)
    kind = config.model_type
    form: Form | Mixture | None = FORMS.get(kind)
    if kind in FAMILIES:
        form = Mixture(kind, FAMILIES[kind])
    if form is None:
        reasons = (reason for reason, kinds in REFUSED.items() if kind in kinds.split())
        raise ConfigError(
            f"backbone: MoE layers in '{kind}' models: "
            f"{next(reasons, 'not known where their FFNs are')}. docs/models.md lists those that "
            "work. Another is a line in FORMS of dynmoe/backbones/surgery.py; moe=dense needs none."
        )
    for key, reason in OPTIONS.items():
        found = getattr(config, key, None)
        if found:
            raise ConfigError(
                f"backbone.options.{key}: expected {type(found)()} with MoE layers, found {found}: "
                f"{reason}. Set it to {type(found)()}, or moe=dense."
            )
    if parts and isinstance(form, Whole):
        raise ConfigError(
            f"moe.init: the FFNs of '{kind}' models hold more than linear layers and an "
            "activation, and have no parts. Set moe.init=copy."
        )
    if parts and isinstance(form, Chain):
        form = replace(form, whole=None)
    return _blocks(model, config.num_hidden_layers, form), form


def _blocks(model: nn.Module, depth: int, form: Form | Mixture) -> Sequence[nn.Module]:
    """Return the list of blocks, which has another name in every family."""
    lists: Any = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    blocks: Sequence[nn.Module]
    for blocks in lists:
        try:
            form.modules(blocks[0])
        except AttributeError:  # another list of as many
            continue
        return blocks
    raise ConfigError(
        f"backbone: {type(model).__name__} has no list of {depth} blocks with such FFNs as others "
        f"of its type have. Set moe=dense."
    )
