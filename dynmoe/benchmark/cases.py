"""The cases that ``dynmoe-bench`` times, by the names that its options take."""

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
    "d": Shape("d", 4096, 384, 1024, 8),  # gated, as wide as ViT-S
    "e": Shape("e", 2048, 576, 1536, 8),  # SmolLM2-135M, gated
    "short": Shape("short", 128, 576, 1536, 8),  # a decoding step of 128 answers
}

LAYER_CASES = {
    "limit": "one dense FFN on as many rows as there are (token, expert) pairs",
    "layer": "the whole MoE layer: top-any router, auxiliary loss, experts",
    "experts": "its experts alone, on the given routing",
    "recompute": "the same, hidden activations computed again in the backward pass",
    "top_k": "the whole layer with a top-k router (where k is an integer)",
    "top_k experts": "its experts alone, on its routing",
    "naive loop": "a loop over the experts, which index stacked weights",
    "padded": "GShard's and DeepSpeed's one-hot einsum dispatch",
    "padded_bmm": "the same padding, by index, and batched products",
    "dense then mask": "every expert on every token, then the weights",
    "hf eager": "transformers' Mixtral experts (gated, integer k), on top_k's routing",
    "hf grouped_mm": "the same with experts_implementation=grouped_mm",
    "hf batched_mm": "batched_mm; left out where its copies of weights pass 1 GiB",
}

STEP_CASES = {
    "dense": "the backbone as it is, without backbone.token_sparsify and backbone.adapter",
    "sparse": "with them, where one is given: then it always runs, and MoE layers are in it",
    "top-1": "one expert per token, by a linear softmax router; dropless",
    "top-2": "two experts per token",
    "dynmoe": "top-any, its thresholds fitted to k experts per token: one case for each --k",
    "loop": "the first k, by a plain loop over the experts; with --only",
    "all then mask": "the first k, every expert on every token; with --only",
}
SPARSE_KEYS = ("token_sparsify", "adapter")
"""Of a backbone; the dense case is without."""
GENERATE_CASES = ["dense", "top-2", "dynmoe"]

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""Values of ``trainer.precision`` that are measured."""


def parse_shape(text: str) -> Shape:
    """A name in ``SHAPES`` or four positive integers ``T,D,H,E``.

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


def step_cases(
    names: Sequence[str], ks: Sequence[float], experts: int, is_sparse: bool = False
) -> list[str]:
    """Return the cases of ``step`` and ``generate`` in their order, ``dense`` always first.

    ``is_sparse``: the backbone has fewer tokens or adapters.

    Raises:
        ConfigError: an unknown case, or more experts per token than there are; ``sparse`` of a
            backbone that is not.
    """
    check_names(names, STEP_CASES)
    if "sparse" in names and not is_sparse:
        raise ConfigError(
            "--only sparse: expected 'backbone.token_sparsify={keep: 0.7}' or backbone.adapter={}"
        )
    for k in ks:
        if not 0 < k <= experts:
            raise ConfigError(
                f"--k {k:g}: expected a mean number of experts per token above 0 and up to"
                f" {experts}, which is moe.num_experts"
            )
    if "top-2" in names and experts < 2:
        raise ConfigError("top-2: expected moe.num_experts=2 or more, or --only without top-2")
    cases = []
    always = ["dense", "sparse"] if is_sparse else ["dense"]
    for name in STEP_CASES:
        if name in always or name in names:
            cases += [f"dynmoe {k:g}" for k in ks] if name == "dynmoe" else [name]
    return cases


def check_names(names: Sequence[str], known: Mapping[str, str]) -> None:
    """Raises ConfigError for a name of ``--only`` that is not known."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--only {name}: unknown case, expected some of "
                + ", ".join(repr(case) for case in known)
            )
