"""Files of weights: reading the forms that people save, and comparing them with a model.

Loaders of other libraries log the names that do not fit, or drop them. Here a file has to fill
every tensor of a model but its head, and every tensor of the file but its head has to be used.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dynmoe.errors import ConfigError, reason_of

SHOWN = 3  # names in a message

Head = Literal["new", "keep"]

# Where training scripts keep the weights, in the order of preference: averages over the training
# (EMA; the teacher of DINO and iBOT) before the weights that were trained.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "student", "module", "network", "net"),
    *("backbone", "encoder", "weights", "params"),
)
AVERAGED = re.compile(r"(.*[._])?(ema|teacher)([._].*)?")

# Parts that a file may have beside the model: heads, the other halves of what it was trained in.
OTHER_PARTS = re.compile(
    r"(\w+_)?heads?|head_dist|classifier|fc|score|cls|pre_logits|mask_token|decoder\w*|predictor\w*"
    r"|projector|projection|(text|visual|image)_projection|text|text_\w+|logit_(scale|bias)"
    r"|criterion|loss\w*|\w*center|queue\w*|student|teacher|ema\w*|\w*_ema|n_averaged"
)

# Position indexes, frequencies of rotary embeddings, causal masks.
TABLES = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|inv_freq|relative_position_index|(attn|attention)\.bias"
    r"|masked_bias)"
)


@dataclass(frozen=True)
class Loaded:
    """The result of loading weights; ``run.json`` records it."""

    tensors: int
    """Tensors of the model that came from the file."""
    part: str = ""
    """The prefix that their names have in the file."""
    resized: tuple[str, ...] = ()
    """Tensors that were resampled or converted to another shape."""
    fresh: tuple[str, ...] = ()
    """Tensors of the model that are new: those of its head."""


def remember(model: nn.Module, loaded: Loaded) -> None:
    """Keep the result with the model, for ``loaded_parts``."""
    model._loaded = loaded  # type: ignore[assignment]


def loaded_parts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the results of all loading into a model and its parts, by the name of the part."""
    found = {name: getattr(part, "_loaded", None) for name, part in model.named_modules()}
    return {name: asdict(loaded) for name, loaded in found.items() if loaded is not None}


def read(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of PyTorch or safetensors, without its wrappers.

    Of several models in a file the average over the training is taken (EMA, a teacher).

    Raises:
        ConfigError: a file that cannot be read, or that holds no weights.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # NOTE: many training scripts save their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a pickle that is none may raise anything
        raise ConfigError(f"{file} cannot be read ({reason_of(error)})") from error
    return _unwrapped(content, file)


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file}: expected tensors by name, found a {type(content).__name__}")
    inner = [name for name, value in content.items() if _holds_tensors(value)]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    chosen = [name for name in WRAPPERS if name in inner][:1]
    if not chosen and not tensors:
        chosen = inner
    if len(chosen) > 1:
        raise ConfigError(
            f"{file}: holds several models ({', '.join(map(str, chosen[:SHOWN]))}). Save the one "
            "that is meant"
        )
    if chosen:
        return _unwrapped(content[chosen[0]], file)
    if not tensors:
        raise ConfigError(f"{file}: holds no tensors")
    return {str(name): tensor for name, tensor in tensors.items()}


def _holds_tensors(value: Any) -> bool:
    """Whether it is a mapping of names with tensors at any depth; an optimizer's has numbers."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(each, Tensor) or _holds_tensors(each) for each in value.values())
    )


class Aligned(NamedTuple):
    """Tensors of a file under the names that a model expects."""

    tensors: dict[str, Tensor]
    prefix: str
    """Their common prefix in the file."""
    unknown: list[str]
    """Names in the file without that prefix that belong to no known other part."""


def align(state: Mapping[str, Tensor], names: Collection[str]) -> Aligned:
    """Take off the prefix that a file puts before the ``names`` of a model, whichever it is.

    Files of another naming keep theirs, but for the wrappers of DDP and ``torch.compile``.

    Raises:
        ConfigError: several models fit, and none or several of them are averages.
    """
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    most = max(counts.values(), default=0)
    if 2 * most < len(names):
        return _of_other_naming(state)
    fitting = [prefix for prefix, count in counts.items() if 2 * count >= most]
    chosen = [prefix for prefix in fitting if AVERAGED.fullmatch(prefix)] or fitting
    if len(chosen) > 1:
        shown = ", ".join(repr(prefix) for prefix in chosen[:SHOWN])
        raise ConfigError(f"holds several models ({shown}). Save the one that is meant")
    prefix = chosen[0]
    others = [name for name in state if not name.startswith(prefix)]
    return Aligned(
        {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)},
        prefix,
        [name for name in others if not is_other_part(_after_common(name, prefix))],
    )


def _of_other_naming(state: Mapping[str, Tensor]) -> Aligned:
    prefix = ""
    for word in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix + word) for name in state):
            prefix += word
    # timm knows OpenAI's CLIP by the name "visual"; the rest of a CLIP reads text.
    for name in state:
        root = name.removesuffix("class_embedding")
        if root != name and f"{root}conv1.weight" in state:
            found = {n: tensor for n, tensor in state.items() if n.startswith(root)}
            return Aligned(
                {f"visual.{n.removeprefix(root)}": t for n, t in found.items()}, root, []
            )
    return Aligned({n.removeprefix(prefix): tensor for n, tensor in state.items()}, prefix, [])


def _after_common(name: str, prefix: str) -> str:
    """The name without the leading parts that it shares with the prefix."""
    own, common = name.split("."), prefix.split(".")
    while own and common and own[0] == common[0]:
        own, common = own[1:], common[1:]
    return ".".join(own)


def is_computed(name: str) -> bool:
    """Whether a tensor is a table that models compute, and that older versions saved."""
    return TABLES.fullmatch(name) is not None


def is_other_part(name: str) -> bool:
    """Whether a tensor belongs to a head, or to something a file may have beside the model."""
    return OTHER_PARTS.fullmatch(name.split(".")[0]) is not None


def check_fit(
    place: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], unused: Iterable[str] = ()
) -> None:
    """Compare the tensors of a model that have to come from a file with those of the file.

    ``place`` is the key that names the file, and the file; ``unused``: further names of the file.

    Raises:
        ConfigError: tensors that are absent, unused or of another shape.
    """
    fits = own.keys() & given.keys()
    refuse(
        place,
        missing=[name for name in own if name not in fits],
        unused=[*(name for name in given if name not in fits), *unused],
        shapes=[
            f"{name} {list(given[name].shape)} for {list(own[name].shape)}"
            for name in own
            if name in fits and given[name].shape != own[name].shape
        ],
    )


def load_whole(module: nn.Module, state: Mapping[str, Tensor], place: str) -> None:
    """Load a state that has to have every tensor of the module, and no other.

    Raises:
        ConfigError: see ``check_fit``.
    """
    check_fit(place, module.state_dict(), state)
    module.load_state_dict(dict(state))


def refuse(
    place: str,
    missing: Collection[str] = (),
    unused: Collection[str] = (),
    shapes: Collection[str] = (),
) -> None:
    """Refuse weights of another model.

    Raises:
        ConfigError: there are any names.
    """
    lists = {"missing in the weights": missing, "not in the model": unused, "another size": shapes}
    if wrong := [f"{word}: {shortened(names)}" for word, names in lists.items() if names]:
        raise ConfigError(f"{place}: the weights do not fit the configuration; {'; '.join(wrong)}")


def check_head(head: Head, pretrained: bool) -> None:
    """Raise ConfigError where a head is to be kept of weights that are not loaded."""
    if head == "keep" and not pretrained:
        raise ConfigError(
            "backbone.head=keep: there is no head to keep without weights; see backbone.pretrained"
        )


def shortened(names: Collection[str]) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return f"{shown}{' ...' if len(names) > SHOWN else ''} ({len(names)} in all)"


@contextmanager
def checked_loading(
    place: str, heads: Sequence[str], file: Aligned | None = None
) -> Iterator[list[Loaded]]:
    """Compare what ``load_state_dict`` is given within with the model, and keep the results.

    timm resamples and renames tensors right before that call, and logs what does not fit.
    ``heads`` are the prefixes of the model's head, which is new unless it fits.
    """
    found: list[Loaded] = []
    load_state_dict = nn.Module.load_state_dict
    source = file.tensors if file is not None else {}

    def checked(module: nn.Module, state: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        own = module.state_dict()
        head = {name for name in own if name.startswith(tuple(heads))}
        buffers = {name for name, _ in module.named_buffers()}.difference(own)
        given = {
            name: tensor
            for name, tensor in state.items()
            if (name in own and not (name in head and own[name].shape != tensor.shape))
            or not (name in own or name in buffers or is_computed(name) or is_other_part(name))
        }
        fresh = head.difference(given)
        needed = {name: tensor for name, tensor in own.items() if name not in fresh}
        check_fit(place, needed, given, file.unknown if file is not None else ())
        resized = [n for n in needed if n in source and source[n].shape != needed[n].shape]
        found.append(
            Loaded(
                tensors=len(needed),
                part=file.prefix if file is not None else "",
                resized=tuple(resized),
                fresh=tuple(sorted(fresh)),
            )
        )
        return load_state_dict(module, given, strict=False)

    nn.Module.load_state_dict = checked  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
