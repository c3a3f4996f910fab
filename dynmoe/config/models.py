"""Rules about the backbone that its configuration and a few source files decide, without PyTorch.

Names of models are read from the sources of timm and transformers; a model in a folder from its
config.json.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dynmoe.backbones.families import FAMILIES, NUMBERS, jitter, not_ours
from dynmoe.config.options import modality, read
from dynmoe.config.targets import (
    TargetError,
    Unreadable,
    class_attribute,
    did_you_mean,
    locate,
)

# The number of blocks, in timm's options and in those of transformers' families.
DEPTHS = ("depth", "num_hidden_layers", "n_layer", "n_layers")


def known_vits(cfg: DictConfig) -> Iterator[str]:
    """timm's models by name; `hf_hub:` and other places are looked up when they are loaded."""
    for node in ("backbone", "backbone.vision"):
        model = read(cfg, f"{node}.model", str)
        if model is None or ":" in model or not _is_timm(cfg, node):
            continue
        known = timm_models()
        name = model.partition(".")[0]
        if known and name not in known:
            near = did_you_mean(name, known, 3)
            yield f"{node}.model: timm knows no '{model}'.{near or ' timm.list_models() has all.'}"
        elif known and not known[name]:
            yield (
                f"{node}.model: a Vision Transformer is needed, '{model}' is none. "
                "Choose one, e.g. vit_small_patch16_224 or deit_small_patch16_224"
            )


def _is_timm(cfg: DictConfig, node: str) -> bool:
    if node == "backbone":
        return modality(cfg, "backbone") == "image"
    return read(cfg, f"{node}.library", str) == "timm"


@lru_cache
def timm_models() -> dict[str, bool]:
    """timm's models, each with whether its module may make Vision Transformers: blocks, sizes."""
    found: dict[str, bool] = {}
    for file in _folder("timm", "models").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        is_vit = "VisionTransformer" in source or ("self.blocks" in source and "img_size" in source)
        names = re.findall(r"^@register_model\s*\ndef (\w+)\(", source, re.M)
        for renamed in re.findall(
            r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", source, re.M | re.S
        ):
            names += re.findall(r"^    ['\"](\w+)['\"]:", renamed, re.M)
        found |= dict.fromkeys(names, is_vit)
    return found


def _folder(package: str, *below: str) -> Path:
    spec = find_spec(package)
    origin = spec.origin if spec is not None else None
    return Path(origin or ".").parent.joinpath(*below)


def whole_patches(cfg: DictConfig) -> Iterator[str]:
    for node in ("backbone", "backbone.vision"):
        pixels, patch = read(cfg, f"{node}.image_size", int), patch_size(cfg, node)
        if pixels is None or patch is None or min(pixels, patch) < 1:
            continue
        if pixels % patch:
            sizes = [n for n in (pixels // patch * patch, (pixels // patch + 1) * patch) if n]
            yield (
                f"{node}.image_size: {pixels} px are no whole number of patches of {patch} px. "
                f"Take {' or '.join(map(str, sizes))}"
            )
        given = read(cfg, f"{node}.patch_size", int)
        if given is not None and given != patch:
            yield (
                f"{node}.patch_size: expected {patch}, the size of this tower's patches, found "
                f"{given}. {node}.options.patch_size changes both"
            )


def patch_size(cfg: DictConfig, node: str) -> int | None:
    """Pixels of a patch: of the options, else of the model's name."""
    given = read(cfg, f"{node}.options.patch_size", int)
    name = re.search(r"patch(\d+)", read(cfg, f"{node}.model", str) or "")
    return given or (int(name[1]) if name else None) or read(cfg, f"{node}.patch_size", int)


def sparse_tokens(cfg: DictConfig) -> Iterator[str]:
    """Blocks with fewer tokens, links of adapters; models are looked at when they are built."""
    node = "backbone.token_sparsify"
    blocks, keep = read(cfg, f"{node}.blocks", list), read(cfg, f"{node}.keep", list)
    if any(not isinstance(block, int) for block in blocks or ()):
        return
    if blocks is not None and blocks != sorted(set(blocks)):
        yield f"{node}.blocks: expected rising indices of blocks, each once, found {blocks}"
    number = depth(cfg)
    beyond = [] if number is None else [n for n in blocks or () if n >= number[1]]
    if number is not None and beyond:
        yield (
            f"{node}.blocks: there is no block {beyond[0]}: {number[0]} is {number[1]}. Choose "
            f"some of 0 to {number[1] - 1}, or quarters"
        )
    if blocks is not None and keep is not None and len(blocks) != len(keep):
        yield (
            f"{node}.keep: expected one share, or {len(blocks)}, one for each of the blocks, found "
            f"{len(keep)}"
        )
    links = read(cfg, "backbone.adapter.links", bool)
    early = links is False or 0 in (blocks or ())
    if read(cfg, "backbone.adapter.link_embeddings", bool) and early:
        yield (
            "backbone.adapter.link_embeddings: adds the embeddings at the end of the first linked "
            "stage. Set backbone.adapter.links=true and no block 0 in "
            f"{node}.blocks, or link_embeddings=false"
        )


def data_fit_backbone(cfg: DictConfig) -> Iterator[str]:
    """Keys of the data that are copies of the backbone's."""
    node = "backbone.vision" if modality(cfg, "data") == "vision-language" else "backbone"
    for key in ("image_size", "patch_size"):
        ours, theirs = read(cfg, f"data.{key}", int), read(cfg, f"{node}.{key}", int)
        if ours is not None and theirs is not None and ours != theirs:
            yield (
                f"data.{key}: expected {node}.{key} ({theirs}), found {ours}. "
                f"Leave it out and set {node}.{key}"
            )


def head_has_weights(cfg: DictConfig) -> Iterator[str]:
    if read(cfg, "backbone.head", str) == "keep" and not read(cfg, "backbone.pretrained", object):
        yield "backbone.head: there is none to keep without weights. Set backbone.pretrained"


def language_model(cfg: DictConfig) -> Iterator[str]:
    """The type of a model of transformers, by name or in its folder."""
    if modality(cfg, "backbone") == "image":
        return
    kind, key = read(cfg, "backbone.architecture", str), "backbone.architecture"
    given = read(cfg, "backbone.model", str), read(cfg, "backbone.path", str)
    if kind is None:
        kind, key = folder_config(cfg).get("model_type"), "backbone.path"
    elif any(given):
        yield f"{key}: found beside backbone.model or backbone.path. Set all but one to null"
    elif read(cfg, "backbone.pretrained", bool):
        yield (
            "backbone.pretrained: an architecture has no weights. Set it to false, or give "
            "backbone.model or backbone.path in the place of backbone.architecture"
        )
    known = transformers_types()
    if kind is None or not known:
        return
    if kind not in known:
        yield f"{key}: transformers knows no model type '{kind}'.{did_you_mean(kind, known)}"
    elif kind not in (*(forms := moe_types()), *FAMILIES) and forms and _has_layers(cfg):
        reason = moe_refusals().get(kind, "not known where their FFNs are")
        yield (
            f"{key}: MoE layers in '{kind}' models: {reason}. docs/models.md lists those that "
            "work, e.g. bert, llama, qwen3. moe=dense needs none."
        )
    elif kind in FAMILIES:
        return
    elif modality(cfg, "backbone") == "text-stream" and (causal := causal_models()):
        is_decoder = bool(_setting(cfg, "is_decoder"))
        if kind not in causal or (kind in encoders() and not is_decoder):
            yield (
                f"{key}: a '{kind}' model sees the tokens that it has to predict, or transformers "
                "has no causal language model of it. Take a decoder, e.g. llama, gpt2, qwen3"
            )
    elif modality(cfg, "backbone") == "text" and kind not in (has := text_classifiers()) and has:
        yield (
            f"{key}: transformers has no text classifier of '{kind}' models "
            "(AutoModelForSequenceClassification). Take another type, e.g. bert, llama, qwen3"
        )


# Types of models with learnt positions. Relative and rotary ones have no end.
POSITIONS = (
    *("albert", "bert", "camembert", "distilbert", "electra", "gpt2", "gpt_bigcode", "gpt_neo"),
    *("opt", "roberta", "xlm-roberta"),
)
PLACES = ("max_position_embeddings", "n_positions")
"""Settings with their number; transformers takes the first where both are given."""
AFTER_PADDING = ("camembert", "roberta", "xlm-roberta")
"""Types whose positions are numbered from the one after the id of padding."""


def positions_of(kind: str, places: int, padding: int | None) -> int:
    """Return how many tokens have a position; ``padding``: the id of padding, 0 in a vocabulary
    that is learnt."""
    return places - (1 + (padding or 0)) * (kind in AFTER_PADDING)


def positions_fit(cfg: DictConfig) -> Iterator[str]:
    """Texts have a position for each token; models that are not known here are asked when built."""
    keys = {"text": "data.max_length", "text-stream": "data.length"}
    key, kind = keys.get(modality(cfg, "data") or ""), model_type(cfg)
    if key is None or kind not in POSITIONS:
        return
    tokens, found = read(cfg, key, int), (_setting(cfg, name) for name in PLACES)
    places = next((each for each in found if each is not None), None)
    if tokens is None or not isinstance(places, int):
        return
    most = positions_of(kind, places, _setting(cfg, "pad_token_id"))
    if tokens > most:
        yield (
            f"{key}: expected at most {most}, the positions of this '{kind}' backbone, found "
            f"{tokens}. Lower it, or choose another backbone"
        )


def own_mixture(cfg: DictConfig) -> Iterator[str]:
    """A model that is a mixture already keeps all its experts; others have none to keep."""
    if not _has_layers(cfg):
        return
    init = read(cfg, "moe.init", str)
    router = read(cfg, "moe.router", dict) or {}
    is_own = str(router.get("_target_")).endswith(".own_router")
    kind = model_type(cfg)
    if kind not in FAMILIES:
        if kind is not None and (is_own or init == "keep"):
            key = "moe: native" if is_own else "moe.init: keep"
            yield (
                f"{key} is for models that are mixtures already ({', '.join(FAMILIES)}), found "
                f"'{kind}'. Choose moe=dynmoe or moe=topk with moe.init=auto"
            )
        return
    if init not in (None, "auto", "keep"):
        yield (
            f"moe.init: {init} makes experts of one FFN, but a '{kind}' model has experts already. "
            "Set moe.init=keep, and choose moe=native, moe=dynmoe or moe=topk"
        )
    number, found = own_experts(cfg), read(cfg, "moe.num_experts", int)
    if number is not None and found is not None and number != found:
        yield (
            f"moe.num_experts: expected {number}, all experts of a block of this '{kind}' model, "
            f"found {found}. Leave it out"
        )
    if read(cfg, "moe.adaptation.init", str) == "pretrained":
        yield (
            "moe.adaptation.init: pretrained takes the FFN that experts were made from, but those "
            f"of a '{kind}' model were made from none. Set copy_most_used"
        )
    if _setting(cfg, "output_router_logits"):
        yield (
            "backbone.options.output_router_logits: expected false: the loss of the MoE layers, "
            "moe.aux_weight, takes the place of the model's own. Set it to false"
        )
    if is_own and FAMILIES[kind].weights is None:
        yield not_ours(kind, FAMILIES[kind].unlike)
    if is_own and _setting(cfg, "router_jitter_noise"):
        yield jitter(_setting(cfg, "router_jitter_noise"))


def own_experts(cfg: DictConfig) -> int | None:
    """The experts in a block of a model that is a mixture already; None: none, or not known."""
    found = None
    if model_type(cfg) in FAMILIES:
        found = next((n for key in NUMBERS if (n := _setting(cfg, key)) is not None), None)
    return found if isinstance(found, int) else None


def model_type(cfg: DictConfig) -> str | None:
    """The type of a model of transformers, ``timm`` for one of timm's; None: not known here."""
    if modality(cfg, "backbone") == "image":
        return "timm"
    given = read(cfg, "backbone.architecture", str) or _model_config(cfg).get("model_type")
    return given if isinstance(given, str) else None


def _setting(cfg: DictConfig, key: str) -> Any:
    """A setting of the model: of the options, else of its config.json."""
    given = read(cfg, f"backbone.options.{key}", object)
    return _model_config(cfg).get(key) if given is None else given


def _model_config(cfg: DictConfig) -> dict[str, Any]:
    """config.json of `backbone.path`, or of a model of the hub that was downloaded before."""
    model = read(cfg, "backbone.model", str)
    if read(cfg, "backbone.path", str) is not None or model is None:
        return folder_config(cfg)
    from huggingface_hub import constants  # the library itself would take a quarter of a second

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return {}
    return _read_config(folder / "snapshots" / commit)


def causal_model(cfg: DictConfig) -> Iterator[str]:
    """Routers whose experts choose among the tokens of a batch; models on the hub, which are known
    here by a name alone, are looked at when they are built."""
    target = read(cfg, "moe.router._target_", str)
    if target is None or modality(cfg, "backbone") == "image":
        return
    try:
        sees_batch = class_attribute(target, "sees_batch")
    except TargetError:
        return
    kind = model_type(cfg)
    generates = modality(cfg, "backbone") in ("text-stream", "vision-language")
    known = encoders()
    causal = generates or bool(kind is not None and known and kind not in known)
    if sees_batch is True and causal:
        name = read(cfg, "moe.name", str)
        yield (
            f"moe: experts of moe={name} choose among the tokens of a batch, but this backbone is "
            "causal: a token may not be told what follows. Choose moe=expert_threshold"
        )


def _has_layers(cfg: DictConfig) -> bool:
    return read(cfg, "moe.layers", object) not in (None, [], "none")


def depth(cfg: DictConfig) -> tuple[str, int] | None:
    """The number of blocks that get MoE layers, and the key it comes from; None: not known here."""
    for key in DEPTHS:
        found = read(cfg, f"backbone.options.{key}", int)
        if found is not None:
            return f"backbone.options.{key}", found
    for key in DEPTHS:
        found = folder_config(cfg).get(key)
        if isinstance(found, int):
            return f"{key} in backbone.path", found
    return None


def moe_layers(cfg: DictConfig) -> int | None:
    """The number of MoE layers (`moe.layers`, backbones/surgery.py); None: not known here."""
    wanted = read(cfg, "moe.layers", list) or read(cfg, "moe.layers", str)
    if isinstance(wanted, list):
        return len(set(wanted))
    if wanted in ("every_two", "last_two"):
        return 2
    known = depth(cfg)
    if known is None or model_type(cfg) in FAMILIES:  # some of their blocks may be dense
        return None
    blocks = known[1]
    counts = {"sparse": blocks - blocks // 2, "first_half": blocks // 2, "all": blocks}
    return {**counts, "second_half": counts["sparse"]}.get(wanted or "")


def folder_config(cfg: DictConfig) -> dict[str, Any]:
    """config.json of `backbone.path`; empty where there is none that can be read."""
    path = read(cfg, "backbone.path", str)
    return {} if path is None else _read_config(Path(path).expanduser())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # machine.folders and the loader name them
        return {}
    return found if isinstance(found, dict) else {}


@lru_cache
def transformers_types() -> tuple[str, ...]:
    """Model types of transformers (models/auto); empty without the library."""
    folder = _folder("transformers", "models", "auto")
    found: list[str] = []
    for name in ("auto_mappings.py", "configuration_auto.py"):
        if (folder / name).is_file():
            source = (folder / name).read_text(encoding="utf-8")
            found += re.findall(r"""["']([\w.-]+)["']\s*[,:]\s*["']\w+Config["']""", source)
    return tuple(sorted(set(found)))


@lru_cache
def text_classifiers() -> tuple[str, ...]:
    """Model types with a text classifier in transformers (models/auto); empty without it."""
    return _auto_types("SEQUENCE_CLASSIFICATION")


@lru_cache
def causal_models() -> tuple[str, ...]:
    """Model types with a causal language model in transformers (models/auto); empty without it."""
    return _auto_types("CAUSAL_LM")


@lru_cache
def encoders() -> tuple[str, ...]:
    """Model types whose tokens see those after them: the ones trained on masked texts."""
    return _auto_types("MASKED_LM")


def _auto_types(task: str) -> tuple[str, ...]:
    file = _folder("transformers", "models", "auto") / "modeling_auto.py"
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    table = re.search(rf"^MODEL_FOR_{task}_MAPPING_NAMES = .*?^\)", source, re.M | re.S)
    return tuple(re.findall(r"""\(["']([\w.-]+)["'],""", table[0])) if table else ()


@lru_cache
def moe_types() -> tuple[str, ...]:
    """Model types whose FFNs can become MoE layers: FORMS of dynmoe/backbones/surgery.py."""
    return tuple(str(key.value) for key in _table("FORMS").keys if isinstance(key, ast.Constant))


@lru_cache
def moe_refusals() -> dict[str, str]:
    """Why other model types cannot have MoE layers, where that is known: REFUSED, there too."""
    refused = ast.literal_eval(_table("REFUSED"))
    return {kind: reason for reason, kinds in refused.items() for kind in kinds.split()}


def _table(name: str) -> ast.Dict:
    """A literal of dynmoe/backbones/surgery.py, which imports PyTorch; empty if it is not there."""
    try:
        node = locate(f"dynmoe.backbones.surgery.{name}").node
    except (TargetError, Unreadable):
        node = None
    return node if isinstance(node, ast.Dict) else ast.Dict([], [])
