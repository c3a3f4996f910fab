"""Glosses: 4,800 noun definitions of WordNet 3.0, to be told apart by topic; nothing to download.

Made once from WordNet's data.noun: the label is the lexicographer file of the noun, one of ten;
the text is its definition up to the first quoted example. Left out are definitions of less than 4
or more than 40 words, with other quotes in them, that name their own topic, or that more than one
topic has (in any case of letters). Sorted by the SHA-256 of the text, the first 80 of every topic
are dev and the next 400 train. Licence: glosses.LICENSE.
"""

from __future__ import annotations

from functools import partial
from importlib.resources import as_file, files

from dynmoe.data.text_sets import Loader, RawTexts
from dynmoe.data.text_tables import read_table


def gloss_loaders() -> dict[str, Loader]:
    """What reads train and dev."""
    return {split: partial(_read, split) for split in ("train", "dev")}


def _read(split: str) -> RawTexts:
    with as_file(files("dynmoe.data") / "glosses.tsv.gz") as path:
        columns = read_table(path, ("split", "label", "text")).columns
    chosen = [row for row, name in enumerate(columns["split"]) if name == split]
    return RawTexts(
        where=f"glosses {split}",
        texts=[[columns["text"][row] for row in chosen]],
        labels=[columns["label"][row] for row in chosen],
        index=range(len(chosen)),
    )
