"""``dynmoe-bench step`` and ``generate``: whole models, timed interleaved on the same batches."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from dynmoe import runtime
from dynmoe.backbones.deploy import compact_layers
from dynmoe.benchmark import against, results, timing
from dynmoe.benchmark.against import Build
from dynmoe.benchmark.candidates import Candidate, groups, keys, modality
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
from dynmoe.benchmark.options import GENERATE_NOTE, RUNS_NOTE, STEP_NOTE, TEXT_NOTE, models_of
from dynmoe.benchmark.results import PEAK, RATIO, ROUNDS, Column, Row
from dynmoe.data.vl.batches import QuestionBatch
from dynmoe.layers import MoELayer, moe_layers, record_routing
from dynmoe.metrics.efficiency import activated, flops

NAME = Column("case", "case"), Column("case", "setting"), Column("precision", "precision")
BESIDE = *RATIO, Column("of {first}", "precision_ratio", ".2f"), *against.COLUMNS
STEP_COLUMNS = (
    *NAME,
    Column("mean k", "mean_k", ".3f"),
    Column("samples/s", "samples_per_s"),
    Column("quartiles", "samples_per_s_quartiles"),
    Column("tokens/s", "tokens_per_s"),
    Column("ms", "median_ms"),
    *BESIDE,
    Column("ideal", "ideal", ".2f"),
    Column("of\nideal", "of_ideal", ".2f"),
    Column("params\nM", "parameters", unit=1e6),
    Column("used,\nM", "activated", unit=1e6),
    PEAK,
    *ROUNDS,
)
STEP_RULES = results.BaselineRules(
    ("mode", "case", "precision"),
    ("mode", "case", "precision"),
    lambda row: results.Compared("samples_per_s", "samples_per_s_quartiles", "{:.4g} samples/s"),
)
GENERATE_COLUMNS = (
    *NAME,
    Column("tokens/s", "tokens_per_s"),
    Column("quartiles", "tokens_per_s_quartiles"),
    *BESIDE,
    Column("ideal", "ideal", ".2f"),
    Column("of\nideal", "of_ideal", ".2f"),
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
    machine = timing.machine_facts(device, ", ".join(args.precision))
    is_step, baseline = args.command == "step", None
    together = _groups(args, cfg, cases, found, settings["fused_attention"], device)
    if is_step and not found and args.baseline:
        group = next(together)
        together = iter([group])
        baseline = results.Baseline(args.baseline, STEP_RULES)
        baseline.require(results.Conditions(machine, settings, group.facts), "machine", "workload")
    build = Build(args.against, __name__, args) if args.against else None
    facts = []
    with output.progress() as new_bar:
        for group in together:
            facts.append(group.facts)
            conditions = results.Conditions(machine, settings, merged(facts))
            for mode in _modes(args):
                how = args.rounds, new_bar(f"{group.name}, {mode}"), build
                if is_step:
                    rows = measure_steps(mode, group.models, group.batches, *how)
                else:
                    rows = measure_generation(group.models, group.batches, args.new_tokens, *how)
                output.add(rows, conditions)
    if build:
        build.close()
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
    if build:
        parts.append(build.note())
    output.show(*parts)


def elsewhere(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cases of each table, for the process of another build."""
    cfg, cases, found = models_of(args)
    device = timing.device_of(args)
    fused_attention = runtime.apply(cfg.runtime, device.type)["fused_attention"]
    for group in _groups(args, cfg, cases, found, fused_attention, device):
        for mode in _modes(args):
            if mode == "answers":
                yield answers_of(group.models, group.batches, args.new_tokens)
            else:
                yield steps_of(mode, group.models, group.batches)


def _modes(args: argparse.Namespace) -> list[str]:
    """Inference after training: it makes the layers compact."""
    if args.command == "generate":
        return ["answers"]
    return ["train", "inference"] if args.mode == "both" else [args.mode]


def _groups(
    args: argparse.Namespace,
    cfg: DictConfig,
    cases: Sequence[str],
    found: Sequence[Candidate],
    fused_attention: bool,
    device: torch.device,
) -> Iterator[Group]:
    if found:
        return _trained_groups(args, found, fused_attention, device)
    return iter([_fresh_group(args, cfg, cases, fused_attention, device)])


def _fresh_group(
    args: argparse.Namespace,
    cfg: DictConfig,
    cases: Sequence[str],
    fused_attention: bool,
    device: torch.device,
) -> Group:
    given_layers = "moe.layers" in keys(args.overrides)
    data = None if modality(cfg) == "image" else data_of(cfg)
    work = noise(cfg, device) if data is None else of_data(cfg, data, device)
    batches: Sequence[Any] = work.batches
    asks = data is not None and args.command == "generate"
    if data is not None and asks:  # thresholds are still fitted on training batches
        batches = question_batches(data, device)
        facts = question_facts(batches, args.new_tokens)
        work = work._replace(facts={"data": data.name, **facts})
    models, facts = fresh(cfg, work, cases, args.k, given_layers, fused_attention, args.precision)
    outside: dict[tuple[Any, ...], float] = {}  # all models are copies of one
    for each in models:
        if asks:
            precision, setting = each.identity["precision"], each.identity["case"]
            identity = {"run": "", "problem": facts["data"], "setting": setting}
            each.identity = {**identity, "environment": "", "precision": precision}
        else:
            converted = [each.precision.convert_input(batch) for batch in batches]
            each.costs = costs_of_sample(each.model, converted, outside)
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
        data.restore(members[0].run.folder.path)
        batches: list[Any] = []
        if args.command == "generate":
            batches = question_batches(data, device)
            facts = question_facts(batches, args.new_tokens)
        else:
            batches = training_batches(data, device, members[0].cfg)
            facts = {"batch": max(len(batch.label) for batch in batches), **token_facts(batches)}
        models = trained(members, data, fused_attention, device, *args.precision)
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
    precision: Precision

    def __post_init__(self) -> None:
        MoELayer.warns_of_still_state = False  # k is to stay the same
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._next = cycle(self.batches)

    def forward(self, batch: LabelledBatch) -> timing.Outputs:
        with self.precision.forward_context():
            return (self.loss(self.precision.convert_input(batch)),)

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

    def __init__(
        self, model: nn.Module, batches: Sequence[LabelledBatch], precision: Precision
    ) -> None:
        self.model = deployed(model)
        self.precision = precision
        self._next = cycle(batches)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        batch = next(self._next)
        with self.precision.forward_context():
            logits: Tensor = self.model(*self.precision.convert_input(batch).inputs)
        return logits


def deployed(model: nn.Module) -> nn.Module:
    """Put the model in evaluation mode and make its MoE layers compact, for good."""
    compact_layers(model)
    return model.eval()


def measure_steps(
    mode: str,
    models: Sequence[TimedModel],
    batches: Sequence[LabelledBatch],
    rounds: int,
    advance: results.Advance,
    build: Build | None = None,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The ``mode`` "inference" changes the models for good, so measure "train" before it.

    Its own fields: ``mode``; ``batch``, samples of the largest batch; ``mean_k``, experts per
    token, the mean over MoE layers and batches, None without them; ``peak_bytes`` of a training
    step beyond weights and optimizer state; ``tokens_per_s`` of texts, padding left out. With
    ``costs`` also ``ideal``, FLOPs of the reference over FLOPs of the model, None where they cannot
    be counted; ``of_ideal``, ``ratio`` over it; ``parameters``, and those ``activated`` per token.
    And those of ``_beside``.
    """
    device, whole, tokens = batches[0].label.device, calls_of_sample(batches), tokens_of(batches)
    sizes = [len(batch.label) for batch in batches]
    cases, reference = steps_of(mode, models, batches), models[0]
    others = build.next_cases() if build else {}
    samples = timing.interleave({**cases, **others}, rounds, device, reference.name, advance, whole)
    rows = []
    for each in models:
        case = cases[each.name]
        k = mean_k(each, batches)
        row = {
            **each.identity,
            "mode": mode,
            "batch": max(sizes),
            "mean_k": fmean(k.values()) if k else None,
            "reference": reference.name,
            **timing.speed(
                samples[each.name], samples[reference.name], fmean(sizes), "samples_per_s"
            ),
            **_beside(each, samples),
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


def steps_of(
    mode: str, models: Sequence[TimedModel], batches: Sequence[LabelledBatch]
) -> dict[str, Training | Inference]:
    """Return the cases by the names of the models."""
    return {
        each.name: Training(each.model, each.loss, each.new_optimizer(), batches, each.precision)
        if mode == "train"
        else Inference(each.model, batches, each.precision)
        for each in models
    }


def _beside(each: TimedModel, samples: Mapping[str, Sequence[timing.Sample]]) -> Row:
    """Return ``against.ratios``; of several precisions the ``first`` and ``precision_ratio``, speed
    over that of the same case in it, in the same round."""
    row = against.ratios(samples, each.name)
    if each.first is not None:
        precision, name = each.first
        row |= {
            "first": precision,
            "precision_ratio": timing.paired(samples[name], samples[each.name]).median,
        }
    return row


@torch.no_grad()
def mean_k(each: TimedModel, batches: Sequence[LabelledBatch]) -> dict[str, float]:
    """Return the experts per token of each MoE layer, over all batches."""
    with record_routing(each.model) as tape, each.precision.forward_context():
        for batch in batches:
            each.model(*each.precision.convert_input(batch).inputs)
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
    precision: Precision

    def __post_init__(self) -> None:
        self._next = cycle(self.batches)

    def __call__(self) -> Tensor:
        return self.of(next(self._next))

    def of(self, batch: QuestionBatch) -> Tensor:
        tokens = self.precision.convert_input(batch.tokens)
        with self.precision.forward_context():
            ids_BN: Tensor = self.model.generate(tokens, self.new_tokens, exactly=True)
        return ids_BN

    def peak_bytes(self) -> int:
        """Return the peak of the largest batch beyond the weights."""
        batch = largest(self.batches)
        return timing.peak_and_kept(
            lambda: (self.of(batch),), lambda _: None, batch.label.device
        ).peak

    def routed(self) -> tuple[dict[str, float], float | None]:
        """Return the experts per token of the questions' text (``prompt``), of their images
        (``image``) and of the answers (``answer``), the mean over MoE layers, empty without them;
        and the FLOPs of all batches beyond those of the dense model, None where a router does not
        know its own.

        Dense FFNs and routers compute padding too.
        """
        pairs, tokens, beyond = Counter[str](), Counter[str](), 0.0
        layers = moe_layers(self.model)
        routers = {name: layer.router.flops(layer.dim) for name, layer in layers.items()}
        for batch in self.batches:
            with record_routing(self.model) as tape:
                self.of(batch)
            real_BN, image_BN = batch.tokens["attention_mask"].bool(), batch.tokens["image_mask"]
            parts = {"prompt": real_BN & ~image_BN, "image": image_BN}
            for name, (question, *said) in tape.items():
                for part, part_BN in parts.items():
                    pairs[part] += int(question.mask[part_BN].sum())
                    tokens[part] += int(part_BN.sum())
                pairs["answer"] += sum(int(call.mask.sum()) for call in said)
                tokens["answer"] += sum(int(call.stats.k_hist.sum()) for call in said)
                weights = layers[name].experts.slots[0].parameters()
                ffn = 2 * sum(w.numel() for w in weights if w.ndim == 2)
                each, fixed = routers[name] or (0, 0)
                for mask in (question.mask, *(call.mask for call in said)):
                    positions, experts = mask[..., 0].numel(), mask.shape[-1]
                    beyond += ffn * (int(mask.sum()) - positions)
                    beyond += (each * experts + fixed) * positions
        k = {part: pairs[part] / count for part, count in tokens.items() if count}
        return k, None if None in routers.values() else beyond

    def flops(self) -> float:
        """Return the FLOPs of all batches, counted in a run."""
        with FlopCounterMode(display=False) as counter:
            for batch in self.batches:
                self.of(batch)
        return counter.get_total_flops()


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


FIRST = "first token of {}"


def answers_of(
    models: Sequence[TimedModel], batches: Sequence[QuestionBatch], new_tokens: int
) -> dict[str, Answers]:
    """Return the cases by the names of the models, and those up to the ``FIRST`` token. The models
    are ``deployed`` for good."""
    cases = {}
    for each in models:
        model = deployed(each.model)
        cases[each.name] = Answers(model, batches, new_tokens, each.precision)
        cases[FIRST.format(each.name)] = Answers(model, batches, 1, each.precision)
    return cases


def measure_generation(
    models: Sequence[TimedModel],
    batches: Sequence[QuestionBatch],
    new_tokens: int,
    rounds: int,
    advance: results.Advance,
    build: Build | None = None,
) -> list[Row]:
    """Return a row for each of the ``models``, the first of which is the reference.

    The time up to the first new token is measured by itself, in the same rounds. The models are
    ``deployed`` for good.

    Its own fields: ``batch``, questions answered at once; ``new_tokens`` of each answer;
    ``prompt_ms`` and ``prompt_quartiles_ms`` of a batch up to the first new token; ``token_ms`` of
    a batch for each further token, the difference of the two medians; ``mean_k`` by part;
    ``ideal``, FLOPs of a dense reference over FLOPs of the model, ``of_ideal``, ``ratio`` over it;
    ``peak_bytes`` beyond the weights; and those of ``_beside``.
    """
    device, whole = batches[0].label.device, calls_of_sample(batches)
    sizes = [len(batch.label) for batch in batches]
    cases, reference = answers_of(models, batches, new_tokens), models[0].name
    others = build.next_cases() if build else {}
    samples = timing.interleave({**cases, **others}, rounds, device, reference, advance, whole)
    dense = None if moe_layers(models[0].model) else cases[reference].flops()
    rows = []
    for each in models:
        answers, first = cases[each.name], FIRST.format(each.name)
        k, beyond = answers.routed()
        ideal = None if dense is None or beyond is None else dense / (dense + beyond)
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
                **_beside(each, samples),
                "prompt_ms": 1e3 * prompt.median,
                "prompt_quartiles_ms": (1e3 * prompt.low, 1e3 * prompt.high),
                "token_ms": (times["median_ms"] - 1e3 * prompt.median) / (new_tokens - 1),
                "mean_k": k,
                "ideal": ideal,
                "of_ideal": None if ideal is None else times["ratio"] / ideal,
                "peak_bytes": answers.peak_bytes(),
            }
        )
    return rows
