"""Answers to a batch of questions, left-padded and cached, are those to each question alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from vl_models import BOS, IMG, MODELS, PAD, prompts, tokens, vl_model

from dynmoe.backbones.vlm import VisionLanguageModel
from dynmoe.layers import record_routing

QUESTIONS = (
    [BOS, 7, 8, 9, 4],
    [BOS, *IMG, 11, 12, 4],
    [BOS, *IMG, 13, *IMG, 14, 15, 16, 4],
    [BOS, *IMG, 17, 4],
    [BOS, 4],
)
MOST = 6
NEVER = 999


def greedy(model: VisionLanguageModel, question: Sequence[int], steps: int = MOST) -> list[int]:
    """Without a cache, padding or end: the whole is read again for every token."""
    row = list(question)
    with torch.no_grad():
        for _ in range(steps):
            row.append(int(model(tokens(row))[0, -1].argmax()))
    return row[len(question) :]


def cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and with its end."""
    place = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: place + 1]


def padded(answers: Sequence[list[int]], pad: int) -> list[list[int]]:
    longest = max(map(len, answers))
    return [answer + [pad] * (longest - len(answer)) for answer in answers]


def an_early_end(answers: Sequence[list[int]]) -> int:
    """A token that ends some answers early and others not at all."""
    for token in dict.fromkeys(answer[step] for step in (1, 2, 3) for answer in answers):
        lengths = {len(cut(answer, [token])) for answer in answers}
        if len(lengths) > 1 and MOST in lengths:
            return token
    raise AssertionError(f"no such token in {answers}")


# Each model with the mixture that has most to keep apart, and each mixture in one model.
SLOW = pytest.mark.slow
ROWS = [
    pytest.param(name, moe, marks=[] if moe == "dynmoe" or name == "llama" else SLOW)
    for name in MODELS
    for moe in (None, "topk", "dynmoe")
]


@pytest.mark.parametrize(("name", "moe"), ROWS)
def test_a_batch_of_questions_is_answered_as_each_alone(name: str, moe: str | None) -> None:
    model = vl_model(name, moe)
    model.config.eos_token_id = NEVER
    expected = [greedy(model, question) for question in QUESTIONS]
    assert len(set(map(tuple, expected))) > 2  # the questions make a difference
    assert model.generate(prompts(*QUESTIONS), MOST).tolist() == expected
    end = model.config.eos_token_id = an_early_end(expected)
    short = [cut(answer, [end]) for answer in expected]
    assert len(set(map(len, short))) > 1
    assert model.generate(prompts(*QUESTIONS), MOST).tolist() == padded(short, PAD)
    for question, answer in zip(QUESTIONS, short, strict=True):
        assert model.generate(prompts(question), MOST).tolist() == [answer]


@pytest.mark.parametrize("moe", ["topk", "dynmoe"])
def test_padding_may_be_a_word_or_the_end(moe: str) -> None:
    """What is said before an answer's end is read, whatever its id."""
    model = vl_model(moe=moe)
    model.config.eos_token_id = NEVER
    expected = [greedy(model, question) for question in QUESTIONS]
    for word in dict.fromkeys(answer[1] for answer in expected):
        model.pad_token_id, model.config.eos_token_id = word, NEVER
        with record_routing(model) as tape:
            assert model.generate(prompts(*QUESTIONS), MOST).tolist() == expected
        assert all(all(real(call)) for calls in tape.values() for call in calls[1:])
        model.config.eos_token_id = word
        short = [cut(answer, [word]) for answer in expected]
        assert model.generate(prompts(*QUESTIONS), MOST).tolist() == padded(short, word)


def test_there_may_be_several_ends() -> None:
    model = vl_model(moe="dynmoe")
    model.config.eos_token_id = NEVER
    expected = [greedy(model, question) for question in QUESTIONS]
    ends = model.config.eos_token_id = [expected[0][2], expected[1][1]]
    short = [cut(answer, ends) for answer in expected]
    with record_routing(model) as tape:
        assert model.generate(prompts(*QUESTIONS), MOST).tolist() == padded(short, PAD)
    for calls in tape.values():
        assert [real(call) for call in calls[1:]] == still_said(short)


def real(call: Any) -> list[bool]:
    found: list[bool] = call.token_mask.squeeze(1).tolist()
    return found


def still_said(short: Sequence[list[int]]) -> list[list[bool]]:
    """For each further call, whose answer is read: those that did not end with the token before."""
    return [[step < len(answer) for answer in short] for step in range(1, max(map(len, short)))]


@pytest.mark.parametrize("moe", ["topk", "dynmoe"])
def test_moe_layers_are_told_what_is_padding(moe: str) -> None:
    model = vl_model(moe=moe)
    model.config.eos_token_id = NEVER
    expected = [greedy(model, question) for question in QUESTIONS]
    end = model.config.eos_token_id = an_early_end(expected)
    short = [cut(answer, [end]) for answer in expected]
    batch = prompts(*QUESTIONS)
    with record_routing(model) as tape:
        ids_BN = model.generate(batch, MOST)
    assert len(tape) == 2
    for prompt, *steps in tape.values():
        assert torch.equal(prompt.token_mask, batch["attention_mask"].bool())
        assert len(steps) == ids_BN.shape[1] - 1
        assert [real(step) for step in steps] == still_said(short)
        for call in (prompt, *steps):
            served_BN: Tensor = call.mask.any(2)
            assert torch.equal(served_BN, call.token_mask)  # all of it, and nothing else
        counts = [int(call.stats.k_hist.sum()) for call in (prompt, *steps)]
        # A word that ends an answer, or is its last allowed one, is said but not read.
        assert sum(counts[1:]) == sum(len(answer) - 1 for answer in short)
        assert counts[0] == sum(map(len, QUESTIONS))


def test_answers_may_have_to_be_of_a_length() -> None:
    model = vl_model(moe="dynmoe")
    model.config.eos_token_id = NEVER
    end = model.config.eos_token_id = an_early_end([greedy(model, q) for q in QUESTIONS])
    with record_routing(model) as tape:
        ids_BN = model.generate(prompts(*QUESTIONS), MOST, exactly=True)
    assert ids_BN.shape == (len(QUESTIONS), MOST) and end not in ids_BN.unique()
    assert all(all(real(call)) for calls in tape.values() for call in calls[1:])


def test_generation_leaves_no_trace() -> None:
    model = vl_model(moe="dynmoe")
    batch = tokens(*QUESTIONS)
    before = model(batch)
    model.generate(prompts(*QUESTIONS), 2)
    assert torch.equal(model(batch), before)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with record_routing(model) as tape:
        model.language_model(**text)
    assert [call.token_mask for calls in tape.values() for call in calls] == [None, None]
