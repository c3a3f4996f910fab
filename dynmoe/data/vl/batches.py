"""From the keys of examples to a padded batch of token ids and images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from dynmoe.data.text.batches import Key
from dynmoe.data.vl.chat import IGNORE, IMAGE, IdArray, encode_answers, encode_prompts
from dynmoe.data.vl.store import TokenStore
from dynmoe.questions.base import QuestionSet
from dynmoe.seeding import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = dict[str, Tensor]
"""input_ids and attention_mask [B, N] int64; image_mask [B, N] bool, the positions of the images'
patches, where ids are padding; images [I, 3, H, W] float32, in the order of their positions in the
flattened batch; I may be 0."""


class ConversationBatch(NamedTuple):
    """Conversations to learn from, padded at the right."""

    tokens: Tokens
    label: Tensor
    """[B, N] int64: the token at each position that a loss is taken of, else IGNORE."""
    source: str
    """The set of the first conversation."""
    row: Tensor
    """[B] int64, rows of their stores."""
    weight: float = 1.0
    """See `Key`."""

    @property
    def scored(self) -> tuple[Tensor, Tensor]:
        return scored(self.label)

    @property
    def inputs(self) -> tuple[Tokens, Tensor]:
        """The backbone's positional arguments in training."""
        return self.tokens, self.scored[0]


def scored(label_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [M] of the flattened batch whose next token has a loss, and these tokens."""
    next_T = F.pad(label_BN[:, 1:], (0, 1), value=IGNORE).flatten()
    # NOTE: shifted within rows, then flattened: no row predicts the first token of the next one.
    # nonzero waits for the device; it saves the logits, [vocabulary] each, of all other positions.
    scored_M = (next_T != IGNORE).nonzero().squeeze(1)
    return scored_M, next_T[scored_M]


class QuestionBatch(NamedTuple):
    """Questions to answer, padded at the left: the answer continues the last position."""

    tokens: Tokens
    label: Tensor
    """[B] int64: indices of the questions' kinds among the sorted kinds of their set."""
    source: str
    row: Tensor
    """[B] int64, places in the set."""

    @property
    def inputs(self) -> tuple[Tokens]:
        """The backbone's positional arguments."""
        return (self.tokens,)


class Fetched(NamedTuple):
    """Examples not yet padded: questions of one set, conversations of several in a mixture."""

    source: str
    rows: list[int]
    ids: list[IdArray]
    labels: list[IdArray]
    """For conversations the label of each token; for questions one array, their kinds."""
    images: Tensor
    weight: float


class Conversations(Dataset[Fetched]):
    """All sets of conversations in one dataset."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        load_image: Mapping[str, LoadImage],
        transform: ImageTransform,
    ) -> None:
        self.stores = stores
        self.load_image = load_image
        self.transform = transform

    def __getitems__(self, keys: list[Key]) -> Fetched:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        ids, labels = zip(*(self.stores[key.source].row(key.row) for key in keys), strict=True)
        images = [
            self.transform(self.load_image[key.source](name))
            for key in keys
            for name in self.stores[key.source].images(key.row)
        ]
        pixels = _stacked(images, self.transform)
        return Fetched(source, rows, list(ids), list(labels), pixels, weight)


class Questions(Dataset[Fetched]):
    """All sets of questions in one dataset; `prompts` are their token ids, in the order of `sets`.

    A batch is of the set of its first example.
    """

    def __init__(
        self,
        sets: Mapping[str, QuestionSet],
        prompts: Mapping[str, Sequence[IdArray]],
        transform: ImageTransform,
    ) -> None:
        self.sets = sets
        self.prompts = prompts
        self.transform = transform
        kinds = {
            name: [question.kind for question in each.questions] for name, each in sets.items()
        }
        self._kinds = {
            name: np.unique(each, return_inverse=True)[1].astype(np.int32)
            for name, each in kinds.items()
        }

    def __getitems__(self, keys: list[Key]) -> Fetched:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        questions = self.sets[source]
        names = [name for row in rows for name in questions.questions[row].images]
        images = _pixels(names, questions.load_image, self.transform)
        ids = [self.prompts[source][row] for row in rows]
        return Fetched(source, rows, ids, [self._kinds[source][rows]], images, weight)


def collate_conversations(pad_id: int, fetched: Fetched) -> ConversationBatch:
    """Pad the conversations of a batch to the longest of them."""
    return ConversationBatch(
        tokens=_tokens(fetched, pad_id, "right"),
        label=_padded(fetched.labels, IGNORE, "right"),
        source=fetched.source,
        row=torch.tensor(fetched.rows),
        weight=fetched.weight,
    )


def collate_questions(pad_id: int, fetched: Fetched) -> QuestionBatch:
    """Pad the prompts of a batch to the longest of them."""
    (kinds,) = fetched.labels
    return QuestionBatch(
        tokens=_tokens(fetched, pad_id, "left"),
        label=torch.from_numpy(kinds.astype(np.int64)),
        source=fetched.source,
        row=torch.tensor(fetched.rows),
    )


def _tokens(fetched: Fetched, pad_id: int, side: str) -> Tokens:
    ids = _padded(fetched.ids, pad_id, side)
    image_mask = ids == IMAGE
    # NOTE: an embedding has no row IMAGE, which is negative; the patches replace what pad_id gives.
    return {
        "input_ids": ids.masked_fill(image_mask, pad_id),
        "attention_mask": _padded([np.ones_like(each) for each in fetched.ids], 0, side),
        "image_mask": image_mask,
        "images": fetched.images,
    }


def _padded(rows: list[IdArray], value: int, side: str) -> Tensor:
    # A copy: rows of a store are mapped from a file, read-only and int32.
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _pixels(names: Sequence[str], load_image: LoadImage, transform: ImageTransform) -> Tensor:
    return _stacked([transform(load_image(name)) for name in names], transform)


def _stacked(images: list[Tensor], transform: ImageTransform) -> Tensor:
    return torch.stack(images) if images else torch.empty(0, 3, transform.size, transform.size)


# Sets of questions as prompts of a language model, and the scores of its answers.

Answers = Mapping[int, str]
"""Answers by the row of their question."""


class Prompts(Sequence[IdArray]):
    """Token ids [N] of the questions of a set, by their rows.

    `kept` has an image as one `IMAGE`; a row has it `image_tokens` times.
    """

    def __init__(self, kept: Sequence[IdArray], image_tokens: int) -> None:
        self._kept = kept
        self._image_tokens = image_tokens
        self.lengths: IntArray = np.array([self._repeats(ids).sum() for ids in kept])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: int) -> IdArray:  # type: ignore[override]  # no slices
        ids = self._kept[row]
        return np.repeat(ids, self._repeats(ids))

    def _repeats(self, ids: IdArray) -> IntArray:
        return np.where(ids == IMAGE, self._image_tokens, 1)


class AskedQuestions:
    """Sets by their names, and their prompts; an image is `image_tokens` tokens."""

    def __init__(self, image_tokens: int) -> None:
        self.image_tokens = image_tokens
        self.sets: dict[str, QuestionSet] = {}
        self.prompts: dict[str, Prompts] = {}
        self._references: dict[str, dict[int, list[int]]] = {}

    def add(
        self, sets: Mapping[str, QuestionSet], tokenizer: PreTrainedTokenizerBase, template: str
    ) -> None:
        """Raises ConfigError: `template` and `tokenizer` do not fit together."""
        for name, questions in sets.items():
            asked = [(question.text, len(question.images)) for question in questions.questions]
            kept = encode_prompts(asked, tokenizer, template, image_tokens=1)
            self.prompts[name] = Prompts(kept, self.image_tokens)
            self.sets[name] = questions
            rows = [row for row, right in enumerate(questions.records) if isinstance(right, str)]
            answered = [(*asked[row], questions.records[row]) for row in rows]
            ids = encode_answers(answered, tokenizer, template) if questions.is_scored else []
            self._references[name] = dict(zip(rows, ids, strict=False))

    def references(self, name: str, rows: Sequence[int]) -> list[list[int]] | None:
        """Token ids of the right answers, with what ends an answer, as in training.

        Empty for a question that has not exactly one; None if no question of the set has one.
        """
        known = self._references[name]
        return [known.get(row, []) for row in rows] if known else None

    @property
    def lengths(self) -> dict[str, IntArray]:
        """Tokens of the prompts of each set."""
        return {name: prompts.lengths for name, prompts in self.prompts.items()}

    @property
    def mean_tokens(self) -> float:
        return float(np.concatenate([*self.lengths.values()]).mean())

    def score(self, name: str, answers: Answers) -> dict[str, float]:
        """Scores of a set, from the answer to each row; empty for a set that is not scored here."""
        questions = self.sets[name]
        return questions.score(_in_order(answers)) if questions.is_scored else {}

    def write(self, name: str, folder: Path, answers: Answers) -> list[Path]:
        """Prediction files of a set, as its official evaluator reads them."""
        return self.sets[name].write(folder, _in_order(answers))

    def describe(self, name: str, row: int) -> dict[str, Any]:
        """A question, its answer if there is only one, its first image as a PNG file in base64."""
        question, right = self.sets[name].questions[row], self.sets[name].records[row]
        image = None
        if question.images:
            file = io.BytesIO()
            self.sets[name].load_image(question.images[0]).save(file, format="PNG")
            image = base64.b64encode(file.getvalue()).decode()
        return {
            "question": question.text,
            "right": right if isinstance(right, str) else None,
            "image": image,
            "image_tokens": self.image_tokens,
        }


def _in_order(answers: Answers) -> list[str]:
    """Answers from the first row to the last."""
    return [answers[row] for row in range(len(answers))]


# From a photograph to the pixels a vision tower expects.

LoadImage = Callable[[str], Image.Image]
"""From the key of an image to its RGB picture."""

Fit = Literal["pad", "crop", "stretch"]


@dataclass(frozen=True)
class ImageTransform:
    """A square of pixels, resized bicubically and normalised: PIL RGB -> float32 [3, size, size].

    `pad` widens the image to a square with the mean colour first (LLaVA's image_aspect_ratio=pad),
    `crop` takes the centre of the image whose shorter side was made `size` (CLIP), `stretch` gives
    up the aspect ratio (SigLIP). `mean` and `std` are per channel, of pixels in [0, 1].
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "pad"

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = functional.pil_to_tensor(self._square(image))
        scaled = functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(scaled, list(self.mean), list(self.std))

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.fit == "crop":
            image = _resize(image, [self.size])
            left, top = ((side - self.size) // 2 for side in image.size)
            return functional.crop(image, top, left, self.size, self.size)
        if self.fit == "pad":
            across, down = max(0, height - width), max(0, width - height)
            left, top = across // 2, down // 2
            borders = [left, top, across - left, down - top]
            image = functional.pad(image, borders, [int(255 * value) for value in self.mean])
        return _resize(image, [self.size, self.size])


def _resize(image: Image.Image, size: list[int]) -> Image.Image:
    return functional.resize(image, size, functional.InterpolationMode.BICUBIC)
