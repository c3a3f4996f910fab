"""The command line of ``dynmoe-bench``. Without PyTorch: a wrong command is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from dynmoe.benchmark import plan
from runners.bench_arguments import (
    Subparsers,
    add_baseline,
    add_json,
    add_timing,
    listed,
    positive,
    seconds,
    whole,
)
from runners.bench_model_options import add_generate, add_step

Command = Callable[[argparse.Namespace], None]


def parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The options of each subcommand, and the function that ``run`` has for it."""
    top = argparse.ArgumentParser(prog="dynmoe-bench", description="Measure dynmoe's speed.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    adders = {
        "layer": _add_layer,
        "step": add_step,
        "generate": add_generate,
        "epoch": _add_epoch,
        "data": _add_data,
    }
    for name, add in adders.items():
        add(commands).set_defaults(run=run[name])
    return top


LAYER = """\
Time one MoE layer, forward and backward, in turns with a dense FFN on as many rows (the limit) and
with other ways to dispatch. Its thresholds are fitted so that a token activates k experts on
average, with a Zipf-0.8 popularity; each call gets other tokens. Prints a table per shape and k;
writes everything to a file."""
LAYER_NOTE = """\
Each call takes the next of 16 batches of tokens, so the loads of the experts are new as in
training; the limit always has their mean number of rows. disturbed: samples during which other
processes were busy."""


def _add_layer(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "layer",
        help="one MoE layer beside a dense FFN and other dispatches",
        description=LAYER,
        epilog="cases, the limit always runs:\n" + listed(plan.CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add(
        "--shape",
        nargs="+",
        type=plan.parse_shape,
        default=list(plan.SHAPES.values()),
        metavar="S",
        help="a (ViT-S), b (ViT-Ti), c (BERT-base), or tokens,dim,hidden,experts",
    )
    add(
        "--k",
        nargs="+",
        type=float,
        default=[1.0, 1.5, 2.0, 4.0],
        metavar="K",
        help="mean experts per token (default: 1 1.5 2 4)",
    )
    add("--only", nargs="+", default=list(plan.CASES), metavar="CASE", help="default: all below")
    add(
        "--dtype",
        choices=["fp32", "bf16", "amp"],
        default="fp32",
        help="amp: fp32 weights under bf16 autocast (default: fp32)",
    )
    add_timing(p)
    add(
        "--matmul-precision",
        choices=["auto", "highest", "high", "medium"],
        default="auto",
        help="of fp32 products; auto: the fastest at fp32 accuracy (default)",
    )
    add(
        "--malloc",
        choices=["auto", "tuned", "system"],
        default="auto",
        help="tuned: glibc keeps freed memory; auto: on a CPU (default)",
    )
    add_json(p, "layer")
    add_baseline(p)
    return p


EPOCH = """\
Time a training epoch of the dense encoder in dynmoe's runner (Lightning, batches of about equally
long texts, its task) and in the loop one writes with transformers and Lightning alone (shuffled
batches), in turns: the same model, tokens, batch size and precision, fused AdamW, linear decay, no
evaluation. The settings are those of dynmoe-run, such as data=rte data.source=tsv
data.root=FOLDER backbone=minilm backbone.path=FOLDER; the default is the embedded definitions."""
EPOCH_NOTE = """\
tokens/s are real tokens, and "of plain" is by them: with --steps the loops see other texts. padded
is a share of all positions. Of the process's settings matmul_precision and malloc hold for plain
too; its attention is transformers' own, runtime.fused_attention=true gives dynmoe the same.
disturbed: samples during which other processes were busy."""


def _add_epoch(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "epoch",
        help="a training epoch on texts beside a plain loop",
        description=EPOCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, as in dynmoe-run")
    add("--steps", type=positive, metavar="N", help="the first N steps only (default: all)")
    add_timing(p, rounds=3)
    add_json(p, "epoch")
    return p


DATA = """\
Time the training loader alone: images per second, with nobody waiting for a model. CPU time is of
this process and its workers. The settings are those of dynmoe-run, such as data=pacs
data.root=FOLDER."""


def _add_data(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "data",
        help="the training loader",
        description=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, as in dynmoe-run")
    add(
        "--workers",
        nargs="+",
        type=whole,
        metavar="N",
        help="loader processes, one line for each number (default: the configuration's)",
    )
    add("--seconds", type=seconds, default=10.0, metavar="S", help="of each (default: 10)")
    add_json(p, "data")
    return p
