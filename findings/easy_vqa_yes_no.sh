#!/usr/bin/env bash
# easy-VQA balances yes and no over all questions, not within a question.
#
# Half of the answers to its yes/no questions are "yes" (51 % on test), so one expects 50 % from a model that does not
# see the image. It reaches 83 %: questions of the form "is there ..." are mostly answered "no", those with a negation
# ("is there not ...") mostly "yes", and over all questions the two even out. A model that answers each question by
# its most frequent training answer is right on 67 % of all test questions, where the most frequent answer of all
# gives 37 %. An accuracy of 80 % on the yes/no questions is therefore no evidence that images are used.
#
# Seen with easy-vqa 1.0 (PyPI) and Python 3.11, 2026-11-29. Exits with 1 if the numbers are no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder" easy-vqa==1.0
python3 - "$folder" <<'PYTHON'
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

(data,) = Path(sys.argv[1]).glob("*/data")
train, test = (json.loads((data / part / "questions.json").read_text()) for part in ("train", "test"))
print(f"{len(train):,} training questions, {len(test):,} test questions")

answers = defaultdict(Counter)
for question, answer, _ in train:
    answers[question][answer] += 1
guess = {question: count.most_common(1)[0][0] for question, count in answers.items()}


def right(rows):
    return sum(guess.get(question) == answer for question, answer, _ in rows) / len(rows)


binary = [row for row in test if row[1] in ("yes", "no")]
yes = sum(answer == "yes" for _, answer, _ in binary) / len(binary)
most_frequent = Counter(answer for _, answer, _ in test).most_common(1)[0][1] / len(test)
for question in ("is there a blue shape?", "is there not a blue shape?"):
    print(f"{question:<28} {dict(answers[question])}")
print(f"yes/no questions of the test set: {yes:.1%} are yes; right without the image: {right(binary):.1%}")
print(f"all: the most frequent answer is right on {most_frequent:.1%}; without the image: {right(test):.1%}")
as_described = abs(yes - 0.5) < 0.02 and right(binary) > 0.8 and right(test) > 0.65 and most_frequent < 0.4
sys.exit(0 if as_described else 1)
PYTHON
