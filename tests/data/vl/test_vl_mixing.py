"""Sources of conversations: parts of the same data, and batches of several of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynmoe.data.base import StepPlan
from dynmoe.data.mixing import Mixing
from dynmoe.data.vl.batches import ConversationBatch
from dynmoe.data.vl.content import BY_IMAGES, Content, llava, scenes
from dynmoe.data.vl.module import VisionLanguageData

HALVES = (0.5, 0.5, 0.5)
SCENES = partial(scenes, stage="instruct", px=48, train_scenes=200, test_scenes=5)


def made(content: partial[Content], by_source: bool = True) -> VisionLanguageData:
    data = VisionLanguageData(
        name="Scenes",
        content=content,
        image_size=48,
        patch_size=16,
        mean=HALVES,
        std=HALVES,
        template="simple",
        question_template="simple",
        batch_size=12,
        max_length=128,
    )
    data.connect(StepPlan(seed=0, steps=4, by_source=by_source))
    data.setup()
    return data


@pytest.fixture(scope="module")
def data() -> VisionLanguageData:
    found = made(SCENES)
    found.mix(Mixing(rule="dynamic", every=2, probe_tokens=20))
    return found


def test_sources_divide_the_conversations(data: VisionLanguageData) -> None:
    whole = made(SCENES, by_source=False)
    assert [*data.stores] == sorted(BY_IMAGES)
    for images, name in enumerate(BY_IMAGES):
        store = data.stores[name]
        assert len(store) > 4 and set(store.num_images) == {images}
    assert np.array_equal(np.sort(data.lengths), np.sort(whole.lengths))
    assert data.sizes == whole.sizes and data.steps_per_epoch == whole.steps_per_epoch


def test_a_batch_holds_rows_of_several_sources(data: VisionLanguageData) -> None:
    batches: list[ConversationBatch] = list(data.train_dataloader())
    mixture = data.mixture
    assert mixture is not None and len(batches) == 4
    draw = data.train_dataloader().batches.draw
    for step, batch in enumerate(batches):
        (keys,) = draw(step, 1)
        assert mixture.counts_at(step).tolist() == [4, 4, 4]
        assert batch.row.tolist() == [key.row for key in keys]
        assert len(batch.tokens["images"]) == 4 * (0 + 1 + 2)
        for place, key in enumerate(keys):
            ids, labels = data.stores[key.source].row(key.row)
            real = batch.tokens["attention_mask"][place].bool()
            shown = batch.tokens["image_mask"][place][real]
            assert batch.tokens["input_ids"][place][real][~shown].tolist() == [
                *ids[ids >= 0].tolist()
            ]
            assert batch.label[place][: len(labels)].tolist() == labels.tolist()


def test_probes_are_of_one_source_and_not_trained_on(data: VisionLanguageData) -> None:
    mixture = data.mixture
    assert mixture is not None
    probed = {name: set[int]() for name in mixture.names}
    for source, batch in data.probes(batch_size=2):
        probed[mixture.names[source]] |= set(batch.row.tolist())
    for name, rows in probed.items():
        assert len(rows) == mixture.probe[name] > 0
        assert rows.isdisjoint(data._train_rows[name].tolist())
        assert len(rows) + mixture.sizes[name] == len(data.stores[name])


def test_files_of_conversations_are_sources(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for name, count in (("b", 3), ("a", 5)):
        rows = [{"image": "a.png", "conversations": turns}] * count
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    content = llava("moe", str(tmp_path), {"moe": ["b.json", "a.json"]})
    sizes = {name: len(list(read())) for name, read in content.sources.items()}
    assert sizes == {"b": 3, "a": 5}
    assert content.train is not None and len(list(content.train())) == 8
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.json").write_text(json.dumps(rows))
    alike = llava("moe", str(tmp_path), {"moe": ["a.json", "more/a.json"]})
    assert [*alike.sources] == ["a.json", "more/a.json"]


def test_one_batch_for_any_number_of_ranks(data: VisionLanguageData) -> None:
    draw = data.train_dataloader().batches.draw
    (whole,) = draw(1, 1)
    parts = draw(1, 3)
    tokens = torch.tensor([sum(_answers(data, part)) for part in parts], dtype=torch.double)
    assert sorted(k[:2] for part in parts for k in part) == sorted(k[:2] for k in whole)
    weights = torch.tensor([part[0].weight for part in parts], dtype=torch.double)
    assert torch.allclose(weights, 3 * tokens / tokens.sum())


def _answers(data: VisionLanguageData, keys: list) -> list[int]:  # type: ignore[type-arg]
    return [int(data.stores[key.source].answer_tokens[key.row]) for key in keys]
