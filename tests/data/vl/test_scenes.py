"""Proves that Scenes stays the same, that each question has one answer, and how hard it is."""

from __future__ import annotations

import itertools
import re
from random import Random

import numpy as np
import pytest

from dynmoe.data.vl.content import baselines
from dynmoe.data.vl.conversations import Conversation, check_conversation
from dynmoe.data.vl.scenes import (
    CELLS,
    COLOURS,
    KINDS,
    MOST,
    NUMBERS,
    PLURAL,
    SHAPES,
    Scene,
    draw_image,
    draw_scene,
    read_scene,
    scene_key,
    scene_questions,
    scene_source,
)
from dynmoe.errors import ConfigError
from dynmoe.questions.exact import ExactMatch

SINGULAR = {plural: shape for shape, plural in PLURAL.items()}


def right_answers(question: str, scene: Scene) -> list[str]:
    """Worked out from the text alone: one for a question that can be asked."""
    place = re.fullmatch(r"what (colour is the object|shape is) at the (.*) \?", question)
    if place:
        found = [t for t in scene if CELLS[t.cell] == place[2]]
        return [t.colour if "colour" in place[1] else t.shape for t in found]
    if colour := re.fullmatch(r"what colour is the (\w+) \?", question):
        return [t.colour for t in scene if t.shape == colour[1]]
    if shape := re.fullmatch(r"what shape is the (\w+) object \?", question):
        return [t.shape for t in scene if t.colour == shape[1]]
    if where := re.fullmatch(r"where is the (\w+) (\w+) \?", question):
        return [CELLS[t.cell] for t in scene if (t.colour, t.shape) == where.groups()]
    if exists := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        assert exists[1] in COLOURS and exists[2] in SHAPES
        return ["yes" if any(t[:2] == exists.groups() for t in scene) else "no"]
    many = re.fullmatch(r"how many (\w+)( objects)? are there \?", question)
    assert many is not None, question
    if many[1] == "objects":
        return [NUMBERS[len(scene)]]
    feature = SINGULAR.get(many[1], many[1])
    assert feature in SHAPES or (feature in COLOURS and many[2])
    return [NUMBERS[sum(feature in thing for thing in scene)]]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    texts = [message.text.replace("<image>\n", "") for message in conversation.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture(scope="module")
def training() -> list[Conversation]:
    return list(scene_source("questions", seed=0, size=8000))


@pytest.fixture(scope="module")
def test_set() -> ExactMatch:
    return scene_questions(seed=1, size=2000)


def test_an_image() -> None:
    key = "48px 8123: red circle 0, blue square 4"
    pixels = np.asarray(draw_image(key))
    background = pixels[40, 40]
    assert (pixels.shape, len(set(background.tolist()))) == ((48, 48, 3), 1)
    cells = pixels.reshape(3, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4).reshape(9, 16, 16, 3)
    painted = [bool((cell != background).any()) for cell in cells]
    assert painted == [cell in (0, 4) for cell in range(9)]
    assert tuple(cells[0][8, 8]) == COLOURS["red"]
    assert tuple(cells[4][8, 8]) == COLOURS["blue"]
    assert np.array_equal(pixels, np.asarray(draw_image(key)))
    assert not np.array_equal(pixels, np.asarray(draw_image(key.replace("8123", "8124"))))
    assert draw_image(key.replace("48px", "96px")).size == (96, 96)


def test_every_shape_is_another_mask() -> None:
    images = [np.asarray(draw_image(f"48px 1: white {shape} 4")) for shape in SHAPES]
    for one, other in itertools.combinations(images, 2):
        assert (one != other).any(axis=-1).sum() > 20


def test_a_key_is_its_scene() -> None:
    random = Random(3)
    for _ in range(200):
        scene = draw_scene(random, test=False)
        assert read_scene(scene_key(scene, 48, 5)) == scene
        assert [thing.cell for thing in scene] == sorted({thing.cell for thing in scene})
        assert 1 <= len({thing[:2] for thing in scene}) == len(scene) <= MOST


def test_the_first_conversations() -> None:
    assert turns(next(iter(scene_source("captions", 0, 1)))) == [
        ("what is in the image ?", "a blue circle at the top left , a green circle at the bottom")
    ]
    assert [turns(each) for each in scene_source("questions", 0, 3)] == [
        [("what is two minus two ?", "zero")],
        [
            ("how many squares are there ?", "zero"),
            ("what colour is the object at the center ?", "white"),
            ("what shape is at the top left ?", "circle"),
            ("is there a white square ?", "no"),
            ("where is the white circle ?", "top left"),
        ],
        [("where is the green circle ?", "top left"), ("how many objects are there ?", "three")],
    ]


def test_captions_name_everything_in_order() -> None:
    for conversation in scene_source("captions", 4, 300):
        check_conversation(conversation, "scenes")
        ((_, caption),) = turns(conversation)
        said = [re.fullmatch(r"a (\w+) (\w+) at the (.+)", part) for part in caption.split(" , ")]
        found = [(each[1], each[2], CELLS.index(each[3])) for each in said if each]
        assert found == [tuple(thing) for thing in read_scene(conversation.images[0])]


def test_training_answers_are_right(training: list[Conversation]) -> None:
    numbers = {word: value for value, word in enumerate(NUMBERS)}
    for conversation in training:
        check_conversation(conversation, "scenes")
        scenes = [read_scene(key) for key in conversation.images]
        for question, answer in turns(conversation):
            if not scenes:
                _, _, first, sign, second, _ = question.split(" ")
                value = numbers[first] + numbers[second] * (1 if sign == "plus" else -1)
                assert numbers[answer] == value
            elif len(scenes) == 2:
                which, _, asked = question.partition(" image , ")
                scene = scenes[["in the first", "in the second"].index(which)]
                assert right_answers(asked, scene) == [answer]
            else:
                assert right_answers(question, scenes[0]) == [answer]


def test_shares_of_training(training: list[Conversation]) -> None:
    images = [len(each.images) for each in training]
    shares = [images.count(number) / len(images) for number in (0, 1, 2)]
    assert shares == pytest.approx([0.05, 0.9, 0.05], abs=0.01)
    counts = [len(turns(each)) for each in training if each.images]
    assert [counts.count(n) / len(counts) for n in range(2, 6)] == pytest.approx(
        [0.25] * 4, abs=0.02
    )
    assert all(len(dict(turns(each))) == len(turns(each)) for each in training)


def test_the_words_are_few_and_parted_by_spaces(training: list[Conversation]) -> None:
    conversations = [*training, *scene_source("captions", 0, 1000)]
    texts = [text for each in conversations for turn in turns(each) for text in turn]
    words = {word for text in texts for word in text.split(" ")}
    assert len(words) == 51
    assert {word for word in words if not word.isalpha()} == {"?", ","}
    assert all(word == word.lower() for word in words)


def test_test_answers_are_right(test_set: ExactMatch) -> None:
    for question, answer in zip(test_set.questions, test_set.records, strict=True):
        assert right_answers(question.text, read_scene(question.images[0])) == [answer]
    assert [question.kind for question in test_set.questions[:5]] == sorted(KINDS)
    assert test_set.score(test_set.records)["score"] == 1


def test_training_and_test_share_no_scene(
    training: list[Conversation], test_set: ExactMatch
) -> None:
    captions = scene_source("captions", 0, 8000)
    trained = {read_scene(key) for each in (*training, *captions) for key in each.images}
    tested = {read_scene(question.images[0]) for question in test_set.questions}
    assert len(tested) > 1000
    assert not trained & tested


def test_the_question_alone_gives_little_away(
    training: list[Conversation], test_set: ExactMatch
) -> None:
    assert baselines(test_set, training) == pytest.approx(
        {"majority": 0.10, "question only": 0.28}, abs=0.02
    )
    yes = [
        answer
        for question, answer in zip(test_set.questions, test_set.records, strict=True)
        if question.kind == "exists"
    ]
    assert yes.count("yes") / len(yes) == pytest.approx(0.5, abs=0.05)


def test_another_image_for_every_question(test_set: ExactMatch) -> None:
    shuffled = test_set.with_other_images()
    assert shuffled.name == "scenes_shuffled"
    assert shuffled.records == test_set.records
    for question, other in zip(test_set.questions, shuffled.questions, strict=True):
        assert question.text == other.text
        assert question.images != other.images
    assert {q.images for q in test_set.questions} == {q.images for q in shuffled.questions}


def test_digests() -> None:
    sources = [
        scene_source("questions", 0, 200),
        scene_source("captions", 0, 200),
        scene_source("questions", 1, 200),
        scene_source("questions", 0, 201),
        scene_source("questions", 0, 200, px=96),
    ]
    assert len({source.digest for source in sources}) == len(sources)
    assert sources[0].digest == scene_source("questions", 0, 200).digest
    assert re.fullmatch("[0-9a-f]{16}", sources[0].digest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("captions", 0, 0), "scenes: expected a size of 1 or more, found 0."),
        (("captions", 0, 1, 50), "scenes of 50 px: expected a multiple of 3, 24 or more, as 48."),
        (("texts", 0, 1), "scenes: expected the kind captions or questions, found 'texts'."),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        scene_source(*arguments)
    assert str(error.value) == message
