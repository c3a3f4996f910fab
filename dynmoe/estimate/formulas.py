"""Memory of a device, FLOPs and time of training a vision-language model, from sizes alone.

docs/estimate.md explains the arithmetic. It errs on the side of too much;
tests/estimate/test_estimate.py compares the bytes of a block with those that PyTorch keeps.

Letters: D width, H hidden width of an FFN, k FFNs that a token is computed by.
"""

from __future__ import annotations

from typing import NamedTuple

# Per scored token and word of the vocabulary: logits as computed, their softmax, its gradient.
LOGIT_BYTES = 12
FP32 = 4


class Blocks(NamedTuple):
    """Transformer blocks, all of one size."""

    depth: int
    width: int
    hidden: int
    """Hidden width of one FFN, or one expert."""


class ModelSizes(NamedTuple):
    """Sizes of a model that memory depends on."""

    parameters: int
    """Empty slots of experts included, as their places are reserved."""
    trained: int
    outside: int
    """Parameters outside the blocks: embeddings, projector, output layer."""
    largest_block: int
    """Parameters of the block with the most."""
    decoder: Blocks
    moe_blocks: int
    mean_k: float
    """FFNs that compute a token in an MoE layer, in full-size FFNs."""
    kv_width: int
    """Width of a token's keys, and of its values, in a decoder block."""
    vision: Blocks
    vision_trained: bool
    vocabulary: int


class Held(NamedTuple):
    """Parameters that a device holds."""

    parameters: float
    trained: float
    gathers: bool = False
    """Whether they are shares, and whole blocks are gathered from all devices."""
    averaged: float = 0
    """Parameters whose gradients devices send each other in buckets."""


class DeviceBatch(NamedTuple):
    """The conversations that a device computes at once."""

    conversations: int
    tokens: int
    """Tokens of a conversation, its patches included."""
    patches: int
    """Tokens of a conversation in the vision tower."""
    scored: int
    """Tokens of a conversation that have a loss."""


class NumberBytes(NamedTuple):
    """Bytes of a number, in stored weights and in computation."""

    stored: int
    computed: int


class DeviceMemory(NamedTuple):
    """Bytes of a device at the peak of a training step, by their content."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments. In mixed precision the weights themselves are its fp32 master copy."""
    casts: float
    """Copies of weights in the precision of the computation."""
    activations: float
    logits: float
    communication: float
    """Buckets of gradients; the blocks that FSDP has gathered, with their gradients."""

    @property
    def peak(self) -> float:
        return sum(self)


def number_bytes(precision: str) -> NumberBytes:
    """Return the bytes under Lightning's ``precision``: 32-true, bf16-mixed, bf16-true, ..."""
    half = "16" in precision
    return NumberBytes(2 if half and "true" in precision else FP32, 2 if half else FP32)


def memory(
    model: ModelSizes,
    batch: DeviceBatch,
    number: NumberBytes,
    checkpointing: bool,
    own: Held | None = None,
) -> DeviceMemory:
    """Return the memory of one device, or of one of several, which holds ``own``."""
    stored = number.stored
    own = own or Held(model.parameters, model.trained)
    communication = stored * own.averaged
    if own.gathers:  # two blocks, one of them in advance, and one's gradients
        communication = stored * (2 * model.outside + 3 * model.largest_block)
    casts = 0.0
    if number.computed < stored:
        every = model.parameters if own.gathers else own.parameters
        trained = model.largest_block if own.gathers else own.trained
        casts = number.computed * (trained if checkpointing else every)
    return DeviceMemory(
        weights=stored * own.parameters,
        gradients=stored * own.trained,
        optimizer=2 * stored * own.trained,
        casts=casts,
        activations=batch.conversations * _activations(model, batch, number, checkpointing),
        logits=batch.conversations * batch.scored * model.vocabulary * LOGIT_BYTES,
        communication=communication,
    )


def _activations(
    model: ModelSizes, batch: DeviceBatch, number: NumberBytes, checkpointing: bool
) -> float:
    """Return the bytes of a conversation."""
    dense, moe = kept(model.decoder, 1, number), kept(model.decoder, model.mean_k, number)
    if checkpointing:  # each block's input, and all of the block that is computed again
        entries = model.decoder.depth * model.decoder.width * number.stored
        decoder = entries + (max(dense, moe) if model.moe_blocks else dense)
    else:
        decoder = (model.decoder.depth - model.moe_blocks) * dense + model.moe_blocks * moe
    blocks = model.vision.depth if model.vision_trained else 1  # frozen: one after the other
    vision = blocks * kept(model.vision, 1, number)
    return batch.tokens * decoder + batch.patches * vision


def kept(blocks: Blocks, k: float, number: NumberBytes) -> float:
    """Return the bytes that a block keeps of a token for its backward pass, with fused attention.

    In the precision of the residual stream 4 D: inputs and outputs of the two norms. In that of
    the products 7 D: the inputs of three of attention's layers, queries, keys, values and output;
    for each FFN 3 D + 4 H: inputs of its layers and its output, and gate, its activation, up, and
    their product, which FFNs without a gate lack.
    """
    width, hidden = blocks.width, blocks.hidden
    attention = width * (4 * number.stored + 7 * number.computed)
    return attention + k * (3 * width + 4 * hidden) * number.computed


def kv_cache(model: ModelSizes, conversations: int, tokens: int, number: NumberBytes) -> int:
    """Return the bytes in generation. Rotation leaves keys in the residual stream's precision."""
    bytes_of_both = number.stored + number.computed
    return conversations * tokens * model.decoder.depth * model.kv_width * bytes_of_both


def training_flops(
    vision: float, rest: float, vision_trained: bool, trained_share: float, checkpointing: bool
) -> float:
    """Return those of a conversation, from the forward FLOPs of the vision tower and of the rest.

    Where anything is trained the backward pass has a product for the gradient of each product's
    input, and one for that of its weights, if they are trained: ``trained_share`` of the rest's.
    The projector is trained in all stages, so that gradients pass through all of the decoder.
    Checkpointing computes the decoder a second time.
    """
    passes = 2 + trained_share + checkpointing
    return vision * (3 if vision_trained else 1) + rest * passes


def seconds(flops: float, devices: int, tflops: float, utilisation: float) -> float:
    """Return the time at a share, ``utilisation``, of a device's peak, ``tflops`` 10^12 per s."""
    return flops / (devices * tflops * 1e12 * utilisation)
