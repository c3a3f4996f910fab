"""The command line of the commands that measure whole models: ``step`` and ``generate``."""

from __future__ import annotations

import argparse
from typing import Any

from dynmoe.benchmark import plan
from dynmoe.errors import ConfigError
from runners.bench_arguments import (
    Subparsers,
    add_baseline,
    add_dtype,
    add_json,
    add_k,
    add_runs,
    add_timing,
    listed,
    positive,
)

# What is measured without --runs, by default.
GENERATE: dict[str, Any] = {"overrides": [], "k": [1.0, 1.5, 2.0], "dtype": "fp32"}
STEP: dict[str, Any] = {**GENERATE, "only": plan.STEP_DEFAULT, "batch": None, "baseline": None}


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
        epilog="cases, dense always runs:\n" + listed(plan.STEP_CASES),
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
