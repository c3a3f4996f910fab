"""Proves token by token what a model reads and what it has to say, for every template."""

from __future__ import annotations

import numpy as np
import pytest
from chat_tokenizers import (
    CHATML,
    SYSTEM,
    byte_level,
    encode,
    encode_prompt,
    sentence_piece,
    whole_words,
    written,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dynmoe.data.vl import chat
from dynmoe.data.vl.chat import (
    IGNORE,
    TEMPLATES,
    conversation_tokenizer,
    encode_all,
    encode_answers,
    encode_prompts,
    end_id,
    without_controls,
)
from dynmoe.data.vl.conversations import Conversation, Message
from dynmoe.data.vl.turns import TEMPLATE_NAMES
from dynmoe.errors import ConfigError, DataError

TWO_TURNS = Conversation(
    "two",
    (
        Message("user", "<image>\nWhat color"),
        Message("assistant", "red"),
        Message("user", "is it"),
        Message("assistant", "top left"),
    ),
    ("0.png",),
)
VOCABULARY = ["what", "color", "red", "is", "it", "top", "left"]
WORDS = whole_words(*VOCABULARY, ends=("</s>", "<|endoftext|>"))
SPOKEN = (
    "chat between a curious user and an artificial intelligence assistant The gives helpful "
    "detailed polite answers to the questions USER ASSISTANT color red is it top left"
)
LLAMA = byte_level(SPOKEN, specials=("</s>",), bos="<s>")
SYSTEM_OF_LLAMA = (
    "A Ġchat Ġbetween Ġa Ġcurious Ġuser Ġand Ġan Ġartificial Ġintelligence Ġassistant . "
    "ĠThe Ġassistant Ġgives Ġhelpful , Ġdetailed , Ġand Ġpolite Ġanswers Ġto Ġthe Ġuser ' s "
    "Ġquestions . ĠUSER :"
)


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    made = byte_level("color b", specials=("<|im_end|>", "<|im_start|>"))
    made.chat_template = template
    return made


def without_specials() -> PreTrainedTokenizerFast:
    made = byte_level()
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("v1", "</s>"),
        ("phi", "<|endoftext|>"),
        ("qwen", "<|endoftext|>"),
        ("stablelm", "<|endoftext|>"),
    ],
)
def test_turns_of_moe_llava_in_whole_words(template: str, end: str) -> None:
    expected = (
        "[BOS] a chat between a curious user and an artificial intelligence assistant. the "
        "assistant gives helpful, detailed, and polite answers to the user's questions. user: "
        f"<image> <image> <image> what color assistant: red* {end}* "
        f"user: is it assistant: top* left* {end}*"
    )
    encoded = encode(TWO_TURNS, WORDS, template, 3, 1000)
    assert written(encoded, WORDS) == expected


def test_simple_in_whole_words() -> None:
    expected = (
        "[BOS] <image> <image> <image> what color [ANSWER] red* [EOS]* "
        "is it [ANSWER] top* left* [EOS]*"
    )
    assert written(encode(TWO_TURNS, WORDS, "simple", 3, 1000), WORDS) == expected


@pytest.mark.parametrize("trim", [True, False])
def test_v1_in_bytes_and_words(trim: bool) -> None:
    """As LLaVA: a lone space before the image, a line feed behind it, " red" one token."""
    made = byte_level(SPOKEN, specials=("</s>",), bos="<s>", trim=trim)
    expected = (
        f"<s> {SYSTEM_OF_LLAMA} Ġ <image> <image> Ċ W h a t Ġcolor ĠASSISTANT : Ġred* </s>* "
        "U S E R : Ġis Ġit ĠASSISTANT : Ġtop* Ġleft* </s>*"
    )
    assert written(encode(TWO_TURNS, made, "v1", 2, 1000), made) == expected


def test_simple_in_the_pieces_of_sentences() -> None:
    """As Llama's tokenizer does, a space is put before what stands behind an image."""
    made = sentence_piece("What color red is it top left [ANSWER] \n")
    expected = (
        "<s> <image> <image> ▁ \n W h a t ▁color ▁[ANSWER] ▁red* </s>* "
        "▁is ▁it ▁[ANSWER] ▁top* ▁left* </s>*"
    )
    assert written(encode(TWO_TURNS, made, "simple", 2, 1000), made) == expected


def test_plain_has_no_words_of_the_user() -> None:
    expected = "<s> <image> <image> r* e* d* Ċ* t* o* p* Ġleft* Ċ*"
    assert written(encode(TWO_TURNS, LLAMA, "plain", 2, 1000), LLAMA) == expected
    assert end_id(LLAMA, "plain") is None


def test_the_tokenizers_own_template() -> None:
    """ChatML: the line feed behind the end token is not the model's to say."""
    made = chatml()
    expected = (
        "<|im_start|> u s e r Ċ <image> <image> Ċ W h a t Ġcolor <|im_end|> Ċ "
        "<|im_start|> a s s i s t a n t Ċ r* e* d* <|im_end|>* Ċ "
        "<|im_start|> u s e r Ċ i s Ġ i t <|im_end|> Ċ "
        "<|im_start|> a s s i s t a n t Ċ t* o* p* Ġ* l* e* f* t* <|im_end|>* Ċ"
    )
    assert written(encode(TWO_TURNS, made, "tokenizer", 2, 1000), made) == expected
    assert end_id(made, "tokenizer") == made.convert_tokens_to_ids("<|im_end|>")


def test_an_own_template_that_writes_the_bos_gets_no_second_one() -> None:
    made = byte_level(specials=("</s>",), bos="<s>")
    made.chat_template = (
        "<s>{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}{{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    expected = "<s> Q <image> Ċ W h a t Ġ c o l o r A r* e* d* </s>* Q i s Ġ i t A t* o* p* Ġ*"
    encoded = encode(TWO_TURNS, made, "tokenizer", 1, 1000)
    assert written(encoded, made).startswith(expected)


CASES = [*((WORDS, name) for name in TEMPLATES if name not in ("plain", "tokenizer"))]
CASES += [(sentence_piece("What color red"), name) for name in ("simple", "v1", "plain")]
CASES += [(LLAMA, "v1"), (LLAMA, "simple"), (LLAMA, "plain"), (chatml(), "tokenizer")]


@pytest.mark.parametrize(("tokenizer", "template"), CASES)
def test_a_prompt_is_where_its_conversation_begins(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    single = Conversation("one", TWO_TURNS.messages[:2], ("0.png",))
    ids, labels = encode(single, tokenizer, template, 3, 1000)
    prompt = encode_prompt("<image>\nWhat color", 1, tokenizer, template, 3)
    assert prompt.dtype == ids.dtype == labels.dtype == np.int32
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert (labels[: len(prompt)] == IGNORE).all() and labels[len(prompt)] == ids[len(prompt)]
    said = labels[labels != IGNORE]
    assert said.tolist() == ids[len(prompt) :][: len(said)].tolist()
    if template != "plain":
        assert said[-1] == end_id(tokenizer, template)


def test_images_of_a_prompt_stand_on_lines_before_it() -> None:
    def prompt(text: str, images: int) -> list[int]:
        return encode_prompt(text, images, LLAMA, "v1", 2).tolist()

    assert prompt("it", 2) == prompt("<image>\n<image>\nit", 2) != prompt("it", 1)
    assert prompt("it", 0).count(-200) == 0
    with pytest.raises(DataError, match=r"question 'a <image>': expected 2 <image>.*; found 1\."):
        prompt("a <image>", 2)


def test_an_answer_about_placeholders_shows_no_image() -> None:
    conversation = Conversation("", (Message("user", "it"), Message("assistant", "<image>")))
    encoded = encode(conversation, LLAMA, "v1", 2, 1000)
    assert written(encoded, LLAMA).endswith("Ġit ĠASSISTANT : Ġ* <* i* m* a* g* e* >* </s>*")


def test_several_images_and_several_conversations() -> None:
    both = Conversation(
        "both", (Message("user", "<image> <image> is"), Message("assistant", "it")), ("a", "b")
    )
    text_only = Conversation("text", (Message("user", "is it"), Message("assistant", "red")))
    encoded = encode_all([both, text_only], WORDS, "simple", 2, 1000)
    assert [written(each, WORDS) for each in encoded] == [
        "[BOS] <image> <image> <image> <image> is [ANSWER] it* [EOS]*",
        "[BOS] is it [ANSWER] red* [EOS]*",
    ]


SAID = "the tags </s>, <|endoftext|>, [EOS] and <|im_end|> mean"


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [(WORDS, "v1"), (WORDS, "qwen"), (WORDS, "simple"), (LLAMA, "v1"), (chatml(), "tokenizer")],
)
def test_control_tokens_in_what_is_said_are_text(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """Exactly one token ends an answer."""
    asked, said = Message("user", f"<image>\n{SAID}"), Message("assistant", f"{SAID} <image>")
    end = end_id(tokenizer, template)
    plain = [Message("user", "<image>\na"), Message("assistant", "b")]
    special = tokenizer.all_special_ids
    counts = []
    for messages in ([asked, said], plain):
        encoded = encode(
            Conversation("1", tuple(messages), ("0.png",)), tokenizer, template, 1, 400
        )
        assert encoded is not None and encoded.labels.tolist().count(end) == 1
        assert encoded.labels[encoded.labels != chat.IGNORE][-1] == end
        words = encoded.ids[encoded.ids != chat.IMAGE]
        unknown = tokenizer.unk_token_id
        counts.append([each for each in words.tolist() if each in special and each != unknown])
        assert (encoded.ids == chat.IMAGE).sum() == 1
    assert counts[0] == counts[1]
    prompt = encode_prompt(asked.text, 1, tokenizer, template, 1).tolist()
    assert prompt.count(end) == encode_prompt("a", 1, tokenizer, template, 1).tolist().count(end)
    (answer,) = encode_answers([("a", 0, SAID)], tokenizer, template)
    assert answer.count(end) == 1 and answer[-1] == end


def test_a_control_token_has_a_space_in_it() -> None:
    message = without_controls(Message("assistant", "the tag </s> ends"), LLAMA)
    assert message.text == "the tag < /s> ends"
    assert without_controls(message, LLAMA) == message
    nested = without_controls(Message("user", "<<s>/s> <image>"), LLAMA)
    assert "</s>" not in nested.text and "<s>" not in nested.text and "<image>" in nested.text


def test_the_first_token_has_no_label() -> None:
    """A caption without image or beginning: nothing could predict its first token."""
    made = byte_level(specials=("</s>",))
    caption = Conversation("", (Message("user", "x"), Message("assistant", "red")))
    assert written(encode(caption, made, "plain", 2, 1000), made) == "r e* d* Ċ*"


def test_what_is_cut_off() -> None:
    """[BOS] 3 x image, what color [ANSWER] red [EOS] is it [ANSWER] top left [EOS]: 15 tokens."""
    whole = encode(TWO_TURNS, WORDS, "simple", 3, 1000)
    assert len(whole.ids) == 15
    for length in range(1, 16):
        cut = encode(TWO_TURNS, WORDS, "simple", 3, length)
        if length < 8:
            assert cut is None
        else:
            assert written(cut, WORDS).split() == written(whole, WORDS).split()[:length]
    late = Conversation("", (*TWO_TURNS.messages[2:], *TWO_TURNS.messages[:2]), ("0.png",))
    cut = encode(late, WORDS, "simple", 3, 11)
    assert written(cut, WORDS).endswith("top* left* [EOS]* <image> <image> <image> what")
    assert encode(late, WORDS, "simple", 3, 9) is None  # an answer, but not the whole image


@pytest.mark.parametrize(
    ("tokenizer", "template", "message"),
    [
        (WORDS, "llama", "data.template=llama: expected one of plain, simple, v1, phi, qwen, "),
        (
            LLAMA,
            "phi",
            r"data.template=phi: answers end with <\|endoftext\|>, which is not one token of "
            r"Tokenizer\w+\. Take the template this model was trained with, ",
        ),
        (byte_level(), "simple", "data.template=simple: answers end with an eos token, which"),
        (LLAMA, "tokenizer", r"data.template=tokenizer: the chat template of \w+ is missing\. T"),
        (chatml("{{ messages[0].content }}"), "tokenizer", "leaves out some of what is said"),
        (
            chatml("{{ raise_exception('no') }}"),
            "tokenizer",
            r"fails \(no\)\.",
        ),
        (
            chatml("{% for m in messages %}{{ m.content }}\n{% endfor %}"),
            "tokenizer",
            "puts no special token after an answer",
        ),
        (without_specials(), "tokenizer", "puts no special token after an answer"),
        (
            chatml("{{ messages | length }}" + CHATML),
            "tokenizer",
            "writes a turn in another way when others follow it",
        ),
        (
            chatml(CHATML.replace("assistant\n", "assistant ").replace("}}\n", "}} ")),
            "tokenizer",
            r"\w+ joins the end of a prompt with the beginning of its answer into one token",
        ),
    ],
    ids=[
        "unknown",
        "end",
        "eos",
        "none",
        "drops",
        "raises",
        "endless",
        "special",
        "varies",
        "joins",
    ],
)
def test_refusals(tokenizer: PreTrainedTokenizerFast, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(TWO_TURNS, tokenizer, template, 3, 1000)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(ConfigError, match=r"backbone.path: some/model has no tokenizer.json"):
        encode(TWO_TURNS, Slow(), "v1", 3, 1000)  # type: ignore[arg-type]


def conversation_of(turns: list[tuple[str, str]]) -> Conversation:
    messages = [
        Message(role, text)
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return Conversation("random", tuple(messages))


words = st.lists(st.sampled_from(VOCABULARY), min_size=1).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.integers(0, 2))
def test_labels_are_the_answers_in_words(turns: list[tuple[str, str]], images: int) -> None:
    turns[0] = ("<image>\n" * images + turns[0][0], turns[0][1])
    _, labels = encode(conversation_of(turns), WORDS, "simple", 3, 10_000)
    said = WORDS.decode(labels[labels != IGNORE])
    assert said == " ".join(f"{answer} [EOS]" for _, answer in turns)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_labels_are_the_answers_in_bytes(turns: list[tuple[str, str]]) -> None:
    """Any characters, white space at the ends included: the text comes back to the byte."""
    ids, labels = encode(conversation_of(turns), LLAMA, "v1", 3, 10_000)
    assert LLAMA.decode(labels[labels != IGNORE]) == "".join(f" {a}</s>" for _, a in turns)
    written_down = "</s>".join(f"USER: {asked} ASSISTANT: {said}" for asked, said in turns)
    assert LLAMA.decode(ids) == f"<s>{SYSTEM}{written_down}</s>"
    prompt = encode_prompt(turns[0][0], 0, LLAMA, "v1", 3)
    assert ids[: len(prompt)].tolist() == prompt.tolist()


def test_words_are_decoded_with_one_space() -> None:
    made = whole_words("top left")
    assert made.decode(made("Top\nLEFT[EOS]").input_ids, skip_special_tokens=True) == "top left"
    assert made.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[ANSWER]"]
    assert made.pad_token_id == 0


def test_a_vocabulary_of_the_most_frequent_words() -> None:
    made = conversation_tokenizer(["<image>\nb B a c", "c a d e"], 8)
    assert made.convert_ids_to_tokens(range(5, len(made))) == ["a", "b", "c"]


def test_prompts_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are tokenized at once."""
    monkeypatch.setattr(chat, "CHUNK", 2)
    questions = [("What color", 1), ("Who", 0), ("<image> or <image>", 2), ("a", 0), ("b", 2)]
    found = encode_prompts(questions, LLAMA, "v1", 3)
    alone = [encode_prompt(text, images, LLAMA, "v1", 3) for text, images in questions]
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in alone]
    assert len({ids.tobytes() for ids in found}) == 5
    assert encode_prompts([], LLAMA, "v1", 3) == []


def test_templates_are_known_before_torch_is() -> None:
    assert tuple(TEMPLATES) == TEMPLATE_NAMES
