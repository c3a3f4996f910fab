"""``dynmoe-bench``: how fast a layer is, whole training steps and inference, and the data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.benchmark import plan
from dynmoe.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dynmoe.benchmark.results import Conditions

Subparsers = Any  # argparse's own type of add_subparsers() is private
Command = Callable[[argparse.Namespace], None]


def main() -> None:
    """Exit 0, 2 with a message that names what is wrong, or 130 when interrupted."""
    try:
        args = parser().parse_args(_overrides_first(sys.argv[1:]))
        run: Command = args.run
        run(args)
    except UserError as error:
        print(f"dynmoe-bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("dynmoe-bench: stopped; the --json file holds what was finished", file=sys.stderr)
        raise SystemExit(130) from None


def _overrides_first(arguments: Sequence[str]) -> list[str]:
    """Move key=value behind the command: an option before it would take it as its own value."""
    overrides = [a for a in arguments if a[0:1] == "~" or ("=" in a and a[0:1] != "-")]
    others = [a for a in arguments if a not in overrides]
    return [*others[:1], *overrides, *others[1:]]


def parser() -> argparse.ArgumentParser:
    """One function per subcommand sets its options and the function to run."""
    top = argparse.ArgumentParser(prog="dynmoe-bench", description="Measure dynmoe's speed.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_layer(commands)
    _add_step(commands)
    _add_data(commands)
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


def _add_layer(commands: Subparsers) -> None:
    p = commands.add_parser(
        "layer",
        help="one MoE layer beside a dense FFN and other dispatches",
        description=LAYER,
        epilog="cases, the limit always runs:\n" + _listed(plan.CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=layer)
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


STEP = """\
Time whole training steps (forward, loss, backward, AdamW) and inference of a backbone with MoE
layers in every second block, in turns with the dense backbone. DynMoE's thresholds are fitted so
that a token activates k experts on average; the learning rate is 0, the same arithmetic, so that
they stay there. Images are noise, the optimizer is fused AdamW. The default is DeiT-Ti at 64 px
with 8 experts. Of dynmoe-run's settings backbone.*, moe.* and runtime.* count: backbone=vit_small,
moe.layers=[8,10], ..."""
STEP_NOTE = """\
ideal: FLOPs of the dense model over those of the case, whose FFNs count k times, routers included.
used: parameters that a token activates. Inference is of compact layers; a token that no expert
serves takes its best one there. disturbed: samples during which other processes were busy."""


def _add_step(commands: Subparsers) -> None:
    p = commands.add_parser(
        "step",
        help="whole training steps and inference beside the dense model",
        description=STEP,
        epilog="cases, dense always runs:\n" + _listed(plan.STEP_CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=step)
    add = p.add_argument
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, as in dynmoe-run")
    add(
        "--k",
        nargs="+",
        type=float,
        default=[1.0, 1.5, 2.0],
        metavar="K",
        help="mean experts per token in training (default: 1 1.5 2)",
    )
    add("--only", nargs="+", default=plan.STEP_DEFAULT, metavar="CASE", help="see below")
    add("--mode", choices=["train", "inference", "both"], default="both", help="default: both")
    add("--batch", type=_positive, default=32, metavar="N", help="images (default: 32)")
    add(
        "--dtype",
        choices=["fp32", "amp"],
        default="fp32",
        help="amp: fp32 weights under bf16 autocast (default: fp32)",
    )
    _add_timing(p)
    _add_json(p, "step")
    _add_baseline(p)


DATA = """\
Time the training loader alone: images per second, with nobody waiting for a model. CPU time is of
this process and its workers. The settings are those of dynmoe-run, such as data=pacs
data.root=FOLDER."""


def _add_data(commands: Subparsers) -> None:
    p = commands.add_parser(
        "data",
        help="the training loader",
        description=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=data)
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


def _listed(cases: dict[str, str]) -> str:
    return "\n".join(f"  {name:17}{text}" for name, text in cases.items())


def _add_timing(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--threads", type=_positive, metavar="N", help="default: PyTorch's")
    text = "samples of each case (default: 15)"
    p.add_argument("--rounds", type=_positive, default=15, metavar="N", help=text)


def _add_json(p: argparse.ArgumentParser, command: str) -> None:
    text = f"default: outputs/bench/{command}-<date-time>.json"
    p.add_argument("--json", type=Path, metavar="FILE", help=text)


def _add_baseline(p: argparse.ArgumentParser) -> None:
    text = "compare with the --json file of another run"
    p.add_argument("--baseline", type=Path, metavar="FILE", help=text)


def layer(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: what was asked for cannot be measured or compared; nothing has run then.
    """
    plan.check(args.shape, args.k, args.only)
    file = File(args.json, "layer")

    from dynmoe import runtime
    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.measure import measure
    from dynmoe.benchmark.rows import LayerRow

    device = _device(args)
    settings = runtime.settle(
        {
            "matmul_precision": args.matmul_precision,
            "malloc": args.malloc,
            "fused_attention": "auto",
        },
        device.type,
    )
    del settings["fused_attention"]  # a layer has no attention
    conditions = results.Conditions(results.machine_facts(device, args.dtype), settings, {})
    baseline: list[LayerRow] = []
    if args.baseline:
        old, baseline = results.read(args.baseline, LayerRow)
        results.check_equal(old.machine | old.settings, conditions.machine | settings)
    file.make_folder()

    console, rows = _console(), list[LayerRow]()
    plans = [(shape, k) for shape in args.shape for k in args.k]
    with _progress(console) as progress:
        for done, (shape, k) in enumerate(plans, 1):
            advance = _bar(progress, f"shape {shape.name}, k {k:g} ({done}/{len(plans)})")
            rows += measure(shape, k, args.only, args.rounds, args.dtype, device, advance)
            file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_layers(rows):
        console.print(table)
    console.print(LAYER_NOTE + "\n")
    console.print(tables.of_summary(rows))
    if args.baseline:
        console.print(_changes(baseline, rows))
    console.print(f"Written to {file.path}")


def step(args: argparse.Namespace) -> None:
    """Measure, print the tables, write the file.

    Raises:
        ConfigError: what was asked for cannot be measured or compared; nothing has run then.
    """
    from dynmoe.benchmark import configured

    cfg = configured.configuration(args.overrides, configured.STEP_DEFAULTS)
    cases = plan.step_cases(args.only, args.k, cfg.moe.num_experts)
    file = File(args.json, "step")

    import torch

    from dynmoe import runtime
    from dynmoe.benchmark import models, results, steps, tables
    from dynmoe.benchmark.rows import StepRow

    device = _device(args)
    settings = runtime.settle(cfg.runtime, device.type)
    dense = models.build_dense(cfg, device)
    runtime.set_fused_attention(dense, settings["fused_attention"])
    layers = models.moe_blocks(cfg, dense, given="moe.layers" in configured.keys(args.overrides))
    workload = models.facts(cfg, layers, args.batch)
    conditions = results.Conditions(results.machine_facts(device, args.dtype), settings, workload)
    baseline: list[StepRow] = []
    if args.baseline:
        old, baseline = results.read(args.baseline, StepRow)
        results.check_equal(old.machine | old.workload, conditions.machine | workload)
    amp = args.dtype == "amp"
    batches = steps.random_batches(
        args.batch, models.CHANNELS, cfg.backbone.image_size, models.CLASSES, device
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        built = models.build_models(cfg, dense, layers, cases, args.k, batches[0].images)
    file.make_folder()
    console, rows = _console(), list[StepRow]()
    with _progress(console) as progress:
        # Inference comes last: it makes the layers compact.
        for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
            advance, weight = _bar(progress, mode), cfg.moe.aux_weight
            rows += steps.measure_steps(mode, built, batches, weight, amp, args.rounds, advance)
            file.write(conditions, rows)
    console.print(str(conditions))
    for table in tables.of_steps(rows):
        console.print(table)
    console.print(STEP_NOTE + "\n")
    if args.baseline:
        differing = results.differences(old.settings, settings)
        console.print("Settings that differ from the baseline's:", ", ".join(differing) or "none")
        console.print(_changes(baseline, rows))
    console.print(f"Written to {file.path}")


def data(args: argparse.Namespace) -> None:
    """Measure, print the table, write the file.

    Raises:
        UserError: a wrong configuration, or data that cannot be read; nothing has run then.
    """
    from dynmoe.benchmark import configured

    cfg = configured.configuration(args.overrides, configured.DATA_DEFAULTS)
    file = File(args.json, "data")

    import torch

    from dynmoe.benchmark import results, tables
    from dynmoe.benchmark.loader import ENDLESS, measure_loader
    from dynmoe.benchmark.rows import DataRow

    cfg.data.steps = cfg.data.eval_every = ENDLESS
    rows: list[DataRow] = []
    for workers in args.workers or [cfg.data.workers]:
        cfg.data.workers = workers
        module = configured.built(cfg.data)
        module.setup()
        file.make_folder()
        rows.append(measure_loader(module, args.seconds))
        workload = {
            "data": cfg.data.name,
            "image_size": cfg.data.image_size,
            "batch": cfg.data.batch_size * len(module.train_envs),
        }
        machine = results.machine_facts(torch.device("cpu"), "fp32")
        conditions = results.Conditions(machine, {}, workload)
        file.write(conditions, rows)
    console = _console()
    console.print(str(conditions))
    console.print(tables.of_loaders(rows))
    console.print(f"Written to {file.path}")


def _changes(baseline: Sequence[Any], rows: Sequence[Any]) -> Any:
    from dynmoe.benchmark import results, tables

    changes = results.compare(baseline, rows)
    return tables.of_changes(changes) if changes else "The baseline has none of these measurements."


class File:
    """The --json file of one run, written again after each part: an interrupted run leaves some.

    Raises:
        ConfigError: it cannot be written there.
    """

    def __init__(self, given: Path | None, command: str) -> None:
        now = datetime.now()
        self.path = given or Path(f"outputs/bench/{command}-{now:%Y%m%d-%H%M%S}.json")
        self._date = f"{now:%Y-%m-%d %H:%M:%S}"
        if self.path.is_dir():
            raise ConfigError(f"--json {self.path}: expected a file to write, this is a folder")

    def make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise ConfigError(f"--json {self.path}: cannot be written ({error})") from None

    def write(self, conditions: Conditions, rows: Sequence[object]) -> None:
        from dynmoe.benchmark import results

        results.write(self.path, sys.argv, self._date, conditions, rows)


def _device(args: argparse.Namespace) -> torch.device:
    """The device to measure; sets the number of threads."""
    # Its profiler, which counts allocations, reports every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width, and the tables are wider than rich's 80
    return console


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=console, transient=True)


def _bar(progress: Progress, text: str) -> Callable[[int, int], None]:
    """A bar, the only one; it is told what is done, of how much."""
    for task in progress.task_ids:
        progress.remove_task(task)
    bar = progress.add_task(text, total=None)
    return lambda done, total: progress.update(bar, completed=done, total=total)


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


if __name__ == "__main__":
    main()
