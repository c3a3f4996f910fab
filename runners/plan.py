"""What a vision-language run will take, from the sizes of its model: for ``mode=plan``.

docs/VISION_LANGUAGE.md explains the arithmetic and what is assumed.
"""

from __future__ import annotations

import math

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dynmoe.config.rules import device_count
from dynmoe.metrics import estimate
from runners.sizes import Sizes, mean_k, measure, patches_of

GIB, HOUR = 2**30, 3600


def show_estimate(cfg: DictConfig, console: Console | None = None) -> None:
    """Parameters, memory of a device, FLOPs and time.

    Raises:
        ConfigError: a model whose sizes cannot be had.
    """
    sizes = measure(cfg)
    console = console or Console()
    for table in (_parameters(cfg, sizes), _memory(cfg, sizes.model), _work(cfg, sizes)):
        console.print()
        console.print(table)


def _parameters(cfg: DictConfig, sizes: Sizes) -> Table:
    table = _table("parameters", "all", "without vision tower")
    empty, k = "", ""
    if sizes.model.moe_blocks:
        empty, k = ", empty slots included", f", {mean_k(cfg):g} of {cfg.moe.max_experts} experts"
    rows = {
        f"whole model{empty}": (sizes.total, sizes.total - sizes.vision),
        f"used by a token{k}": (sizes.activated, sizes.activated - sizes.vision),
        f"trained in stage {cfg.stage.name}": (sizes.model.trained, None),
    }
    for name, numbers in rows.items():
        table.add_row(name, *("" if n is None else f"{n / 1e6:,.1f} M" for n in numbers))
    return table


def _memory(cfg: DictConfig, model: estimate.Model) -> Table:
    devices, precision = _devices(cfg), estimate.precision(str(cfg.trainer.precision))
    length, questions = cfg.data.max_length, cfg.data.eval_batch_size
    at_once = math.ceil(cfg.data.batch_size / (devices * cfg.trainer.accumulate_grad_batches))
    patches = patches_of(cfg)
    batch = estimate.Batch(at_once, length, patches + 1, max(1, length - patches))
    ways = {"DDP": False, "FSDP": True} if devices > 1 else {"": False}
    chosen = bool(cfg.backbone.grad_checkpointing)

    def under(checkpointing: bool) -> list[estimate.Memory]:
        return [
            estimate.memory(model, batch, precision, checkpointing, devices, fsdp)
            for fsdp in ways.values()
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
    table = _table(title, *ways)
    for label, *numbers in zip(labels, *under(chosen), strict=True):
        table.add_row(label, *map(_gib, numbers))
    for checkpointing in (chosen, not chosen):
        label = f"peak{'' if checkpointing else ' without'} recomputing blocks"
        style = "bold" if checkpointing == chosen else ""
        table.add_row(label, *(_gib(memory.peak) for memory in under(checkpointing)), style=style)
    tokens = length + cfg.data.max_new_tokens
    cache = estimate.kv_cache(model, questions, tokens, precision)
    table.add_row(f"in evaluation: KV cache of {questions} x {tokens} tokens", _gib(cache))
    return table


def _work(cfg: DictConfig, sizes: Sizes) -> Table:
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
    step = batch * estimate.training_flops(
        sizes.vision_flops,
        sizes.flops - sizes.vision_flops,
        sizes.model.vision_trained,
        sizes.trained_share,
        bool(cfg.backbone.grad_checkpointing),
    )
    time = estimate.seconds(steps * step, devices, plan.tflops, plan.utilisation)
    table.add_row("FLOPs of a forward pass", f"{sizes.flops:.3g}")
    table.add_row("FLOPs of an optimizer step", f"{step:.3g}")
    table.add_row("FLOPs of the training", f"{steps * step:.3g}")
    machine = f"{devices} x {plan.tflops:g} TFLOP/s x {plan.utilisation:.0%}"
    shown = f"{time / HOUR:.1f} h" if time > HOUR else f"{time:.3g} s"
    table.add_row(f"time at {machine}", shown, style="bold")
    return table


def _devices(cfg: DictConfig) -> int:
    here = device_count(cfg) or max(1, torch.cuda.device_count())
    return here * int(cfg.trainer.get("num_nodes", 1))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
