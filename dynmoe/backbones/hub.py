"""Models of the transformers library: on the Hugging Face Hub, in a folder, or by type.

Also low-rank adapters for their attention (LoRA, arXiv 2106.09685), by the peft library.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from dynmoe.backbones import weights
from dynmoe.errors import ConfigError
from dynmoe.network import go_offline_if_unreachable

# transformers would announce new heads, and draw a bar for the weights that it reads.
logging.set_verbosity_error()
logging.disable_progress_bar()


def configuration(
    model: str | None,
    path: str | None,
    architecture: str | None,
    options: Mapping[str, Any],
    node: str = "backbone",
) -> Any:
    """Return the transformers configuration of a model, changed by ``options``.

    ``model``: on the Hugging Face Hub; ``path``: a folder with config.json; ``architecture``: a
    ``model_type`` of transformers. Exactly one is given, except that ``path`` overrides ``model``.
    ``node`` is the place of these keys in our configuration, for messages.

    Raises:
        ConfigError: no such model or folder, or options it does not have.
    """
    source = path or model
    if (source is None) == (architecture is None):
        raise ConfigError(
            f"{node}: expected a model of the hub ({node}.model), a folder ({node}.path) or an "
            f"architecture, found model={model}, path={path}, architecture={architecture}"
        )
    if path is not None and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"{node}.path={path}: expected a folder with config.json, weights and tokenizer"
        )
    if path is not None and (Path(path).expanduser() / "adapter_config.json").is_file():
        raise ConfigError(
            f"{node}.path={path}: holds adapters of peft. Merge them into the model first "
            "(merge_and_unload), and save that"
        )
    try:
        if architecture is not None:
            _check_options(AutoConfig.for_model(architecture), options, node)
            return AutoConfig.for_model(architecture, **options)
        _check_options(AutoConfig.from_pretrained(**where(model, path)), options, node)
        return AutoConfig.from_pretrained(**where(model, path), **options)
    except StrictDataclassError as error:
        raise ConfigError(f"{node}.options: {error}") from error
    except (OSError, ValueError) as error:
        raise not_found(model, path, architecture, error, node) from error


# Embeddings of positions by their names in the families of dynmoe/backbones/surgery.py.
POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model; None: relative and rotary ones have no end."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITIONS and isinstance(module, nn.Embedding):
            # The first ones are for padding where it has a position, as in RoBERTa, or are skipped.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            places = module.num_embeddings - int(getattr(module, "offset", first))
            numbered = getattr(model.get_submodule(name.rpartition(".")[0]), "position_ids", None)
            return places if numbered is None else min(places, numbered.shape[-1])
    config: Any = getattr(model, "config", None)
    # Some keep a table of rotations, of CTRL's sinusoids or of MPT's biases, which has an end.
    ends = (getattr(config, key, None) for key in ("n_positions", "max_seq_len"))
    return next((int(end) for end in ends if end is not None), None)


def check_vocabulary(found: Any, tokens: int | None, model: str | None, path: str | None) -> None:
    """Compare the embeddings of a model with the tokens of the data.

    Raises:
        ConfigError: there are fewer embeddings.
    """
    embeddings = found.get_input_embeddings().num_embeddings
    if tokens is not None and tokens > embeddings:
        raise ConfigError(
            f"backbone.{'path' if path else 'model'}={path or model}: its tokenizer has {tokens} "
            f"tokens, its language model embeddings of {embeddings}. Take the tokenizer it was "
            "trained with, or give it more embeddings (transformers' resize_token_embeddings) and "
            "save it: backbone.path=FOLDER"
        )


def check_has_weights(model: str | None, path: str | None) -> None:
    """Raises ConfigError if weights are asked of an architecture."""
    if model is None and path is None:
        raise ConfigError(
            "backbone.pretrained=true: an architecture has no weights. Give backbone.model or "
            "backbone.path, or train from scratch with backbone.pretrained=false."
        )


def where(model: str | None, path: str | None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say where the model is."""
    if path is None:
        go_offline_if_unreachable()
    source = model if path is None else str(Path(path).expanduser())
    return {"pretrained_model_name_or_path": source, "local_files_only": path is not None}


def changed(config: Any, options: Mapping[str, Any], node: str) -> Any:
    """Return a configuration that is a part of another one, changed by ``options``.

    Raises:
        ConfigError: options it does not have.
    """
    _check_options(config, options, node)
    try:
        return type(config).from_dict({**config.to_dict(), **options})
    except StrictDataclassError as error:
        raise ConfigError(f"{node}.options: {error}") from error


def with_weights(
    kind: Any, model: str | None, path: str | None, config: Any, node: str = "backbone"
) -> Any:
    """Load a model of the class ``kind`` in fp32, all of it pretrained.

    Raises:
        ConfigError: no weights, or weights of another model.
    """
    try:
        found, loaded = kind.from_pretrained(
            **where(model, path),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise not_found(model, path, None, error, node) from error
    check_loaded(found, loaded, model, path, node)
    return found


def check_loaded(
    found: Any,
    loaded: Mapping[str, Any],
    model: str | None,
    path: str | None,
    node: str = "backbone",
    may_be_new: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compare a model with its file by the report of ``from_pretrained``, and keep the result.

    ``may_be_new`` names the tensors of its head.

    Raises:
        ConfigError: tensors of the model, or of the file, that are left over.
    """
    buffers = {name for name, _ in found.named_buffers()}
    new = absent_keys(loaded)
    weights.refuse(
        f"{node}.{'path' if path else 'model'}={path or model}",
        missing=[name for name in new if not may_be_new(name)],
        unused=[
            name
            for name in sorted(loaded["unexpected_keys"])
            if not (
                name in buffers
                or may_be_new(name)
                or weights.is_computed(name)
                or weights.is_other_part(name)
            )
        ],
    )
    tensors = len(found.state_dict().keys() - set(new))
    weights.remember(found, weights.Loaded(tensors=tensors, fresh=tuple(new)))


def absent_keys(loaded: Mapping[str, Any]) -> list[str]:
    """Return the parameters that stay randomly drawn, by the report of ``from_pretrained``."""
    return sorted([*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])])


def not_found(
    model: str | None,
    path: str | None,
    architecture: str | None,
    error: Exception,
    node: str = "backbone",
) -> ConfigError:
    """Explain that transformers does not find or cannot read a model."""
    reason = str(error).splitlines()[0]
    if architecture is not None:
        return ConfigError(
            f"{node}.architecture={architecture}: transformers knows no such model type"
        )
    if path is not None:
        return ConfigError(f"{node}.path={path}: transformers cannot load it: {reason}")
    return ConfigError(
        f"{node}.model={model}: could not be downloaded from the Hugging Face Hub ({reason}). "
        f"Without network give its folder: {node}.path=FOLDER with config.json, weights and "
        "tokenizer."
    )


def _check_options(config: PreTrainedConfig, options: Mapping[str, Any], node: str) -> None:
    """transformers would take any key."""
    # Not hasattr: it raises for attributes that differ between layers, as Gemma 4's head_dim.
    known = [name for name in (*dir(config), *config.attribute_map) if not name.startswith("_")]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{node}.options: {type(config).__name__} has no '{key}'.{hint}")


# Queries and values by their names in the families of dynmoe/backbones/surgery.py; where one matrix
# makes all three, that one.
TARGETS = (
    r".*\.(query|value|query_proj|value_proj|in_proj|q_lin|v_lin|q_proj|v_proj|attn\.[qv]"
    r"|W[qv]|Wqkv|c_attn|qkv_proj|query_key_value|q_b_proj|kv_b_proj)"
)


def adapt(model: Any, fresh: Collection[str], lora: Mapping[str, Any] | None) -> None:
    """``add_adapters`` by the node ``backbone.lora``; None: none.

    Raises:
        ConfigError: unknown keys or values, a model they do not fit, or no peft.
    """
    if lora is None:
        return
    try:
        add_adapters(model, fresh, **lora)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"backbone.lora: expected keys among r, alpha, dropout and a model whose attention "
            f"they fit, found {dict(lora)} for {model.config.model_type}: {error}"
        ) from error


def add_adapters(
    model: Any, fresh: Collection[str] = (), r: int = 8, alpha: int = 16, dropout: float = 0.1
) -> None:
    """Freeze a transformers classifier but for its head, and add trained adapters, in place.

    ``fresh`` names other parameters to train: those that no pretraining has seen. Defaults are
    EMoE's. MoE layers that come later are trained whole.

    Raises:
        ConfigError: peft is not installed.
        ValueError: a value out of its range, or a model whose attention is not in ``TARGETS``.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "backbone.lora: needs the package peft: pip install -e '.[lora]', or set "
            "backbone.lora=null"
        ) from error
    conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, fan_in_fan_out=conv1d
    )
    inject_adapter_in_model(config, model)
    inside = {id(p) for p in model.base_model.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside or name in fresh:
            parameter.requires_grad = True
