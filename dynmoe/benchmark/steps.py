"""``dynmoe-bench step`` and ``generate``: whole models, timed interleaved on the same batches."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from dynmoe.benchmark import results, timing
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
from dynmoe.benchmark.results import PEAK, RATIO, ROUNDS, Column, Row
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
STEP_RULES = results.BaselineRules(
    ("mode", "case"),
    ("mode", "case"),
    lambda row: results.Compared("samples_per_s", "samples_per_s_quartiles", "{:.4g} samples/s"),
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
    """Models that are timed interleaved, on the same batches."""

    name: str
    models: list[TimedModel]
    batches: Sequence[Any]
    facts: results.Facts


def run(
    args: argparse.Namespace,
    output: results.Output,
    cfg: DictConfig,
    cases: Sequence[str],
    found: Sequence[Candidate],
) -> None:
    """Measure the ``cases`` of a configuration or the runs ``found``, print and write the rows.

    Raises:
        UserError: a model, data or baseline that does not fit; nothing has run then.
    """
    device = timing.device_of(args)
    settings = runtime.apply(cfg.runtime, device.type)
    dtype = DTYPES[cfg.trainer.precision] if found else args.dtype
    machine, amp = timing.machine_facts(device, dtype), dtype == "amp"
    is_step, baseline = args.command == "step", None
    if found:
        together = _trained_groups(args, found, settings["fused_attention"], device)
    else:
        group = _fresh_group(args, cfg, cases, settings["fused_attention"], device)
        together = iter([group])
        if is_step and args.baseline:
            baseline = results.Baseline(args.baseline, STEP_RULES)
            baseline.require(
                results.Conditions(machine, settings, group.facts), "machine", "workload"
            )
    modes = [args.mode] if is_step else ["answers"]
    if modes == ["both"]:
        modes = ["train", "inference"]  # in this order: inference makes the layers compact
    facts = []
    with output.progress() as new_bar:
        for group in together:
            facts.append(group.facts)
            conditions = results.Conditions(machine, settings, merged(facts))
            for mode in modes:
                how = amp, args.rounds, new_bar(f"{group.name}, {mode}")
                if is_step:
                    rows = measure_steps(mode, group.models, group.batches, *how)
                else:
                    rows = measure_generation(group.models, group.batches, args.new_tokens, *how)
                output.add(rows, conditions)
    by = "problem", "mode", "reference"
    if is_step:
        title = "{problem}: {mode}, batch {batch}" if found else "{mode}"
        parts: list[Any] = [*results.tables(output.rows, by, title, STEP_COLUMNS)]
        parts.append((RUNS_NOTE if found else STEP_NOTE) + "\n")
        if not found and modality(cfg) != "image":
            parts.append(TEXT_NOTE + "\n")
    else:
        title = "{problem}: {batch} questions at once, {new_tokens} new tokens each"
        parts = [*results.tables(output.rows, by, title, GENERATE_COLUMNS), GENERATE_NOTE + "\n"]
    if baseline:
        differing = results.differences(baseline.conditions.settings, settings)
        shown = ", ".join(differing) or "none"
        parts += [f"Settings that differ from the baseline's: {shown}", baseline.table(output.rows)]
    output.show(*parts)


def _fresh_group(
    args: argparse.Namespace,
    cfg: DictConfig,
    cases: Sequence[str],
    fused_attention: bool,
    device: torch.device,
) -> Group:
    given_layers, amp = "moe.layers" in keys(args.overrides), args.dtype == "amp"
    data = None if modality(cfg) == "image" else data_of(cfg)
    work = noise(cfg, device) if data is None else of_data(cfg, data, device)
    batches: Sequence[Any] = work.batches
    asks = data is not None and args.command == "generate"
    if data is not None and asks:  # thresholds are still fitted on training batches
        batches = question_batches(data, device)
        facts = question_facts(batches, args.new_tokens)
        work = work._replace(facts={"data": data.name, **facts})
    models, facts = fresh(cfg, work, cases, args.k, given_layers, fused_attention, amp)
    outside: dict[tuple[Any, ...], float] = {}  # all models are copies of one
    for each in models:
        if asks:
            identity = {"run": "", "problem": facts["data"], "setting": each.name}
            each.identity = {**identity, "environment": ""}
        else:
            each.costs = costs_of_sample(each.model, batches, outside)
    return Group(facts["model"], models, batches, facts)


def _trained_groups(
    args: argparse.Namespace,
    found: Sequence[Candidate],
    fused_attention: bool,
    device: torch.device,
) -> Iterator[Group]:
    """Yield one after the other, as each takes memory."""
    together = groups(found)
    for number, (problem, members) in enumerate(together, 1):
        data = data_of(members[0].cfg)
        batches: list[Any] = []
        if args.command == "generate":
            batches = question_batches(data, device)
            facts = question_facts(batches, args.new_tokens)
        else:
            batches = training_batches(data, device)
            facts = {"batch": max(len(batch.label) for batch in batches), **token_facts(batches)}
        models = trained(members, data, fused_attention, device)
        yield Group(f"{problem.dataset} ({number}/{len(together)})", models, batches, facts)


def merged(facts: Sequence[results.Facts]) -> results.Facts:
    """Return the facts of several groups in one: a value, or a list where they differ."""
    found: dict[str, list[Any]] = {}
    for each in facts:
        for key in dict.fromkeys(key for every in facts for key in every):
            if each.get(key) not in found.setdefault(key, []):
                found[key].append(each.get(key))
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


@dataclass
class Training:
    """Calls are optimizer steps: forward with its loss, backward, optimizer, zero_grad.

    The learning rate becomes 0: the same arithmetic, but the routing stays the same.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor]
    optimizer: Optimizer
    batches: Sequence[LabelledBatch]
    amp: bool

    def __post_init__(self) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._next = cycle(self.batches)

    def forward(self, batch: LabelledBatch) -> timing.Outputs:
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            return (self.loss(batch),)

    def backward(self, outputs: timing.Outputs) -> None:
        outputs[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.backward(self.forward(next(self._next)))

    def peak_bytes(self, batch: LabelledBatch) -> int:
        """Return the peak of a step beyond weights and optimizer state."""
        forward = partial(self.forward, batch)
        return timing.peak_and_kept(forward, self.backward, batch.label.device).peak


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
    advance: results.Advance,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The ``mode`` "inference" changes the models for good, so measure "train" before it.

    Its own fields: ``mode``; ``batch``, samples of the largest batch; ``mean_k``, experts per
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
    samples = timing.interleave(cases, rounds, device, reference.name, advance, whole)
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
            **timing.speed(
                samples[each.name], samples[reference.name], fmean(sizes), "samples_per_s"
            ),
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


@dataclass
class Answers:
    """Calls answer the next batch of questions, each with exactly ``new_tokens`` tokens."""

    model: Any
    batches: Sequence[QuestionBatch]
    new_tokens: int
    amp: bool

    def __post_init__(self) -> None:
        self._next = cycle(self.batches)

    def __call__(self) -> Tensor:
        return self.of(next(self._next))

    def of(self, batch: QuestionBatch) -> Tensor:
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            ids_BN: Tensor = self.model.generate(batch.tokens, self.new_tokens, exactly=True)
        return ids_BN

    def peak_bytes(self) -> int:
        """Return the peak of the largest batch beyond the weights."""
        batch = largest(self.batches)
        return timing.peak_and_kept(
            lambda: (self.of(batch),), lambda _: None, batch.label.device
        ).peak

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


def question_facts(batches: Sequence[QuestionBatch], new_tokens: int) -> results.Facts:
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
    advance: results.Advance,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The time up to the first new token is measured by itself, in the same rounds. The models are
    ``deployed`` for good.

    Its own fields: ``batch``, questions answered at once; ``new_tokens`` of each answer;
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
    samples = timing.interleave({**answers, **firsts}, rounds, device, reference, advance, whole)
    rows = []
    for each, first in zip(models, firsts, strict=True):
        work = fmean(sizes) * new_tokens
        times = timing.speed(samples[each.name], samples[reference], work, "tokens_per_s")
        prompt = timing.Quartiles.of(timing.clean(samples[first]))
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
