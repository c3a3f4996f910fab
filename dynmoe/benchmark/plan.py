"""What can be measured: shapes and cases. Without PyTorch: a wrong command is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dynmoe.errors import ConfigError


class Shape(NamedTuple):
    """The size of one MoE layer: tokens of a batch, model width, hidden width, experts."""

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int


SHAPES = {
    "a": Shape("a", 6304, 384, 1536, 8),  # ViT-S at 224 px, batch 32
    "b": Shape("b", 4160, 192, 768, 8),  # ViT-Ti
    "c": Shape("c", 4096, 768, 3072, 16),  # BERT-base
}

CASES = {
    "limit": "one dense FFN on as many rows as there are (token, expert) pairs",
    "layer": "the whole MoE layer: top-any router, auxiliary loss, experts",
    "experts": "its experts alone, on the given routing",
    "recompute": "the same, hidden activations computed again in the backward pass",
    "top_k": "the whole layer with a top-k router (where k is an integer)",
    "naive loop": "a loop over the experts, which index stacked weights",
    "hf loop": "the eager loop of transformers' Mixtral experts, on plain FFNs",
    "padded": "GShard's and DeepSpeed's one-hot einsum dispatch",
    "padded_bmm": "the same padding, by index, and batched products",
    "dense then mask": "every expert on every token, then the weights",
}

STEP_CASES = {
    "dense": "the backbone as it is",
    "top-1": "one expert per token, by a linear softmax router; dropless",
    "top-2": "two experts per token",
    "dynmoe": "top-any, its thresholds fitted to k experts per token: one case for each --k",
    "loop": "the first k, by a plain loop over the experts; with --only",
    "all then mask": "the first k, every expert on every token; with --only",
}
STEP_DEFAULT = ["dense", "top-1", "top-2", "dynmoe"]


def parse_shape(text: str) -> Shape:
    """``a``, ``b``, ``c`` or four positive integers ``T,D,H,E``.

    Raises:
        ConfigError: anything else.
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) != 4 or min(sizes) < 1:
        raise ConfigError(
            f"--shape {text}: expected {', '.join(SHAPES)} or tokens,dim,hidden,experts"
            " in positive integers, such as 512,64,256,8"
        )
    return Shape(text, *sizes)


def check(shapes: Sequence[Shape], ks: Sequence[float], names: Sequence[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: an unknown case, or a k that is no mean number of experts per token.
    """
    _check_names(names, CASES)
    for shape in shapes:
        for k in ks:
            if not (0 < k <= shape.experts and round(k * shape.tokens) > 0):
                raise ConfigError(
                    f"--k {k:g}: expected a mean number of experts per token above 0 (one pair at"
                    f" least) and up to {shape.experts}, the experts of shape {shape.name}"
                )


def step_cases(names: Sequence[str], ks: Sequence[float], experts: int) -> list[str]:
    """The cases of ``dynmoe-bench step`` in their order; ``dense`` always.

    Raises:
        ConfigError: an unknown case, or more experts per token than there are.
    """
    _check_names(names, STEP_CASES)
    for k in ks:
        if not 0 < k <= experts:
            raise ConfigError(
                f"--k {k:g}: expected a mean number of experts per token above 0 and up to"
                f" {experts}, which is moe.num_experts"
            )
    if "top-2" in names and experts < 2:
        raise ConfigError("top-2: expected moe.num_experts=2 or more, or --only without top-2")
    cases = []
    for name in STEP_CASES:
        if name == "dense" or name in names:
            cases += [f"dynmoe {k:g}" for k in ks] if name == "dynmoe" else [name]
    return cases


def _check_names(names: Sequence[str], known: Mapping[str, str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--only {name}: unknown case, expected some of "
                + ", ".join(repr(case) for case in known)
            )
