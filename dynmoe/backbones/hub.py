"""Models of the transformers library by their three names: on its hub, in a folder, or a type."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from dynmoe.errors import ConfigError

# It announces new heads, and paints a bar over the weights it reads.
logging.set_verbosity_error()
logging.disable_progress_bar()


def configuration(
    model: str | None, path: str | None, architecture: str | None, options: Mapping[str, Any]
) -> Any:
    """What transformers calls the configuration: ``options`` over what the name says.

    ``model``: on Hugging Face's hub; ``path``: a folder with config.json; ``architecture``: a
    ``model_type`` of transformers. Exactly one is given, but that ``path`` goes before ``model``.

    Raises:
        ConfigError: no such model or folder, or options it does not have.
    """
    source = path or model
    if (source is None) == (architecture is None):
        raise ConfigError(
            "backbone: expected a model of the hub (backbone.model), a folder (backbone.path) or "
            f"an architecture, found model={model}, path={path}, architecture={architecture}"
        )
    if path is not None and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"backbone.path={path}: expected a folder with config.json, weights and tokenizer"
        )
    try:
        if architecture is not None:
            _check_options(AutoConfig.for_model(architecture), options)
            return AutoConfig.for_model(architecture, **options)
        _check_options(AutoConfig.from_pretrained(**where(model, path)), options)
        return AutoConfig.from_pretrained(**where(model, path), **options)
    except StrictDataclassError as error:
        raise ConfigError(f"backbone.options: {error}") from error
    except (OSError, ValueError) as error:
        raise not_found(model, path, architecture, error) from error


def where(model: str | None, path: str | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that say where the model is."""
    source = model if path is None else str(Path(path).expanduser())
    return {"pretrained_model_name_or_path": source, "local_files_only": path is not None}


def not_found(
    model: str | None, path: str | None, architecture: str | None, error: Exception
) -> ConfigError:
    """What to say when transformers does not find or cannot read a model."""
    reason = str(error).splitlines()[0]
    if architecture is not None:
        return ConfigError(
            f"backbone.architecture={architecture}: transformers knows no such model type"
        )
    if path is not None:
        return ConfigError(f"backbone.path={path}: transformers cannot load it: {reason}")
    return ConfigError(
        f"backbone.model={model}: could not be had from Hugging Face's hub ({reason}). Without "
        "network give its folder: backbone.path=FOLDER with config.json, weights and tokenizer."
    )


def _check_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """transformers would take any key."""
    for key in options:
        if not hasattr(config, key):
            known = [name for name in dir(config) if not name.startswith("_")]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"backbone.options: {type(config).__name__} has no '{key}'.{hint}")
