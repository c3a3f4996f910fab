"""A trained model as a folder that transformers loads.

Where a class of transformers computes the same, the folder has its configuration; else it has the
code of ``modeling_mixture``.

Shape suffixes: B texts, N tokens.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from dynmoe.backbones.hub import positions
from dynmoe.convert import modeling_mixture
from dynmoe.convert.card import card
from dynmoe.convert.natives import native_config, native_names
from dynmoe.convert.runs import TrainedModel
from dynmoe.convert.stacked import Mixtures, mixtures_of
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import mask_padding, moe_layers
from dynmoe.layers.soft import SoftMoELayer

CODE = "modeling_mixture"
AUTO_CLASSES = {
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
OWN_KEYS = ("model_type", "architectures", "auto_map", "transformers_version")
"""Keys of a configuration that the model without experts and the written one do not share."""


def write(trained: TrainedModel, folder: Path) -> float:
    """Write model, tokenizer and card of a run; return the largest relative difference of logits
    between the written model, as transformers loads it, and the run's.

    Raises:
        ConfigError: a model that transformers cannot have (see ``mixtures_of``).
    """
    model = trained.model.model
    if trained.class_names:
        model.config.id2label = dict(enumerate(trained.class_names))
        model.config.label2id = {name: label for label, name in enumerate(trained.class_names)}
    elif not model.can_generate():
        model.config.problem_type = "regression"
    saved = save_transformers(model, folder)
    trained.tokenizer.save_pretrained(folder)
    own_code = (folder / f"{CODE}.py").is_file()
    (folder / "README.md").write_text(card(trained, own_code), encoding="utf-8")
    places = positions(model)
    texts = random_texts(model, TOKENS if places is None else min(TOKENS, places))
    loaded = saved.from_pretrained(folder, local_files_only=True).eval()
    ours, theirs = logits_of(model, texts), logits_of(loaded, texts)
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def save_transformers(model: Any, folder: Path) -> type[Any]:
    """Write a model of transformers whose MoE layers took the place of FFNs.

    Returns:
        The class of the written model, whose ``from_pretrained`` loads it.

    Raises:
        ConfigError: a model that transformers cannot have (see ``mixtures_of``).
    """
    auto = _auto_class(model)
    if any(isinstance(module, SoftMoELayer) for module in model.modules()):
        raise ConfigError(
            "format=transformers: expected MoE layers that route tokens, found Soft MoE's. Choose "
            "format=onnx"
        )
    if not moe_layers(model):
        model.save_pretrained(folder)
        return type(model)
    with torch.device("meta"):
        dense = type(model)(copy.deepcopy(model.config))
    mixtures = mixtures_of(model, dense)
    native = native_config(dense, mixtures)
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(model, mixtures)
    made: Any
    if native is not None:
        names = native_names(mixtures)
        state = {names.get(name, name): tensor for name, tensor in state.items()}
        made = getattr(transformers, AUTO_CLASSES[auto][native.model_type])
        config = native
    else:
        bases = model.config, model, model.base_model
        source = code(mixtures, *(type(each).__name__ for each in bases))
        (folder / f"{CODE}.py").write_text(source, encoding="utf-8")
        module = _imported(folder / f"{CODE}.py")
        made = module.MixtureModel
        values = {k: v for k, v in model.config.to_dict().items() if k not in OWN_KEYS}
        config = module.MixtureConfig(
            **values, mixture=_settings(mixtures, f"{model.base_model_prefix}.")
        )
        config.auto_map = {
            "AutoConfig": f"{CODE}.MixtureConfig",
            "AutoModel": f"{CODE}.MixtureBody",
            auto: f"{CODE}.MixtureModel",
        }
    with torch.device("meta"):
        written = made(config)
    absent, unknown = written.load_state_dict(state, strict=False, assign=True)
    tied = set(getattr(written, "all_tied_weights_keys", ()))
    if unknown or set(absent) - tied:
        raise ConfigError(
            f"format=transformers: {type(model).__name__} has other parts than its MoE layers "
            f"that are not transformers' own: {', '.join([*unknown, *absent][:3])}"
        )
    written.tie_weights()
    if written.can_generate():
        written.generation_config = model.generation_config
    written.save_pretrained(folder)
    return type(written)


def _auto_class(model: Any) -> str:
    for auto, names in AUTO_CLASSES.items():
        if names.get(model.config.model_type) == type(model).__name__:
            return auto
    raise ConfigError(
        f"format=transformers: expected a text classifier or a causal language model of "
        f"transformers, found {type(model).__name__}"
    )


def _state(model: nn.Module, mixtures: Mixtures) -> dict[str, Tensor]:
    """Return all tensors by the names that they have in ``MixtureModel``."""
    places = mixtures.places
    gone = tuple(
        f"{path}." for place in places for path in (place, places[place].bias_path) if path
    )
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}
    for name, place in places.items():
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in place.tensors.items()}
        if place.output_bias is not None:
            state[f"{name}.output_bias"] = place.output_bias
    return state


def _settings(mixtures: Mixtures, body: str) -> dict[str, Any]:
    """Return ``mixture`` of config.json; places are those within the ``body``."""
    layers = {
        name.removeprefix(body): {
            "num_experts": place.num_experts,
            "output_bias": place.output_bias is not None,
            "left_out": [path.removeprefix(body) for path in place.left_out],
        }
        for name, place in mixtures.places.items()
    }
    return {
        "width": mixtures.width,
        "hidden": mixtures.hidden,
        "activation": mixtures.activation,
        **mixtures.options,
        "layers": layers,
    }


NEEDS = {
    "TopAny": {"TopAny", "cosine"},
    "TopK": {"TopK"},
    "CosineTopK": {"TopK", "CosineTopK", "cosine", "math"},
    "TopKeys": {"TopKeys"},
}
"""Parts of ``modeling_mixture`` by router; the others are left out of the folder."""


def code(mixtures: Mixtures, config: str, model: str, body: str) -> str:
    """Return ``modeling_mixture`` for one model: its base classes, its router, its experts."""
    source = inspect.getsource(modeling_mixture)
    for name in (config, model, body):
        if not hasattr(transformers, name):
            raise ConfigError(f"format=transformers: {name} is no class of transformers itself")
    for before, after in (
        ("import BertConfig as", f"import {config} as"),
        ("import BertForSequenceClassification as", f"import {model} as"),
        ("import BertModel as", f"import {body} as"),
        (
            "HAS_GATE, HAS_BIAS = False, True",
            f"HAS_GATE, HAS_BIAS = {mixtures.gated}, {mixtures.biased}",
        ),
        ("self.router = TopAny(", f"self.router = {mixtures.router}("),
    ):
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    unused = set.union(*NEEDS.values()) - NEEDS[mixtures.router]
    lines = source.splitlines(keepends=True)
    nodes = ast.parse(source).body
    starts = [
        min(n.lineno, *(d.lineno for d in getattr(n, "decorator_list", [])), n.lineno) - 1
        for n in nodes
    ]
    ends = [*starts[1:], len(lines)]
    return "".join(
        "".join(lines[start:end])
        for node, start, end in zip(nodes, starts, ends, strict=True)
        if _name(node) not in unused
    )


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.Import):
        return node.names[0].name
    return getattr(node, "name", "")


def _imported(file: Path) -> Any:
    """Import the written code. transformers reads the source of a class's module, so it is listed
    among the modules."""
    name = f"{CODE}_{abs(hash(file.read_text(encoding='utf-8'))):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
    return module


# Comparison of the written model with ours.

TEXTS, TOKENS = 4, 16


def random_texts(model: Any, tokens: int) -> dict[str, Tensor]:
    """Draw texts of several lengths: token ids and mask, [B, N], the same for every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id
    ids_BN = torch.randint(vocabulary, (TEXTS, tokens), generator=generator)
    lengths_B1 = torch.linspace(1, tokens, TEXTS).round().long()[:, None]
    mask_BN = torch.arange(tokens) < lengths_B1
    if pad is not None:  # decoders look for it to find the end of a text
        ids_BN[ids_BN == pad] = (pad + 1) % vocabulary
        ids_BN[~mask_BN] = pad
    return {"input_ids": ids_BN, "attention_mask": mask_BN.long()}


@torch.no_grad()
def logits_of(model: Any, texts: dict[str, Tensor]) -> Tensor:
    """Return a model's logits, in fp32; those of padding are 0."""
    mask_BN = texts["attention_mask"].bool()
    with mask_padding(model, mask_BN):
        logits: Tensor = model(**texts).logits.float()
    return logits * mask_BN[..., None] if logits.ndim == 3 else logits
