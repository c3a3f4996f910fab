"""Sizes of a vision-language run, and the estimate that ``mode=plan`` prints of them.

The model is built on PyTorch's meta device from its config.json: it needs no weights, and for the
models of ``PUBLISHED`` no network. Data are read only where they are part of the package.
docs/estimate.md explains the arithmetic and its assumptions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from dynmoe.adaptation.expert_parallel import check
from dynmoe.adaptation.fsdp2 import unsharded
from dynmoe.backbones.surgery import blocks_of
from dynmoe.backbones.vlm import VisionLanguageModel, train_only
from dynmoe.config.options import device_count
from dynmoe.data.vl.module import VisionLanguageData, sample_of
from dynmoe.errors import ConfigError
from dynmoe.estimate import formulas
from dynmoe.layers.expert_parallel import dealt
from dynmoe.layers.experts import linears
from dynmoe.layers.moe import moe_layers
from dynmoe.metrics import efficiency
from dynmoe.questions.base import ANSWER_TOKENS
from dynmoe.training.build import add_layers, build_data, shapes_init
from dynmoe.training.instantiation import make

# Conversations of LLaVA-1.5's and MoE-LLaVA's files by stage (arXiv 2401.15947, Table 2).
LLAVA = {"align": 558_128, "instruct": 964_000, "moe": 665_298}

# The hidden width of FFNs in configurations of transformers. Those without have four widths.
FFN_WIDTHS = (
    "moe_intermediate_size",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "hidden_dim",
    "dff",
)

A100 = 312.0  # TFLOP/s in bf16
PRODUCT = 1024  # rows and columns of the product that measures a CPU

# Ways to make experts that are parts of the FFN.
SPLITS = ("cluster", "random")


class RunSizes(NamedTuple):
    """Sizes of a run."""

    model: formulas.ModelSizes
    total: int
    """Parameters, empty slots included."""
    mean_k: float
    """Experts of a token."""
    activated: float
    """Parameters that a token uses."""
    vision: int
    """Parameters of the vision tower, which are in ``total`` and ``activated``."""
    flops: float | None
    """FLOPs of the forward pass of a conversation; None where there is no formula."""
    vision_flops: float
    """The share of the vision tower in ``flops``."""
    trained_share: float
    """Trained share of the parameters that multiply a token after the vision tower."""
    mean_tokens: float
    conversations: int
    held: dict[str, formulas.Held]
    """Parameters of a device by the way in which several share them; of one alone by ""."""


def measure(cfg: DictConfig) -> RunSizes:
    """Build the model and count.

    Raises:
        ConfigError: a model whose sizes are unknown here.
    """
    data, plan = _data_at_hand(cfg), cfg.plan
    model = shell(cfg, {} if data is None else data.backbone_arguments)
    if data is None or plan.mean_tokens is not None:
        tokens = plan.mean_tokens or cfg.data.max_length
        patches = patches_of(cfg)  # all else of the conversation is learnt
        sample = sample_of(tokens, round(tokens) - patches, patches, cfg.backbone.vision.image_size)
    else:
        tokens, sample = data.mean_tokens, data.sample
    costs = efficiency.count(model, *sample)
    experts = mean_k(cfg, model)
    k = dict.fromkeys(costs["slots"], experts)
    activated = efficiency.activated(costs, costs["slots"], k)
    vision = efficiency.count(model.vision, sample[0]["images"])
    return RunSizes(
        model=describe(model, mean_ffns(cfg, model)),
        total=efficiency.total(costs),
        mean_k=experts,
        activated=activated,
        vision=efficiency.total(vision),
        flops=efficiency.flops(costs, costs["slots"], k),
        vision_flops=efficiency.flops(vision, {}, {}) or 0.0,
        trained_share=_trained_share(model, activated - costs["parameters"]["other"], activated),
        mean_tokens=tokens,
        conversations=plan.conversations
        or (LLAVA[cfg.stage.name] if data is None else len(data.lengths)),
        held=held(model, _devices(cfg), cfg.trainer.strategy),
    )


def mean_k(cfg: DictConfig, model: nn.Module | None = None) -> float:
    """Return the planned experts of a token; a ``model`` may have a k of its own."""
    if cfg.plan.mean_k is not None:
        return float(cfg.plan.mean_k)
    layers = [] if model is None else list(moe_layers(model).values())
    own = getattr(layers[0].router, "top_k", None) if layers else None
    return float(cfg.moe.get("top_k") or own or cfg.moe.max_experts / 2)


def mean_ffns(cfg: DictConfig, model: nn.Module | None = None) -> float:
    """Return the compute of a token's experts, in full-size FFNs."""
    parts = (cfg.moe.router or {}).get("num_blocks") or cfg.moe.num_experts
    routed = mean_k(cfg, model) / (parts if cfg.moe.init in SPLITS else 1)
    return routed + float(cfg.moe.get("shared_experts", 0))


def shell(cfg: DictConfig, arguments: dict[str, Any]) -> VisionLanguageModel:
    """Build the model on the meta device (no weights allocated), frozen as the stage freezes it.

    ``arguments``: those of a backbone that the data determine.
    """
    with _sizes_alone(cfg.backbone) as backbone, torch.device("meta"):
        model: VisionLanguageModel = make(backbone, "backbone", **arguments)
        add_layers(cfg.moe, model, init=shapes_init(cfg.moe, model))
    train_only(model, cfg.task.module.trains)
    return model


@contextmanager
def _sizes_alone(backbone: DictConfig) -> Iterator[DictConfig]:
    """Yield the backbone's node without weights, published models as folders with a config.json."""
    found = OmegaConf.create(OmegaConf.to_container(backbone, resolve=True))
    assert isinstance(found, DictConfig)
    with TemporaryDirectory() as folder:
        for node in (found, found.vision):
            node.pretrained = False
            if node.path is None and node.model in PUBLISHED:
                architecture, sizes = PUBLISHED[node.model]
                node.path = str(Path(folder) / architecture)
                AutoConfig.for_model(architecture, **sizes).save_pretrained(node.path)
        yield found


def describe(model: VisionLanguageModel, ffns: float) -> formulas.ModelSizes:
    """Return the sizes that memory depends on; ``ffns``: see ``mean_ffns``."""
    config: Any = model.config
    blocks, _ = blocks_of(model.language_model)
    tower: Any = model.vision.model
    vision_blocks = tower.blocks if hasattr(tower, "blocks") else tower.encoder.layers
    vision_width = int(model.vision.width)
    vision_hidden = linears(vision_blocks[0].mlp)[-1].in_features
    heads, width = config.num_attention_heads, config.hidden_size
    # Not getattr: it raises for sizes that differ between layers.
    given = config.to_dict()
    kv_heads = given.get("num_key_value_heads") or heads
    in_blocks = [number(block) for block in (*blocks, *vision_blocks)]
    return formulas.ModelSizes(
        parameters=number(model),
        trained=number(model, trained=True),
        outside=number(model) - sum(in_blocks),
        largest_block=max(in_blocks),
        decoder=formulas.Blocks(len(blocks), width, _ffn_width(given, width)),
        moe_blocks=len(moe_layers(model)),
        mean_k=ffns,
        kv_width=kv_heads * (given.get("head_dim") or width // heads),
        vision=formulas.Blocks(len(vision_blocks), vision_width, vision_hidden),
        vision_trained=number(model.vision, trained=True) > 0,
        vocabulary=config.vocab_size,
    )


def held(model: nn.Module, devices: int, strategy: Any = None) -> dict[str, formulas.Held]:
    """Return the parameters of the first device at the start, by the way in which ``devices`` share
    them; none has more. ``strategy``: the node ``trainer.strategy``, which may have a ``size``."""

    def counted(count: Callable[[nn.Parameter], float], **others: Any) -> formulas.Held:
        trained = sum(count(p) for p in model.parameters() if p.requires_grad)
        return formulas.Held(sum(map(count, model.parameters())), trained, **others)

    def share(p: nn.Parameter) -> int:
        return p.numel() if p in whole else math.ceil(p.shape[0] / devices) * p[0].numel()

    if devices == 1:
        return {"": counted(nn.Parameter.numel)}
    trained, whole = number(model, trained=True), set(unsharded(model))
    found = {
        "DDP": counted(nn.Parameter.numel, averaged=trained),
        "FSDP": counted(lambda p: p.numel() / devices, gathers=True),
        "FSDP2": counted(share, gathers=True),
    }
    size = (strategy.get("size") if isinstance(strategy, DictConfig) else None) or devices
    layers = moe_layers(model)
    with suppress(ConfigError):  # routers that read the weights of all experts
        away: set[nn.Parameter] = set()
        for name, layer in layers.items():
            check(name, layer)
            owners = dealt(layer.live, layer.max_experts, size)
            for expert, owner in zip(layer.experts.slots, owners, strict=True):
                away.update(expert.parameters() if owner else ())
        experts = sum(number(layer.experts.slots, trained=True) for layer in layers.values())
        if layers:
            found["experts shared"] = counted(
                lambda p: 0 if p in away else p.numel(), averaged=trained - experts
            )
    return found


def _ffn_width(config: dict[str, Any], width: int) -> int:
    """Return the hidden width of a decoder's FFNs, of the widest where they differ."""
    found = next((config[key] for key in FFN_WIDTHS if config.get(key)), 4 * width)
    return int(max(found) if isinstance(found, list) else found)


def number(module: nn.Module, trained: bool = False) -> int:
    """Return the number of parameters, all or the trained ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _trained_share(model: VisionLanguageModel, in_layers: float, activated: float) -> float:
    """``in_layers``: the ``activated`` parameters in MoE layers, which are trained as a whole or
    not at all."""
    layers = sum(number(layer, trained=True) for layer in moe_layers(model).values())
    trained = number(model, trained=True) - number(model.vision, trained=True) - layers
    tied = model.config.tie_word_embeddings  # else the first are looked up, not multiplied
    looked_up = 0 if tied else number(model.language_model.get_input_embeddings())
    if not tied and model.language_model.get_input_embeddings().weight.requires_grad:
        trained -= looked_up
    return (trained + in_layers * (layers > 0)) / (activated - number(model.vision) - looked_up)


def patches_of(cfg: DictConfig) -> int:
    return int((cfg.backbone.vision.image_size // cfg.backbone.vision.patch_size) ** 2)


def _data_at_hand(cfg: DictConfig) -> VisionLanguageData | None:
    """Return the data, read, where they and their vocabulary are part of the package."""
    content = cfg.data.content
    if cfg.data.tokenizer_path or cfg.data.tokenizer_name or content.get("root"):
        return None
    data = build_data(cfg)
    assert isinstance(data, VisionLanguageData)
    data.setup()
    return data


# The estimate on the console.

GIB, HOUR = 2**30, 3600


def show_estimate(cfg: DictConfig, console: Console | None = None) -> None:
    """Print parameters, memory of a device, FLOPs and time.

    Raises:
        ConfigError: a model whose sizes are unknown here.
    """
    sizes = measure(cfg)
    console = console or Console()
    for table in (_parameters(cfg, sizes), _memory(cfg, sizes), _work(cfg, sizes)):
        console.print()
        console.print(table)


def _parameters(cfg: DictConfig, sizes: RunSizes) -> Table:
    table = _table("parameters", "all", "without vision tower")
    empty, k = "", ""
    if sizes.model.moe_blocks:
        empty, k = ", empty slots included", f", {sizes.mean_k:g} of {cfg.moe.max_experts} experts"
    rows = {
        f"whole model{empty}": (sizes.total, sizes.total - sizes.vision),
        f"used by a token{k}": (sizes.activated, sizes.activated - sizes.vision),
        f"trained in stage {cfg.stage.name}": (sizes.model.trained, None),
    }
    for name, numbers in rows.items():
        table.add_row(name, *("" if n is None else f"{n / 1e6:,.1f} M" for n in numbers))
    return table


def _memory(cfg: DictConfig, sizes: RunSizes) -> Table:
    model, devices = sizes.model, _devices(cfg)
    number = formulas.number_bytes(str(cfg.trainer.precision))
    length, questions = cfg.data.max_length, cfg.data.eval_batch_size
    at_once = math.ceil(cfg.data.batch_size / (devices * cfg.trainer.accumulate_grad_batches))
    patches = patches_of(cfg)
    batch = formulas.DeviceBatch(at_once, length, patches + 1, max(1, length - patches))
    chosen = bool(cfg.backbone.grad_checkpointing)

    def under(checkpointing: bool) -> list[formulas.DeviceMemory]:
        return [
            formulas.memory(model, batch, number, checkpointing, own) for own in sizes.held.values()
        ]

    labels = (
        f"weights, {cfg.trainer.precision}",
        "gradients",
        "AdamW's moments",
        "weights cast for products",
        f"activations of {at_once} x {length} tokens",
        "logits of their text",
        "gradients in buckets; gathered blocks",
    )
    title = "memory, GiB" if devices == 1 else f"memory of each of {devices} devices, GiB"
    table = _table(title, *sizes.held)
    for label, *numbers in zip(labels, *under(chosen), strict=True):
        table.add_row(label, *map(_gib, numbers))
    for checkpointing in (chosen, not chosen):
        label = f"peak{'' if checkpointing else ' without'} recomputing blocks"
        style = "bold" if checkpointing == chosen else ""
        table.add_row(label, *(_gib(memory.peak) for memory in under(checkpointing)), style=style)
    tokens = length + (cfg.data.max_new_tokens or ANSWER_TOKENS)
    cache = formulas.kv_cache(model, questions, tokens, number)
    table.add_row(f"in evaluation: KV cache of {questions} x {tokens} tokens", _gib(cache))
    return table


def _work(cfg: DictConfig, sizes: RunSizes) -> Table:
    devices, plan, batch = _devices(cfg), cfg.plan, cfg.data.batch_size
    steps = cfg.trainer.max_steps
    if steps < 1:
        steps = cfg.task.epochs * math.ceil(sizes.conversations / batch)
    table = _table("work", "")
    table.add_row("conversations of an epoch", f"{sizes.conversations:,}")
    table.add_row("their tokens", f"{sizes.mean_tokens:,.0f}")
    table.add_row(f"optimizer steps of {batch} conversations", f"{steps:,}")
    if sizes.flops is None:
        table.add_row("FLOPs", "not known for this backbone")
        return table
    step = batch * formulas.training_flops(
        sizes.vision_flops,
        sizes.flops - sizes.vision_flops,
        sizes.model.vision_trained,
        sizes.trained_share,
        bool(cfg.backbone.grad_checkpointing),
    )
    tflops = peak(cfg)
    duration = formulas.seconds(steps * step, devices, tflops, plan.utilisation)
    table.add_row("FLOPs of a forward pass", f"{sizes.flops:.3g}")
    table.add_row("FLOPs of an optimizer step", f"{step:.3g}")
    table.add_row("FLOPs of the training", f"{steps * step:.3g}")
    machine = f"{devices} x {tflops:.3g} TFLOP/s x {plan.utilisation:.0%}"
    shown = f"{duration / HOUR:.1f} h" if duration > HOUR else f"{duration:.3g} s"
    table.add_row(f"time at {machine}", shown, style="bold")
    return table


def peak(cfg: DictConfig) -> float:
    """TFLOP/s of a device: as given, an A100's, or on a CPU those of a large product here."""
    if cfg.plan.tflops is not None:
        return float(cfg.plan.tflops)
    accelerator = cfg.trainer.accelerator
    if accelerator != "cpu" and (accelerator != "auto" or torch.cuda.is_available()):
        return A100
    a = torch.randn(PRODUCT, PRODUCT)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(seconds) / 1e12


def _devices(cfg: DictConfig) -> int:
    here = device_count(cfg) or max(1, torch.cuda.device_count())
    return here * int(cfg.trainer.get("num_nodes", 1))


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


# Sizes of published models by their names on the hub, so that an estimate needs neither network nor
# weights. Training reads the model's own config.json.
#
# Each has its ``model_type`` in transformers, and the keys of its config.json that sizes depend on
# and that differ from that type's defaults. Sources: the models' cards and config.json on the
# Hugging Face Hub; MoE-LLaVA's code for the models it builds on (``moellava/model/
# language_model``). NOTE: MoE-LLaVA's paper (arXiv 2401.15947, Table 1) gives StableLM the numbers
# of Phi-2; its config.json is right.

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


def _decoder(*sizes: int, **others: Any) -> dict[str, Any]:
    return dict(zip(SIZES, sizes, strict=True)) | others


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "stabilityai/stablelm-2-1_6b": (
        "stablelm",
        _decoder(100352, 2048, 5632, 24, 32, 32, use_qkv_bias=True),
    ),
    # The sizes of Qwen-1.8B, whose own code counts the FFN's two halves as one: 11008.
    "Qwen/Qwen1.5-1.8B": ("qwen2", _decoder(151936, 2048, 5504, 24, 16, 16)),
    "microsoft/phi-2": ("phi", _decoder(51200, 2560, 10240, 32, 32, 32)),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llama",
        _decoder(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip_vision_model",
        dict(zip(SIZES[1:5], (1024, 4096, 24, 16), strict=True))
        | {"image_size": 336, "patch_size": 14},
    ),
}
