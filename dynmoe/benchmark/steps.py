"""``dynmoe-bench step`` and ``generate``: whole models, timed interleaved on the same batches."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe import runtime
from dynmoe.benchmark.candidates import DTYPES, Candidate, groups, keys, modality
from dynmoe.benchmark.models import (
    BATCHES,
    LabelledBatch,
    TimedModel,
    calls_of_sample,
    costs_of_sample,
    data_of,
    fresh,
    largest,
    noise,
    of_data,
    token_facts,
    tokens_of,
    trained,
    training_batches,
)
from dynmoe.benchmark.options import GENERATE_NOTE, RUNS_NOTE, STEP_NOTE, TEXT_NOTE
from dynmoe.benchmark.results import (
    PEAK,
    RATIO,
    ROUNDS,
    Advance,
    Baseline,
    Column,
    Compared,
    Comparison,
    Conditions,
    Facts,
    Output,
    Row,
    differences,
    tables,
)
from dynmoe.benchmark.timing import (
    Outputs,
    Quartiles,
    clean,
    device_of,
    interleave,
    machine_facts,
    peak_and_kept,
    speed,
)
from dynmoe.data.vl.batches import QuestionBatch
from dynmoe.layers import moe_layers, record_routing
from dynmoe.metrics.efficiency import activated, flops

NAME = Column("case", "case"), Column("case", "setting")
STEP_COLUMNS = (
    *NAME,
    Column("mean k", "mean_k", ".3f"),
    Column("samples/s", "samples_per_s"),
    Column("quartiles", "samples_per_s_quartiles"),
    Column("tokens/s", "tokens_per_s"),
    Column("ms", "median_ms"),
    *RATIO,
    Column("ideal", "ideal", ".2f"),
    Column("of\nideal", "of_ideal", ".2f"),
    Column("params\nM", "parameters", unit=1e6),
    Column("used,\nM", "activated", unit=1e6),
    PEAK,
    *ROUNDS,
)
STEP_COMPARISON = Comparison(
    ("mode", "case"),
    ("mode", "case"),
    lambda row: Compared("samples_per_s", "samples_per_s_quartiles", "{:.4g} samples/s"),
)
GENERATE_COLUMNS = (
    *NAME,
    Column("tokens/s", "tokens_per_s"),
    Column("quartiles", "tokens_per_s_quartiles"),
    *RATIO,
    Column("prompt\nms", "prompt_ms"),
    Column("token\nms", "token_ms"),
    Column("k of\nprompt", "mean_k.prompt", ".2f"),
    Column("k of\nimage", "mean_k.image", ".2f"),
    Column("k of\nanswer", "mean_k.answer", ".2f"),
    PEAK,
    *ROUNDS,
)


class Group(NamedTuple):
    """Models that are timed interleaved."""

    name: str
    models: list[TimedModel]
    batches: Sequence[Any]
    facts: Facts


class Process(NamedTuple):
    """Settings of the process that hold for all groups of a command."""

    device: torch.device
    machine: Facts
    settings: Facts

    @property
    def amp(self) -> bool:
        return bool(self.machine["dtype"] == "amp")

    @property
    def fused_attention(self) -> bool:
        return bool(self.settings["fused_attention"])


def prepare(args: argparse.Namespace, cfg: DictConfig) -> Process:
    """Apply the device and the runtime settings of a command."""
    device = device_of(args)
    settings = runtime.apply(cfg.runtime, device.type)
    dtype = DTYPES[cfg.trainer.precision] if args.runs else args.dtype
    return Process(device, machine_facts(device, dtype), settings)


def step(
    args: argparse.Namespace,
    output: Output,
    cfg: DictConfig,
    cases: Sequence[str],
    found: Sequence[Candidate],
) -> None:
    """Measure the ``cases`` of a configuration, or the trained runs ``found``; print the tables,
    write the file.

    Raises:
        UserError: a model, data or baseline that does not fit; nothing has run then.
    """
    process, baseline = prepare(args, cfg), None
    if found:
        together, notes = _trained_steps(groups(found), process), [RUNS_NOTE]
    else:
        group = _fresh_steps(args, cfg, cases, process)
        together, notes = iter([group]), [STEP_NOTE]
        if modality(cfg) != "image":
            notes.append(TEXT_NOTE)
        if args.baseline:
            baseline = Baseline(args.baseline, STEP_COMPARISON)
            now = Conditions(process.machine, process.settings, group.facts)
            baseline.require(now, "machine", "workload")
    # Inference comes last: it makes the layers compact.
    modes = ("train", "inference") if args.mode == "both" else (args.mode,)
    facts = []
    with output.progress() as new_bar:
        for group in together:
            facts.append(group.facts)
            conditions = Conditions(process.machine, process.settings, merged(facts))
            for mode in modes:
                advance = new_bar(f"{group.name}, {mode}" if group.name else mode)
                rows = measure_steps(
                    mode, group.models, group.batches, process.amp, args.rounds, advance
                )
                output.add(rows, conditions)
    title = "{problem}: {mode}, batch {batch}" if found else "{mode}"
    parts = [*tables(output.rows, ("problem", "mode"), title, STEP_COLUMNS)]
    parts += [note + "\n" for note in notes]
    if baseline:
        differing = differences(baseline.conditions.settings, process.settings)
        shown = ", ".join(differing) or "none"
        parts += [f"Settings that differ from the baseline's: {shown}", baseline.table(output.rows)]
    output.show(*parts)


def _fresh_steps(
    args: argparse.Namespace, cfg: DictConfig, cases: Sequence[str], process: Process
) -> Group:
    if modality(cfg) == "image":
        work = noise(cfg, process.device)
    else:
        work = of_data(cfg, data_of(cfg), process.device)
    given_layers = "moe.layers" in keys(args.overrides)
    models, facts = fresh(
        cfg, work, cases, args.k, given_layers, process.fused_attention, process.amp
    )
    for each in models:
        each.costs = costs_of_sample(each.model, work.batches)
    return Group("", models, work.batches, facts)


def _trained_steps(together: Sequence[Any], process: Process) -> Iterator[Group]:
    """One after the other, as each takes memory."""
    for number, (problem, members) in enumerate(together, 1):
        data = data_of(members[0].cfg)
        batches = training_batches(data, process.device)
        models = trained(members, data, process.fused_attention, process.device)
        facts = {"batch": max(len(batch.label) for batch in batches), **token_facts(batches)}
        yield Group(f"{problem.dataset} ({number}/{len(together)})", models, batches, facts)


def merged(facts: Sequence[Facts]) -> Facts:
    """Return the facts of several groups in one: a value, or a list where they differ."""
    found = {}
    for key in dict.fromkeys(key for each in facts for key in each):
        values = list(dict.fromkeys(each.get(key) for each in facts))
        found[key] = values[0] if len(values) == 1 else values
    return found


class Training:
    """Calls are optimizer steps: forward with its loss, backward, optimizer, zero_grad.

    The learning rate becomes 0: the same arithmetic, but the routing stays the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        optimizer: Optimizer,
        batches: Sequence[LabelledBatch],
        amp: bool,
    ) -> None:
        self.model = model.train()
        self.loss = loss
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.amp = amp
        self._next = cycle(batches)

    def forward(self, batch: LabelledBatch) -> Outputs:
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            return (self.loss(batch),)

    def backward(self, outputs: Outputs) -> None:
        outputs[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.backward(self.forward(next(self._next)))

    def peak_bytes(self, batch: LabelledBatch) -> int:
        """Return the peak of a step beyond weights and optimizer state."""
        forward = partial(self.forward, batch)
        return peak_and_kept(forward, self.backward, batch.label.device).peak


class Inference:
    """Calls are forward passes of the model as one would deploy it: compact, without gradients.

    A token that no expert serves takes its best one then, so k is above that of training.
    """

    def __init__(self, model: nn.Module, batches: Sequence[LabelledBatch], amp: bool) -> None:
        self.model = deployed(model)
        self.amp = amp
        self._next = cycle(batches)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        batch = next(self._next)
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            logits: Tensor = self.model(*batch.inputs)
        return logits


def deployed(model: nn.Module) -> nn.Module:
    """Put the model in evaluation mode and make its MoE layers compact, for good."""
    for name, layer in moe_layers(model).items():
        model.set_submodule(name, layer.compact())
    return model.eval()


def measure_steps(
    mode: str,
    models: Sequence[TimedModel],
    batches: Sequence[LabelledBatch],
    amp: bool,
    rounds: int,
    advance: Advance,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The ``mode`` "inference" changes the models for good, so measure "train" before it.

    Fields of its own: ``mode``; ``batch``, samples of the largest batch; ``mean_k``, experts per
    token, the mean over MoE layers and batches, None without them; ``peak_bytes`` of a training
    step beyond weights and optimizer state; ``tokens_per_s`` of texts, padding left out. With
    ``costs`` also ``ideal``, FLOPs of the reference over FLOPs of the model, None where they cannot
    be counted; ``of_ideal``, ``ratio`` over it; ``parameters``, and those ``activated`` per token.
    """
    device, whole, tokens = batches[0].label.device, calls_of_sample(batches), tokens_of(batches)
    sizes = [len(batch.label) for batch in batches]
    cases: dict[str, Training | Inference] = {
        each.name: Training(each.model, each.loss, each.new_optimizer(), batches, amp)
        if mode == "train"
        else Inference(each.model, batches, amp)
        for each in models
    }
    reference = models[0]
    samples = interleave(cases, rounds, device, reference.name, advance, whole)
    rows = []
    for each in models:
        case = cases[each.name]
        k = mean_k(each.model, batches, amp)
        row = {
            **each.identity,
            "mode": mode,
            "batch": max(sizes),
            "mean_k": fmean(k.values()) if k else None,
            "reference": reference.name,
            **speed(samples[each.name], samples[reference.name], fmean(sizes), "samples_per_s"),
            "peak_bytes": case.peak_bytes(largest(batches)) if isinstance(case, Training) else None,
        }
        if tokens is not None:
            row["tokens_per_s"] = 1e3 * tokens / row["median_ms"]
        if each.costs is not None and reference.costs is not None:
            experts = {name: len(layer.live) for name, layer in moe_layers(each.model).items()}
            whole_flops, own = flops(reference.costs, {}, {}), flops(each.costs, experts, k)
            ideal = None if whole_flops is None or own is None else whole_flops / own
            row |= {
                "ideal": ideal,
                "of_ideal": None if ideal is None else row["ratio"] / ideal,
                "parameters": sum(p.numel() for p in each.model.parameters()),
                "activated": activated(each.costs, experts, k),
            }
        rows.append(row)
    return rows


@torch.no_grad()
def mean_k(model: nn.Module, batches: Sequence[LabelledBatch], amp: bool) -> dict[str, float]:
    """Return the experts per token of each MoE layer, over all batches."""
    with (
        record_routing(model) as tape,
        torch.autocast(batches[0].label.device.type, torch.bfloat16, enabled=amp),
    ):
        for batch in batches:
            model(*batch.inputs)
    pairs = {n: sum(int(c.stats.load_E.sum()) for c in calls) for n, calls in tape.items()}
    tokens = {n: sum(int(c.stats.k_hist.sum()) for c in calls) for n, calls in tape.items()}
    return {name: pairs[name] / tokens[name] for name in pairs}


# Generation: answers of vision-language models, token by token.


def generate(
    args: argparse.Namespace,
    output: Output,
    cfg: DictConfig,
    cases: Sequence[str],
    found: Sequence[Candidate],
) -> None:
    """Measure the ``cases`` of a configuration, or the trained runs ``found``; print the tables,
    write the file.

    Raises:
        UserError: a model or data that do not fit; nothing has run then.
    """
    process = prepare(args, cfg)
    if found:
        together = _trained_speakers(args, groups(found), process)
    else:
        together = iter([_fresh_speakers(args, cfg, cases, process)])
    facts = []
    with output.progress() as new_bar:
        for group in together:
            facts.append(group.facts)
            rows = measure_generation(
                group.models,
                group.batches,
                args.new_tokens,
                process.amp,
                args.rounds,
                new_bar(group.name),
            )
            output.add(rows, Conditions(process.machine, process.settings, merged(facts)))
    title = "{problem}: {batch} questions at once, {new_tokens} new tokens each"
    by = "problem", "reference"
    output.show(*tables(output.rows, by, title, GENERATE_COLUMNS), GENERATE_NOTE + "\n")


def _fresh_speakers(
    args: argparse.Namespace, cfg: DictConfig, cases: Sequence[str], process: Process
) -> Group:
    cfg.data.eval_batch_size = args.batch or cfg.data.eval_batch_size
    data: Any = data_of(cfg)
    work = of_data(cfg, data, process.device)  # thresholds are fitted on training batches
    questions = question_batches(data, process.device)
    work = work._replace(facts={"data": data.name, **question_facts(questions, args.new_tokens)})
    given_layers = "moe.layers" in keys(args.overrides)
    models, facts = fresh(
        cfg, work, cases, args.k, given_layers, process.fused_attention, process.amp
    )
    for each in models:
        unnamed = {"run": "", "problem": data.name, "setting": each.name, "environment": ""}
        each.identity = unnamed
    return Group(data.name, models, questions, facts)


def _trained_speakers(
    args: argparse.Namespace, together: Sequence[Any], process: Process
) -> Iterator[Group]:
    """One after the other, as each takes memory."""
    for number, (problem, members) in enumerate(together, 1):
        cfg = members[0].cfg
        cfg.data.eval_batch_size = args.batch or cfg.data.eval_batch_size
        data: Any = data_of(cfg)
        questions = question_batches(data, process.device)
        models = trained(members, data, process.fused_attention, process.device)
        facts = question_facts(questions, args.new_tokens)
        yield Group(f"{problem.dataset} ({number}/{len(together)})", models, questions, facts)


class Answers:
    """Calls answer the next batch of questions, each with exactly ``new_tokens`` tokens."""

    def __init__(
        self, model: Any, batches: Sequence[QuestionBatch], new_tokens: int, amp: bool
    ) -> None:
        self.model = model
        self.batches = batches
        self.new_tokens = new_tokens
        self.amp = amp
        self._next = cycle(batches)

    def __call__(self) -> Tensor:
        return self.of(next(self._next))

    def of(self, batch: QuestionBatch) -> Tensor:
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            ids_BN: Tensor = self.model.generate(batch.tokens, self.new_tokens, exactly=True)
        return ids_BN

    def peak_bytes(self) -> int:
        """Return the peak of the largest batch beyond the weights."""
        batch = largest(self.batches)
        return peak_and_kept(lambda: (self.of(batch),), lambda _: None, batch.label.device).peak

    def mean_k(self) -> dict[str, float]:
        """Return the experts per token of the questions' text (``prompt``), of their images
        (``image``) and of the answers (``answer``), the mean over MoE layers; empty without them.
        """
        pairs, tokens = Counter[str](), Counter[str]()
        for batch in self.batches:
            with record_routing(self.model) as tape:
                self.of(batch)
            real_BN, image_BN = batch.tokens["attention_mask"].bool(), batch.tokens["image_mask"]
            parts = {"prompt": real_BN & ~image_BN, "image": image_BN}
            for question, *said in tape.values():
                for part, part_BN in parts.items():
                    pairs[part] += int(question.mask[part_BN].sum())
                    tokens[part] += int(part_BN.sum())
                pairs["answer"] += sum(int(call.mask.sum()) for call in said)
                tokens["answer"] += sum(int(call.stats.k_hist.sum()) for call in said)
        return {part: pairs[part] / count for part, count in tokens.items() if count}


def question_batches(data: Any, device: torch.device) -> list[QuestionBatch]:
    """Return batches of the set that is reported, from its longest questions to its shortest.

    Raises:
        UserError: data that cannot be read.
    """
    data.setup("validate")
    loader: Any = data.val_dataloader()
    reported = data.env_names[data.test_envs[0]]
    chosen = [batch for batch in loader.batch_sampler if batch[0].source == reported]
    chosen = chosen[:: math.ceil(len(chosen) / BATCHES)]
    batches = (loader.collate_fn(loader.dataset.__getitems__(batch)) for batch in chosen)
    return [move_data_to_device(batch, device) for batch in batches]


def question_facts(batches: Sequence[QuestionBatch], new_tokens: int) -> Facts:
    """Return the work that all models do; ``question_tokens`` is the mean, patches included."""
    sizes = [len(batch.label) for batch in batches]
    tokens = round((tokens_of(batches) or 0) / fmean(sizes), 1)
    return {"batch": max(sizes), "question_tokens": tokens, "new_tokens": new_tokens}


def measure_generation(
    models: Sequence[TimedModel],
    batches: Sequence[QuestionBatch],
    new_tokens: int,
    amp: bool,
    rounds: int,
    advance: Advance,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The time up to the first new token is measured by itself, in the same rounds. The models are
    ``deployed`` for good.

    Fields of its own: ``batch``, questions answered at once; ``new_tokens`` of each answer;
    ``prompt_ms`` and ``prompt_quartiles_ms`` of a batch up to the first new token; ``token_ms`` of
    a batch for each further token, the difference of the two medians; ``mean_k`` by part; and
    ``peak_bytes`` beyond the weights.
    """
    device, whole = batches[0].label.device, calls_of_sample(batches)
    sizes = [len(batch.label) for batch in batches]
    answers, firsts = dict[str, Answers](), dict[str, Answers]()
    for each in models:
        model = deployed(each.model)
        answers[each.name] = Answers(model, batches, new_tokens, amp)
        firsts[f"first token of {each.name}"] = Answers(model, batches, 1, amp)
    reference = models[0].name
    samples = interleave({**answers, **firsts}, rounds, device, reference, advance, whole)
    rows = []
    for each, first in zip(models, firsts, strict=True):
        work = fmean(sizes) * new_tokens
        times = speed(samples[each.name], samples[reference], work, "tokens_per_s")
        prompt = Quartiles.of(clean(samples[first]))
        rows.append(
            {
                **each.identity,
                "batch": max(sizes),
                "new_tokens": new_tokens,
                "reference": reference,
                **times,
                "prompt_ms": 1e3 * prompt.median,
                "prompt_quartiles_ms": (1e3 * prompt.low, 1e3 * prompt.high),
                "token_ms": (times["median_ms"] - 1e3 * prompt.median) / (new_tokens - 1),
                "mean_k": answers[each.name].mean_k(),
                "peak_bytes": answers[each.name].peak_bytes(),
            }
        )
    return rows
