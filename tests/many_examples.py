"""Large synthetic data, to measure starts and memory:

    python tests/many_examples.py conversations FOLDER 665000
    python tests/many_examples.py images FOLDER 1000000

Conversations have the form of LLaVA's mix of 665,000 (six in a hundred without an image, an image
file for two others, three rounds), beside a set of questions, a tokenizer and the configuration of
a tiny Llama. Image trees have two environments of ten classes. All image files are links to a few
of 28 px: they take no blocks of the disk, and cannot be told from others by their names, sizes and
times.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from transformers import LlamaConfig

from dynmoe.data.vl.chat import conversation_tokenizer

LINKS = 60_000  # names of one file; ext4 knows 65,000
FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
WORDS = [f"word{number}" for number in range(16)]
ROUNDS = 3


def link_images(places: Iterator[Path]) -> None:
    """Give every place a picture; its folder is there."""
    rng = np.random.default_rng(0)
    first = Path()
    for number, place in enumerate(places):
        if number % LINKS:
            os.link(first, place)
        else:
            pixels = rng.integers(256, size=(28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(first := place, format="JPEG")


def conversations(folder: Path, number: int) -> None:
    """`mix.json`, images, `pope` and `model` below the folder."""
    images = number // 2
    names = [f"{FOLDERS[place % 5]}/{place:012d}.jpg" for place in range(images)]
    for below in (*FOLDERS, "pope/val2014", "model"):
        (folder / below).mkdir(parents=True)
    link_images(folder / name for name in [*names, "pope/val2014/0.jpg"])
    random = Random(0)

    def text(words: int) -> str:
        return " ".join(random.choices(WORDS, k=words))

    with (folder / "mix.json").open("w") as file:
        for place in range(number):
            shown = place % 16 != 0
            turns = [
                turn
                for round in range(ROUNDS)
                for turn in (
                    {"from": "human", "value": "<image>\n" * (shown and not round) + text(8)},
                    {"from": "gpt", "value": text(random.randrange(2, 20))},
                )
            ]
            entry = {"id": f"{place:012d}", "conversations": turns}
            if shown:
                entry["image"] = random.choice(names)
            file.write(("," if place else "[") + json.dumps(entry))
        file.write("]")
    asked = {"question_id": 1, "image": "0.jpg", "text": text(8), "label": "yes"}
    (folder / "pope/coco_pope_random.json").write_text(json.dumps(asked))
    tokenizer = conversation_tokenizer([" ".join([*WORDS, "yes", "no"])], size=100)
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).save_pretrained(folder / "model")


def images(folder: Path, number: int) -> None:
    """`environment/class/image` below the folder."""
    classes = [folder / f"env{env}/class{label}" for env in range(2) for label in range(10)]
    for each in classes:
        each.mkdir(parents=True)
    link_images(classes[place % 20] / f"{place:09d}.jpg" for place in range(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("conversations", "images"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    args = parser.parse_args()
    {"conversations": conversations, "images": images}[args.kind](args.folder, args.number)


if __name__ == "__main__":
    main()
