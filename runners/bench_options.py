"""The command line of ``dynmoe-bench``. Without PyTorch: a wrong command is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynmoe.benchmark import plan
from dynmoe.errors import ConfigError

Subparsers = Any  # argparse's own type of add_subparsers() is private
Command = Callable[[argparse.Namespace], None]

# What `step` measures without --runs, by default.
SYNTHETIC: dict[str, Any] = {
    "overrides": [],
    "k": [1.0, 1.5, 2.0],
    "only": plan.STEP_DEFAULT,
    "batch": None,
    "dtype": "fp32",
    "baseline": None,
}


def parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The options of each subcommand, and the function that ``run`` has for it."""
    top = argparse.ArgumentParser(prog="dynmoe-bench", description="Measure dynmoe's speed.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    adders = {"layer": _add_layer, "step": _add_step, "data": _add_data, "epoch": _add_epoch}
    for name, add in adders.items():
        add(commands).set_defaults(run=run[name])
    return top


def refuse_beside_runs(args: argparse.Namespace) -> None:
    """Trained runs bring their own models, batches and precision.

    Raises:
        ConfigError: an option that would say otherwise.
    """
    for name, default in SYNTHETIC.items():
        given = getattr(args, name)
        if given != default:
            shown = " ".join(given) if name == "overrides" else f"--{name}"
            raise ConfigError(
                f"{shown}: not together with --runs, whose runs bring their own models, batches and"
                " precision; leave it out"
            )


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
        epilog="cases, the limit always runs:\n" + _listed(plan.CASES),
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
    _add_timing(p)
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
    _add_json(p, "layer")
    _add_baseline(p)
    return p


STEP = """\
Time whole training steps (forward, loss, backward, AdamW) and inference of a backbone with MoE
layers in every second block, in turns with the dense backbone. DynMoE's thresholds are fitted so
that a token activates k experts on average; the learning rate is 0, the same arithmetic, so that
they stay there. Images are noise, the optimizer is fused AdamW. The default is DeiT-Ti at 64 px
with 8 experts. Of dynmoe-run's settings backbone.*, moe.* and runtime.* count: backbone=vit_small,
moe.layers=[8,10], ...

With task=glue it is a small BERT on training batches of the embedded definitions; data.* counts
too: data=rte data.source=tsv data.root=FOLDER backbone=minilm backbone.path=FOLDER.

With --runs it times trained models instead: of each setting of a sweep the finished run of the
lowest seed, as its selected checkpoint left it, on training batches of its own data. The file is
FOLDER/timing.json, which dynmoe-report reads."""
STEP_NOTE = """\
ideal: FLOPs of the dense model over those of the case, whose FFNs count k times, routers included.
used: parameters that a token activates. Inference is of compact layers; a token that no expert
serves takes its best one there. disturbed: samples during which other processes were busy."""
TEXT_NOTE = """\
Batches have as many positions as their longest text: times are means over all 8 of them, the peak
is that of the largest. tokens/s are real tokens. ideal counts real tokens in MoE layers, which
leave padding out, and all positions elsewhere, as in the dense model."""


RUNS_NOTE = """\
All on the same batches, the first run's; a step is forward, losses and routing statistics,
backward and the run's optimizer at learning rate 0, without gradient clipping and without the
training loop around it. Where batches differ in shape, times are means over 8 of them, the peak is
that of the largest. Inference is of compact layers. disturbed: samples during which other
processes were busy."""


def _add_step(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "step",
        help="whole training steps and inference beside the dense model",
        description=STEP,
        epilog="cases, dense always runs:\n" + _listed(plan.STEP_CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, as in dynmoe-run")
    add(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="trained runs instead: of a sweep, outputs/<name>, or a single one",
    )
    add(
        "--k",
        nargs="+",
        type=float,
        default=SYNTHETIC["k"],
        metavar="K",
        help="mean experts per token in training (default: 1 1.5 2)",
    )
    add("--only", nargs="+", default=SYNTHETIC["only"], metavar="CASE", help="see below")
    add("--mode", choices=["train", "inference", "both"], default="both", help="default: both")
    dtype = SYNTHETIC["dtype"]
    add(
        "--batch",
        type=_positive,
        default=SYNTHETIC["batch"],
        metavar="N",
        help="samples of a batch (default: 32; of texts data.batch_size)",
    )
    add(
        "--dtype",
        choices=["fp32", "amp"],
        default=dtype,
        help="amp: fp32 weights under bf16 autocast (default: fp32)",
    )
    _add_timing(p)
    _add_json(p, "step")
    _add_baseline(p)
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
    add("--steps", type=_positive, metavar="N", help="the first N steps only (default: all)")
    _add_timing(p, rounds=3)
    _add_json(p, "epoch")
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
        type=_whole,
        metavar="N",
        help="loader processes, one line for each number (default: the configuration's)",
    )
    add("--seconds", type=_seconds, default=10.0, metavar="S", help="of each (default: 10)")
    _add_json(p, "data")
    return p


def _listed(cases: dict[str, str]) -> str:
    return "\n".join(f"  {name:17}{text}" for name, text in cases.items())


def _add_timing(p: argparse.ArgumentParser, rounds: int = 15) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--threads", type=_positive, metavar="N", help="default: PyTorch's")
    text = f"samples of each case (default: {rounds})"
    p.add_argument("--rounds", type=_positive, default=rounds, metavar="N", help=text)


def _add_json(p: argparse.ArgumentParser, command: str) -> None:
    text = f"default: outputs/bench/{command}-<date-time>.json"
    p.add_argument("--json", type=Path, metavar="FILE", help=text)


def _add_baseline(p: argparse.ArgumentParser) -> None:
    text = "compare with the --json file of another run"
    p.add_argument("--baseline", type=Path, metavar="FILE", help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0")
