"""One answered question, token by token, with the experts that each token used: for pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dynmoe.layers.moe import Routed

Decode = Callable[[Sequence[int]], str]


def example_record(
    tokens: Mapping[str, Tensor],
    ids_BN: Tensor,
    tape: Mapping[str, Sequence[Routed]],
    row: int,
    decode: Decode,
) -> dict[str, Any]:
    """What is recorded of the question in row ``row`` of a batch and of its answer ``ids_BN``.

    ``tokens``: what every token that was read says, None for a patch of an image; ``answer_from``:
    where the answer begins in them; ``experts``: by layer and token a string of 0 and 1, the
    living experts that served it. The answer's last token is said but never read.
    """
    real_N = tokens["attention_mask"][row].bool()
    ids = tokens["input_ids"][row][real_N].tolist()
    is_image = tokens["image_mask"][row][real_N].tolist()
    words = [None if image else decode([i]) for i, image in zip(ids, is_image, strict=True)]
    experts = {}
    read = 0
    for name, calls in tape.items():
        prompt, *steps = calls
        served = [prompt.mask[row][real_N]]
        served += [step.mask[row] for step in steps if _is_real(step, row)]
        bits = ["".join(str(int(bit)) for bit in token) for part in served for token in part]
        experts[name] = bits
        read = len(bits) - len(words)
    return {
        "tokens": words + [decode([i]) for i in ids_BN[row, :read].tolist()],
        "answer_from": len(words),
        "experts": experts,
    }


def _is_real(call: Routed, row: int) -> bool:
    return call.token_mask is None or bool(call.token_mask[row].all())
