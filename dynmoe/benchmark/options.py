"""The command line of ``dynmoe-bench``, and its commands up to their refusal.

PyTorch is loaded once a command can be carried out: a wrong one is refused at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.benchmark.cases import (
    GENERATE_CASES,
    LAYER_CASES,
    PRECISIONS,
    SHAPES,
    SPARSE_KEYS,
    STEP_CASES,
    Shape,
    check_names,
    parse_shape,
    step_cases,
)
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dynmoe.benchmark.candidates import Candidate


# Values of `step` and `generate` without --runs. Trained runs bring their own.
DEFAULTS: dict[str, Any] = {
    "overrides": [],
    "k": [1.0, 1.5, 2.0],
    "precision": None,
    "only": ["dense", "top-1", "top-2", "dynmoe"],
    "batch": None,
    "baseline": None,
}
NOT_BESIDE_RUNS = {"step": tuple(DEFAULTS), "generate": ("overrides", "k", "precision")}

DISTURBED = "disturbed counts samples during which other processes were busy."

LAYER = """\
Time the forward and backward pass of one MoE layer, or the forward pass alone. Its rivals are
timed interleaved with it: a dense FFN on as many rows (the limit), and other ways to dispatch
tokens to experts. Thresholds are
fitted so that a token activates k experts on average and the popularity of experts follows Zipf's
law with exponent 0.8. The command prints a table for each shape and k, and a summary."""
LAYER_NOTE = f"""\
Each call takes the next of 16 batches of tokens, short ones of 64, so the loads of the experts are
new as in training; the limit always has their mean number of rows. Ratios are of GFLOP/s.
{DISTURBED}"""

RUNS = """\
--runs measures trained models instead. For each setting of a sweep it takes the finished run of the
lowest seed and loads its selected checkpoint. It writes FOLDER/{}.json, which dynmoe-report
reads."""

STEP = f"""\
Time whole training steps (forward, loss, backward, AdamW) and inference of a backbone with MoE
layers in every second block, interleaved with the dense backbone. The thresholds of DynMoE are
fitted so that a token activates k experts on average. The learning rate is 0, which costs the same
arithmetic and keeps them fitted. The default is DeiT-Ti on noise at 64 px with 8 experts. Settings
of dynmoe-run change the model: backbone.*, moe.*, runtime.*, such as backbone=vit_small
moe.layers=[8,10].

task=glue measures a small BERT on training batches of the embedded definitions; task=vl measures a
small LLaVA on conversations about rendered scenes, with gradients of the parts that stage=moe
trains. There data.* counts too: data=rte data.source=tsv data.root=FOLDER backbone=minilm
backbone.path=FOLDER.

{RUNS.format("timing")}"""
STEP_NOTE = f"""\
ideal: FLOPs of the dense model over those of the case, whose FFNs count k times, routers included.
used: parameters that a token activates. Layers are compact in inference; a token that no expert
serves takes its best one there.
{DISTURBED}"""
TEXT_NOTE = """\
Batches have as many positions as their longest text: times are means over all 8 of them, the peak
is that of the largest. tokens/s are real tokens, patches of images included. ideal counts real
tokens in MoE layers, which leave padding out, and all positions elsewhere, as in the dense
model."""
RUNS_NOTE = f"""\
All models see the same training batches, those of the first run. A step is forward, losses and
routing statistics, backward and the run's optimizer at learning rate 0, without gradient clipping
and without the training loop around it. Where batches differ in shape, times are means over 8 of
them, and the peak is that of the largest. Layers are compact in inference.
{DISTURBED}"""

GENERATE = f"""\
Time the answers of vision-language models to the questions of their evaluation set, token by token
with the KV cache. Every answer gets the same number of new tokens, so that all models do the same
work. Without --runs the models have fresh weights and are measured interleaved: a dense one, and
ones with MoE layers in every second block, with top-2 routing and with DynMoE's, whose thresholds
are fitted so that a token of a training batch activates k experts on average. The default is a
small LLaVA on questions about rendered scenes.

{RUNS.format("generation")}"""
GENERATE_NOTE = f"""\
All models answer the same questions. prompt: time from the questions of a batch, images included,
to the first new token of each. token: time of each further token of all its answers. tokens/s are
new tokens over the whole time. Times are means over up to 8 batches. k is that of compact layers,
in which a token that no expert serves takes its best one. The peak is that of the largest batch,
beyond the weights.
{DISTURBED}"""

EPOCH = """\
Time a training epoch of the dense encoder in dynmoe's runner (Lightning, batches of about equally
long texts, its task), interleaved with the loop that one writes with transformers and Lightning
alone (shuffled batches). Both have the same model, tokens, batch size and precision, fused AdamW,
linear decay and no evaluation. Settings are those of dynmoe-run, such as data=rte data.source=tsv
data.root=FOLDER backbone=minilm backbone.path=FOLDER; the default is the embedded definitions."""
EPOCH_NOTE = f"""\
tokens/s are real tokens, and "of plain" compares them: with --steps the loops see other texts.
padded is a share of all positions. runtime.matmul_precision and runtime.malloc apply to the plain
loop too. Its attention is transformers' own; runtime.fused_attention=true gives dynmoe the same.
{DISTURBED}"""

START = """\
Time dynmoe-run from the command to its first training step, beside a script that does the same with
transformers and Lightning alone: same texts, tokenizer, weights, batch size. Every start is a
process of its own in an empty folder, without evaluation, on the CPU. Settings are those of
dynmoe-run; the default is task=glue."""
START_NOTE = """\
imports: PyTorch, Lightning and transformers alone, the least that both need. dynmoe-run reads and
checks its data, makes its MoE layers and writes its records in that time."""

DATA = """\
Time the training loader alone, in images per second, without a model that waits for them. CPU time
is that of this process and its workers. Settings are those of dynmoe-run, such as data=pacs
data.root=FOLDER."""


GPU = """\
Check and time bf16 on this GPU, in less than 8 minutes: the experts' values and gradients against
a loop, then a layer of width 1024 with 16 experts on 50,000 tokens, both kinds of FFN, and the
training step of a ViT-S. The results are in one folder, a table and a file for each part."""
GPU_CHECK = Shape("check", 4096, 1024, 4096, 16)
_CASES = ["--only", "layer", "experts", "top_k", "top_k experts", "naive loop", "hf grouped_mm"]
_LAYER = ["layer", "--shape", "50000,1024,4096,16", "--k", "2", "--dtype", "bf16", *_CASES]
GPU_PARTS = {
    "layer-mlp": [*_LAYER, "--ffn", "mlp"],
    "layer-gated": [*_LAYER, "--ffn", "gated"],
    "step": [
        *("step", "backbone=vit_small", "backbone.pretrained=false", "backbone.image_size=224"),
        *("--batch", "128", "--k", "1.5", "--mode", "train", "--precision", "bf16-mixed"),
    ],
}
"""The commands of ``gpu`` by the names of their files."""
GPU_SMOKE = Shape("check", 64, 16, 32, 4)
_TINY = "backbone.options={depth: 2, embed_dim: 32, num_heads: 2, patch_size: 4}"
SMOKE = {
    "layer-mlp": ["--shape", "64,16,32,4", "--malloc", "system"],
    "layer-gated": ["--shape", "64,16,32,4", "--malloc", "system"],
    "step": [
        "--only",
        "dynmoe",
        "--batch",
        "2",
        "runtime.malloc=system",
        "backbone.image_size=16",
        "backbone=vit_tiny",
        _TINY,
    ],
}
"""What ``gpu --smoke`` makes small."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. The result names the chosen one as ``command``."""
    top = argparse.ArgumentParser(prog="dynmoe-bench", description="Measure the speed of dynmoe.")
    top.add_argument("--version", action="store_true", help="print the version and the commit")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def new(
        name: str, summary: str, text: str, cases: Mapping[str, str] | None = None
    ) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        p = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
        if cases:
            lines = [f"  {case:17}{text}" for case, text in cases.items()]
            p.epilog = "\n".join([f"cases, {next(iter(cases))} always runs:", *lines])
        return p

    p = new("layer", "one MoE layer beside a dense FFN and other dispatches", LAYER, LAYER_CASES)
    text = f"{', '.join(SHAPES)}, or tokens,dim,hidden,experts (default: a b c)"
    shapes = [SHAPES[name] for name in "abc"]
    p.add_argument("--shape", nargs="+", type=parse_shape, default=shapes, metavar="S", help=text)
    text = "experts: Linear, GELU, Linear, or down(silu(gate(x)) * up(x)) (default: mlp)"
    p.add_argument("--ffn", choices=["mlp", "gated"], default="mlp", help=text)
    _add_k(p, "mean experts per token", [1.0, 1.5, 2.0, 4.0])
    text = "forward and backward, or forward without gradients and recording (default: train)"
    p.add_argument("--mode", choices=["train", "inference"], default="train", help=text)
    _add_only(p, list(LAYER_CASES), "all below")
    text = "amp: fp32 weights under bf16 autocast (default: fp32)"
    p.add_argument("--dtype", choices=["fp32", "bf16", "amp"], default="fp32", help=text)
    _add_timing(p)
    choices = ["auto", "highest", "high", "medium"]
    text = "of fp32 products; auto: the fastest at fp32 accuracy (default)"
    p.add_argument("--matmul-precision", choices=choices, default="auto", help=text)
    choices = ["auto", "tuned", "system"]
    text = "tuned: glibc keeps freed memory; auto: tuned on a CPU (default)"
    p.add_argument("--malloc", choices=choices, default="auto", help=text)
    _add_files(p, "layer", baseline=True)
    _add_against(p)

    text = "whole training steps and inference beside the dense model"
    p = new("step", text, STEP, STEP_CASES)
    _add_models(p)
    _add_only(p, DEFAULTS["only"], "dense top-1 top-2 dynmoe")
    choices = ["train", "inference", "both"]
    p.add_argument("--mode", choices=choices, default="both", help="default: both")
    text = "samples of a batch (default: 32 images, else data.batch_size)"
    p.add_argument("--batch", type=at_least(1), metavar="N", help=text)
    _add_timing(p)
    _add_files(p, "step", baseline=True)
    _add_against(p)

    p = new("generate", "answers of vision-language models, token by token", GENERATE)
    _add_models(p)
    text = "questions answered at once (default: data.eval_batch_size)"
    p.add_argument("--batch", type=at_least(1), metavar="N", help=text)
    text = "tokens of each answer (default: 32)"
    p.add_argument("--new-tokens", type=at_least(2), default=32, metavar="N", help=text)
    _add_timing(p, rounds=7)
    _add_files(p, "generate")
    _add_against(p)

    p = new("epoch", "a training epoch on texts beside a plain loop", EPOCH)
    _add_overrides(p)
    text = "the first N steps only (default: all)"
    p.add_argument("--steps", type=at_least(1), metavar="N", help=text)
    _add_timing(p, rounds=3)
    _add_files(p, "epoch")

    p = new("start", "dynmoe-run up to its first step, beside a plain script", START)
    _add_overrides(p)
    text = "starts of each case (default: 5)"
    p.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help=text)
    _add_files(p, "start")

    p = new("gpu", "a check and the figures of a GPU, prepared", GPU)
    text = "everything tiny, on a CPU: does it run"
    p.add_argument("--smoke", action="store_true", help=text)
    text = "write the results there (default: outputs/bench/gpu-<date-time>)"
    p.add_argument("--out", type=Path, metavar="FOLDER", help=text)

    p = new("data", "the training loader", DATA)
    _add_overrides(p)
    text = "loader processes, one line for each number (default: data.workers)"
    p.add_argument("--workers", nargs="+", type=at_least(0), metavar="N", help=text)
    text = "time for each number (default: 10)"
    p.add_argument("--seconds", type=seconds, default=10.0, metavar="S", help=text)
    _add_files(p, "data")
    return top


def at_least(least: int) -> Callable[[str], int]:
    """Return the argparse type of whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            expected = f"expected a whole number of {least} or more"
            raise argparse.ArgumentTypeError(f"{text}: {expected}")
        return int(text)

    return number


def seconds(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0")


def _add_overrides(p: argparse.ArgumentParser) -> None:
    text = "settings of the configuration, as in dynmoe-run"
    p.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _add_models(p: argparse.ArgumentParser) -> None:
    _add_overrides(p)
    text = "measure trained runs: those of a sweep, outputs/<name>, or a single one"
    p.add_argument("--runs", type=Path, metavar="FOLDER", help=text)
    text = "packages whose code the configurations of these runs may call: of your own router"
    p.add_argument("--targets", nargs="+", default=[], metavar="PACKAGE", help=text)
    _add_k(p, "mean experts per token in training", DEFAULTS["k"])
    text = "values of trainer.precision, all interleaved (default: that of the configuration)"
    p.add_argument("--precision", nargs="+", choices=PRECISIONS, metavar="P", help=text)


def _add_k(p: argparse.ArgumentParser, text: str, default: list[float]) -> None:
    text += f" (default: {' '.join(f'{k:g}' for k in default)})"
    p.add_argument("--k", nargs="+", type=float, default=default, metavar="K", help=text)


def _add_only(p: argparse.ArgumentParser, default: list[str], shown: str) -> None:
    text = f"the cases to measure (default: {shown})"
    p.add_argument("--only", nargs="+", default=default, metavar="CASE", help=text)


def _add_timing(p: argparse.ArgumentParser, rounds: int = 15) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--threads", type=at_least(1), metavar="N", help="default: PyTorch's")
    text = f"samples of each case (default: {rounds})"
    p.add_argument("--rounds", type=at_least(1), default=rounds, metavar="N", help=text)


def _add_files(p: argparse.ArgumentParser, command: str, baseline: bool = False) -> None:
    text = f"write the results there (default: outputs/bench/{command}-<date-time>.json)"
    p.add_argument("--json", type=Path, metavar="FILE", help=text)
    if baseline:
        text = "compare with the --json file of an earlier measurement"
        p.add_argument("--baseline", type=Path, metavar="FILE", help=text)


def _add_against(p: argparse.ArgumentParser) -> None:
    text = "time the same cases of another build, a checkout of dynmoe, interleaved with these"
    p.add_argument("--against", type=Path, metavar="FOLDER", help=text)


# The commands. Each raises a UserError where nothing can be measured as asked: nothing has run yet.


def layer(args: argparse.Namespace) -> None:
    """Time a single layer."""
    check_names(args.only, LAYER_CASES)
    for shape in args.shape:
        for k in args.k:
            if not (0 < k <= shape.experts and round(k * shape.tokens) > 0):
                raise ConfigError(
                    f"--k {k:g}: expected a mean number of experts per token above 0 (one pair at"
                    f" least) and up to {shape.experts}, the experts of shape {shape.name}"
                )
    from dynmoe.benchmark.results import Output

    output = Output(args.json, "layer")
    from dynmoe.benchmark.layer import run

    run(args, output)


def step(args: argparse.Namespace) -> None:
    """Time training steps and inference, or for ``generate`` the answers of vision-language models,
    of fresh models or of trained runs."""
    from dynmoe.benchmark.results import Output

    work = models_of(args)
    file = args.json
    if args.runs:
        file = file or args.runs / f"{'timing' if args.command == 'step' else 'generation'}.json"
    output = Output(file, args.command)
    from dynmoe.benchmark import steps

    steps.run(args, output, *work)


generate = step


def models_of(args: argparse.Namespace) -> tuple[DictConfig, list[str], list[Candidate]]:
    """Return the configuration, its cases, and the trained runs of ``step`` or ``generate``.

    ``args.precision`` becomes that of the configuration unless it is given.

    Raises:
        UserError: naming what cannot be measured.
    """
    from dynmoe.benchmark.candidates import candidates, configuration, keys, modality, step_defaults

    is_step, cases = args.command == "step", list[str]()
    if args.runs:
        _refuse_beside_runs(args)
        found = candidates(args.runs, args.targets)
        cfg = found[0].cfg
        for run, its, _ in () if is_step else found:
            if modality(its) != "vision-language":
                raise ConfigError(
                    f"{run.folder.path}: {its.data.name} has no questions to answer;"
                    " expected runs of task=vl"
                )
    else:
        found, overrides = [], args.overrides
        if not is_step and "task" not in keys(overrides):
            overrides = ["task=vl", *overrides]
        cfg = configuration(overrides, step_defaults(overrides))
        if not is_step and modality(cfg) != "vision-language":
            raise ConfigError(
                f"task={cfg.task.name}: expected a task that answers questions, task=vl"
            )
        only = args.only if is_step else GENERATE_CASES
        given = [cfg.backbone.get(key) for key in SPARSE_KEYS]
        is_sparse = any(value is not None for value in given)
        cases = step_cases(only, args.k, cfg.moe.num_experts, is_sparse)
        if is_step:
            images = 32 if modality(cfg) == "image" else None
            cfg.data.batch_size = args.batch or images or cfg.data.batch_size
    for each in () if is_step else (cfg, *(candidate.cfg for candidate in found)):
        each.data.eval_batch_size = args.batch or each.data.eval_batch_size
    args.precision = args.precision or [str(cfg.trainer.precision)]
    for precision in args.precision:
        if precision not in PRECISIONS:
            where = f"{found[0].run.folder.path}: " if found else ""
            raise ConfigError(
                f"{where}trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}"
            )
    return cfg, cases, found


def _refuse_beside_runs(args: argparse.Namespace) -> None:
    """Trained runs bring their own models, batches and precision.

    Raises:
        ConfigError: an option that would say otherwise.
    """
    for name in NOT_BESIDE_RUNS[args.command]:
        given = getattr(args, name)
        if given != DEFAULTS[name]:
            shown = " ".join(given) if name == "overrides" else f"--{name}"
            raise ConfigError(
                f"{shown}: not together with --runs, whose runs bring their own models, batches and"
                " precision; leave it out"
            )


def epoch(args: argparse.Namespace) -> None:
    """Time training epochs on texts."""
    from dynmoe.benchmark.candidates import EPOCH_DEFAULTS, configuration, modality
    from dynmoe.benchmark.results import Output

    cfg = configuration(args.overrides, EPOCH_DEFAULTS)
    if modality(cfg) != "text":
        raise ConfigError(f"task={cfg.task.name}: expected a task on texts, task=glue")
    if cfg.moe.router is not None:
        raise ConfigError(
            f"moe={cfg.moe.name}: the dense encoder is measured here, leave it out; MoE layers are"
            " measured by dynmoe-bench step"
        )
    output = Output(args.json, "epoch")
    from dynmoe.benchmark.epochs import run

    run(args, output, cfg)


def start(args: argparse.Namespace) -> None:
    """Time the start of a run on texts."""
    from dynmoe.benchmark.candidates import configuration, modality
    from dynmoe.benchmark.results import Output

    if not any(text.startswith("task=") for text in args.overrides):
        args.overrides = ["task=glue", *args.overrides]
    whole = configuration(args.overrides, [])
    if modality(whole) != "text":
        raise ConfigError(f"task={whole.task.name}: expected a task on texts, task=glue")
    others = [text for text in args.overrides if not text.lstrip("+~").startswith("moe")]
    cfg = configuration([*others, "moe=dense"], [])
    output = Output(args.json, "start")
    from dynmoe.benchmark.starts import run

    run(args, output, cfg)


def gpu(args: argparse.Namespace) -> None:
    """Check the experts on a GPU, then carry out ``GPU_PARTS``."""
    import torch

    from dynmoe.benchmark.results import Output

    device = torch.device("cpu" if args.smoke else "cuda")
    if not (args.smoke or torch.cuda.is_available()):
        raise ConfigError(
            "dynmoe-bench gpu: PyTorch sees no GPU here; --smoke tries the same on a CPU, tiny"
        )
    out = args.out or Path(f"outputs/bench/gpu-{datetime.now():%Y%m%d-%H%M%S}")
    from dynmoe.benchmark.gpu import check

    check(GPU_SMOKE if args.smoke else GPU_CHECK, device, Output(out / "check.json", "gpu"))
    for name, words in GPU_PARTS.items():
        words = [*words, "--device", device.type, "--json", str(out / f"{name}.json")]
        words += [*SMOKE[name], "--rounds", "1"] if args.smoke else ["--rounds", "11"]
        part = parser().parse_args(overrides_first(words))
        globals()[part.command](part)


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """Move key=value right after the command: an option before it would take it as its value."""
    overrides = [a for a in arguments if a[0:1] == "~" or ("=" in a and a[0:1] != "-")]
    others = [a for a in arguments if a not in overrides]
    return [*others[:1], *overrides, *others[1:]]


def data(args: argparse.Namespace) -> None:
    """Time the training loader of images."""
    from dynmoe.benchmark.candidates import DATA_DEFAULTS, configuration, modality
    from dynmoe.benchmark.results import Output

    cfg = configuration(args.overrides, DATA_DEFAULTS)
    if modality(cfg) != "image":
        raise ConfigError(f"task={cfg.task.name}: expected a task on images, task=vit_domainbed")
    output = Output(args.json, "data")
    from dynmoe.benchmark.epochs import run_loader

    run_loader(args, output, cfg)
