"""What training a vision-language model takes, from sizes alone: memory of a device, FLOPs, time.

The arithmetic is explained in docs/VISION_LANGUAGE.md. It errs on the side of too much; what it
says of a block is compared with what PyTorch keeps in tests/metrics/test_estimate.py.

Letters: D width, H hidden width of an FFN, k FFNs that a token is computed by.
"""

from __future__ import annotations

from typing import NamedTuple

# Of a scored token and word of the vocabulary: logits as computed, their softmax, its gradient.
LOGIT_BYTES = 12
FP32 = 4


class Blocks(NamedTuple):
    """Transformer blocks, all of one size."""

    depth: int
    width: int
    hidden: int
    """Of one FFN, or one expert."""


class Model(NamedTuple):
    parameters: int
    """Empty slots of experts included, as their places are reserved."""
    trained: int
    outside: int
    """Parameters that are in no block: embeddings, projector, output layer."""
    largest_block: int
    """Parameters of the block that has most."""
    decoder: Blocks
    moe_blocks: int
    mean_k: float
    """Experts of a token in MoE layers."""
    kv_width: int
    """Of a token's keys, as of its values, in a decoder block."""
    vision: Blocks
    vision_trained: bool
    vocabulary: int


class Batch(NamedTuple):
    """What a device computes at once."""

    conversations: int
    tokens: int
    """Of a conversation, its patches included."""
    patches: int
    """Tokens of a conversation in the vision tower."""
    scored: int
    """Tokens of a conversation that have a loss."""


class Precision(NamedTuple):
    """Bytes of a number, as kept in weights and as computed with."""

    stored: int
    computed: int


class Memory(NamedTuple):
    """Bytes of a device at the peak of a training step, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments. The weights themselves are its fp32 master copy in mixed precision."""
    casts: float
    """Copies of weights in the precision that is computed in."""
    activations: float
    logits: float
    communication: float
    """DDP's buckets of gradients; the blocks that FSDP has gathered, with their gradients."""

    @property
    def peak(self) -> float:
        return sum(self)


def precision(name: str) -> Precision:
    """Of Lightning's ``precision``: 32-true, bf16-mixed, bf16-true, 16-mixed, ..."""
    half = "16" in name
    return Precision(2 if half and "true" in name else FP32, 2 if half else FP32)


def memory(
    model: Model, batch: Batch, precision: Precision, checkpointing: bool, devices: int, fsdp: bool
) -> Memory:
    """Of one of ``devices``: all of them hold the whole state (DDP), or each a share (``fsdp``)."""
    stored, fsdp = precision.stored, fsdp and devices > 1
    share = devices if fsdp else 1
    communication = 0
    if fsdp:  # two blocks, one of them in advance, and one's gradients
        communication = stored * (2 * model.outside + 3 * model.largest_block)
    elif devices > 1:
        communication = stored * model.trained
    casts = 0
    if precision.computed < stored:
        trained = model.largest_block if fsdp else model.trained
        casts = precision.computed * (trained if checkpointing else model.parameters)
    return Memory(
        weights=stored * model.parameters / share,
        gradients=stored * model.trained / share,
        optimizer=2 * stored * model.trained / share,
        casts=casts,
        activations=batch.conversations * _activations(model, batch, precision, checkpointing),
        logits=batch.conversations * batch.scored * model.vocabulary * LOGIT_BYTES,
        communication=communication,
    )


def _activations(model: Model, batch: Batch, precision: Precision, checkpointing: bool) -> float:
    """Bytes of a conversation."""
    dense, moe = kept(model.decoder, 1, precision), kept(model.decoder, model.mean_k, precision)
    if checkpointing:  # each block's input, and all of the block that is computed again
        entries = model.decoder.depth * model.decoder.width * precision.stored
        decoder = entries + (max(dense, moe) if model.moe_blocks else dense)
    else:
        decoder = (model.decoder.depth - model.moe_blocks) * dense + model.moe_blocks * moe
    blocks = model.vision.depth if model.vision_trained else 1  # frozen: one after the other
    vision = blocks * kept(model.vision, 1, precision)
    return batch.tokens * decoder + batch.patches * vision


def kept(blocks: Blocks, k: float, precision: Precision) -> float:
    """Bytes that a block keeps of a token for its backward pass, with fused attention.

    In the precision of the residual stream 4 D: what enters and what leaves the two norms. In that
    of the products 7 D: what enters three of attention's layers, queries, keys, values and output;
    for each FFN 3 D + 4 H: what enters its layers and leaves it, and gate, its activation, up, and
    their product, which FFNs that are not gated have not.
    """
    width, hidden = blocks.width, blocks.hidden
    attention = width * (4 * precision.stored + 7 * precision.computed)
    return attention + k * (3 * width + 4 * hidden) * precision.computed


def kv_cache(model: Model, conversations: int, tokens: int, precision: Precision) -> int:
    """Bytes in generation. Rotation leaves keys in the precision of the residual stream."""
    bytes_of_both = precision.stored + precision.computed
    return conversations * tokens * model.decoder.depth * model.kv_width * bytes_of_both


def training_flops(
    vision: float, rest: float, vision_trained: bool, trained_share: float, checkpointing: bool
) -> float:
    """Of a conversation, from the forward pass's FLOPs in the vision tower and in the rest.

    Where anything is trained the backward pass has a product for the gradient of each product's
    input, and one for that of its weights, if they are trained: ``trained_share`` of the rest's.
    The projector is trained in all stages, so that gradients pass through all of the decoder.
    Checkpointing computes the decoder a second time.
    """
    passes = 2 + trained_share + checkpointing
    return vision * (3 if vision_trained else 1) + rest * passes


def seconds(flops: float, devices: int, tflops: float, utilisation: float) -> float:
    """``tflops``: what a device can do at most, in 10^12 a second; ``utilisation``: share of it."""
    return flops / (devices * tflops * 1e12 * utilisation)
