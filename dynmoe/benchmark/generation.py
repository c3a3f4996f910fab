"""Answers of vision-language models to questions, token by token, measured in turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from dynmoe.benchmark.results import Facts, GenerationRow
from dynmoe.benchmark.steps import deployed
from dynmoe.benchmark.timing import Quartiles, Speed, clean, interleave, peak_and_kept
from dynmoe.benchmark.workload import BATCHES, calls_of_sample, largest, tokens_of
from dynmoe.data.vl.batches import QuestionBatch
from dynmoe.layers import record_routing

if TYPE_CHECKING:
    from dynmoe.data.vl.module import VisionLanguageData


class Speaker(NamedTuple):
    """A model that answers. ``run`` and ``environment`` are empty unless it was trained."""

    setting: str
    model: Any
    run: str = ""
    environment: str = ""


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
        """Of the largest batch, beyond the weights."""
        batch = largest(self.batches)
        return peak_and_kept(lambda: (self.of(batch),), lambda _: None, batch.label.device).peak

    def mean_k(self) -> dict[str, float]:
        """Experts per token of the questions' text and images and of the answers, the mean over MoE
        layers; empty without them."""
        pairs, tokens = Counter[str](), Counter[str]()
        for batch in self.batches:
            with record_routing(self.model) as tape:
                self.of(batch)
            real_BN, image_BN = batch.tokens["attention_mask"].bool(), batch.tokens["image_mask"]
            parts = {"prompt": real_BN & ~image_BN, "image": image_BN}
            for question, *said in tape.values():
                for part, of_BN in parts.items():
                    pairs[part] += int(question.mask[of_BN].sum())
                    tokens[part] += int(of_BN.sum())
                pairs["answer"] += sum(int(call.mask.sum()) for call in said)
                tokens["answer"] += sum(int(call.stats.k_hist.sum()) for call in said)
        return {part: pairs[part] / count for part, count in tokens.items() if count}


def question_batches(data: VisionLanguageData, device: torch.device) -> list[QuestionBatch]:
    """Batches of the set that is reported, from its longest questions to its shortest.

    Raises:
        UserError: data that cannot be read.
    """
    data.setup("validate")
    loader: Any = data.val_dataloader()
    reported = data.env_names[data.test_envs[0]]
    keys = [batch for batch in loader.batch_sampler if batch[0].source == reported]
    chosen = keys[:: math.ceil(len(keys) / BATCHES)]
    batches = (loader.collate_fn(loader.dataset.__getitems__(batch)) for batch in chosen)
    return [move_data_to_device(batch, device) for batch in batches]


def question_facts(batches: Sequence[QuestionBatch], new_tokens: int) -> Facts:
    """What all models do; ``question_tokens`` is the mean, patches included."""
    sizes = [len(batch.label) for batch in batches]
    tokens = round((tokens_of(batches) or 0) / fmean(sizes), 1)
    return {"batch": max(sizes), "question_tokens": tokens, "new_tokens": new_tokens}


def measure_generation(
    problem: str,
    speakers: Sequence[Speaker],
    batches: Sequence[QuestionBatch],
    new_tokens: int,
    amp: bool,
    rounds: int,
    advance: Callable[[int, int], None],
) -> list[GenerationRow]:
    """A row for each of the ``speakers``, the first of which is the reference.

    The time up to the first new token is measured by itself, in the same turns. The models are
    ``deployed`` for good.
    """
    device, whole = batches[0].label.device, calls_of_sample(batches)
    size = fmean(len(batch.label) for batch in batches)
    answers, firsts = dict[str, Answers](), dict[str, Answers]()
    for each in speakers:
        model = deployed(each.model)
        answers[each.setting] = Answers(model, batches, new_tokens, amp)
        firsts[f"first token of {each.setting}"] = Answers(model, batches, 1, amp)
    reference = speakers[0].setting
    samples = interleave({**answers, **firsts}, rounds, device, reference, advance, whole)
    rows = []
    for each, first in zip(speakers, firsts, strict=True):
        own, case = samples[each.setting], answers[each.setting]
        speed = Speed.of(own, samples[reference], size * new_tokens)
        prompt = Quartiles.of(clean(samples[first]))
        rows.append(
            GenerationRow(
                run=each.run,
                problem=problem,
                setting=each.setting,
                environment=each.environment,
                batch=max(len(batch.label) for batch in batches),
                new_tokens=new_tokens,
                median_ms=speed.median_ms,
                quartiles_ms=speed.quartiles_ms,
                prompt_ms=1e3 * prompt.median,
                prompt_quartiles_ms=(1e3 * prompt.low, 1e3 * prompt.high),
                token_ms=(speed.median_ms - 1e3 * prompt.median) / (new_tokens - 1),
                tokens_per_s=speed.per_s,
                tokens_per_s_quartiles=speed.per_s_quartiles,
                reference=reference,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                mean_k=case.mean_k(),
                peak_bytes=case.peak_bytes(),
                rounds=len(own),
                contaminated=speed.contaminated,
            )
        )
    return rows
