"""The command line of ``dynmoe-bench``. Without PyTorch: a wrong command is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynmoe.errors import ConfigError

# What can be measured: shapes and cases. Without PyTorch: a wrong command is refused at once.


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


# Arguments that several commands of ``dynmoe-bench`` have, and kinds of numbers.

Subparsers = Any  # argparse's own type of add_subparsers() is private


def listed(cases: dict[str, str]) -> str:
    return "\n".join(f"  {name:17}{text}" for name, text in cases.items())


def add_timing(p: argparse.ArgumentParser, rounds: int = 15) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--threads", type=positive, metavar="N", help="default: PyTorch's")
    text = f"samples of each case (default: {rounds})"
    p.add_argument("--rounds", type=positive, default=rounds, metavar="N", help=text)


def add_runs(p: argparse.ArgumentParser) -> None:
    text = "trained runs instead: of a sweep, outputs/<name>, or a single one"
    p.add_argument("--runs", type=Path, metavar="FOLDER", help=text)


def add_dtype(p: argparse.ArgumentParser, default: str) -> None:
    text = f"amp: fp32 weights under bf16 autocast (default: {default})"
    p.add_argument("--dtype", choices=["fp32", "amp"], default=default, help=text)


def add_k(p: argparse.ArgumentParser, default: list[float]) -> None:
    text = f"mean experts per token in training (default: {' '.join(f'{k:g}' for k in default)})"
    p.add_argument("--k", nargs="+", type=float, default=default, metavar="K", help=text)


def add_json(p: argparse.ArgumentParser, command: str) -> None:
    text = f"default: outputs/bench/{command}-<date-time>.json"
    p.add_argument("--json", type=Path, metavar="FILE", help=text)


def add_baseline(p: argparse.ArgumentParser) -> None:
    text = "compare with the --json file of another run"
    p.add_argument("--baseline", type=Path, metavar="FILE", help=text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 0 or more")
    return int(text)


def seconds(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0")


# The command line of the commands that measure whole models: ``step`` and ``generate``.

# What is measured without --runs, by default.
GENERATE: dict[str, Any] = {"overrides": [], "k": [1.0, 1.5, 2.0], "dtype": "fp32"}
STEP: dict[str, Any] = {**GENERATE, "only": STEP_DEFAULT, "batch": None, "baseline": None}


def refuse_beside_runs(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Trained runs bring their own models, batches and precision.

    Raises:
        ConfigError: an option that would say otherwise.
    """
    for name, default in defaults.items():
        given = getattr(args, name)
        if given != default:
            shown = " ".join(given) if name == "overrides" else f"--{name}"
            raise ConfigError(
                f"{shown}: not together with --runs, whose runs bring their own models, batches and"
                " precision; leave it out"
            )


STEP_TEXT = """\
Time whole training steps (forward, loss, backward, AdamW) and inference of a backbone with MoE
layers in every second block, in turns with the dense backbone. DynMoE's thresholds are fitted so
that a token activates k experts on average; the learning rate is 0, the same arithmetic, so that
they stay there. Images are noise, the optimizer is fused AdamW. The default is DeiT-Ti at 64 px
with 8 experts. Of dynmoe-run's settings backbone.*, moe.* and runtime.* count: backbone=vit_small,
moe.layers=[8,10], ...

With task=glue it is a small BERT on training batches of the embedded definitions, with task=vl a
small LLaVA on conversations about rendered scenes, of which what stage=moe trains has gradients;
data.* counts too: data=rte data.source=tsv data.root=FOLDER backbone=minilm backbone.path=FOLDER.

With --runs it times trained models instead: of each setting of a sweep the finished run of the
lowest seed, as its selected checkpoint left it, on training batches of its own data. The file is
FOLDER/timing.json, which dynmoe-report reads."""
STEP_NOTE = """\
ideal: FLOPs of the dense model over those of the case, whose FFNs count k times, routers included.
used: parameters that a token activates. Inference is of compact layers; a token that no expert
serves takes its best one there. disturbed: samples during which other processes were busy."""
TEXT_NOTE = """\
Batches have as many positions as their longest text: times are means over all 8 of them, the peak
is that of the largest. tokens/s are real tokens, patches of images included. ideal counts real
tokens in MoE layers, which leave padding out, and all positions elsewhere, as in the dense
model."""
RUNS_NOTE = """\
All on the same batches, the first run's; a step is forward, losses and routing statistics,
backward and the run's optimizer at learning rate 0, without gradient clipping and without the
training loop around it. Where batches differ in shape, times are means over 8 of them, the peak is
that of the largest. Inference is of compact layers. disturbed: samples during which other
processes were busy."""


def add_step(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "step",
        help="whole training steps and inference beside the dense model",
        description=STEP_TEXT,
        epilog="cases, dense always runs:\n" + listed(STEP_CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_overrides(p)
    add_runs(p)
    add_k(p, STEP["k"])
    add = p.add_argument
    add("--only", nargs="+", default=STEP["only"], metavar="CASE", help="see below")
    add("--mode", choices=["train", "inference", "both"], default="both", help="default: both")
    batch = "samples of a batch (default: 32; of texts data.batch_size)"
    add("--batch", type=positive, default=STEP["batch"], metavar="N", help=batch)
    add_dtype(p, STEP["dtype"])
    add_timing(p)
    add_json(p, "step")
    add_baseline(p)
    return p


GENERATE_TEXT = """\
Time the answers of vision-language models to questions of their own evaluation set, token by token
with the KV cache. Every answer gets the same number of new tokens, so that all models do the same
work. The models are a dense one and ones with MoE layers in every second block, of fresh weights,
in turns: top-2, and DynMoE whose thresholds are fitted so that a token of a training batch
activates k experts on average. The default is a small LLaVA on questions about rendered scenes.

With --runs it times trained models instead: of each setting of a sweep the finished run of the
lowest seed, as its selected checkpoint left it. The file is FOLDER/generation.json, which
dynmoe-report reads."""
GENERATE_NOTE = """\
All answer the same questions. prompt: the questions of a batch, images included, up to the first
new token of each. token: each further token of all its answers. tokens/s are new tokens, of the
whole time. Times are means over up to 8 batches, k is that of compact layers, in which a token that
no expert serves takes its best one; the peak is that of the largest batch, beyond weights.
disturbed: samples during which other processes were busy."""


def add_generate(commands: Subparsers) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "generate",
        help="answers of vision-language models, token by token",
        description=GENERATE_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_overrides(p)
    add_runs(p)
    add_k(p, GENERATE["k"])
    add = p.add_argument
    batch = "questions answered at once (default: data.eval_batch_size)"
    add("--batch", type=positive, metavar="N", help=batch)
    new_tokens = "of each answer (default: 32)"
    add("--new-tokens", type=_several, default=32, metavar="N", help=new_tokens)
    add_dtype(p, GENERATE["dtype"])
    add_timing(p, rounds=7)
    add_json(p, "generate")
    return p


def _add_overrides(p: argparse.ArgumentParser) -> None:
    text = "of the configuration, as in dynmoe-run"
    p.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 2 or more")
    return int(text)


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
        epilog="cases, the limit always runs:\n" + listed(CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add(
        "--shape",
        nargs="+",
        type=parse_shape,
        default=list(SHAPES.values()),
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
    add("--only", nargs="+", default=list(CASES), metavar="CASE", help="default: all below")
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
