"""Proves DomainData: loaders, records, every refusal, and exact continuation under Lightning."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from dynmoe.data.base import StepBatches, StepPlan
from dynmoe.data.images.batches import IMAGENET_MEAN, IMAGENET_STD, EnvironmentDraw, ImageBatch
from dynmoe.data.images.digits import rotated_digits
from dynmoe.data.images.environments import image_folders
from dynmoe.data.images.module import DomainData, linear_pixel_baseline
from dynmoe.errors import DataError
from dynmoe.image_files import BadImage

DIGITS = partial(rotated_digits, seed=0)


def domain_data(environments: Any, accumulate: int = 1, **changes: Any) -> DomainData:
    settings: dict[str, Any] = {
        "name": "Test",
        "environments": environments,
        "test_envs": [0],
        "image_size": 16,
        "batch_size": 4,
        "trial_seed": 0,
        "eval_batch_size": 8,
        "workers": 0,
    }
    data = DomainData(**{**settings, **changes})
    data.connect(StepPlan(seed=0, steps=12, eval_every=5, accumulate=accumulate))
    return data


def pets(tree: Path, **changes: Any) -> DomainData:
    return domain_data(partial(image_folders, str(tree)), **changes)


def problems(data: DomainData) -> list[str]:
    with pytest.raises(DataError) as error:
        data.setup()
    return str(error.value).splitlines()


def test_records_of_the_embedded_digits() -> None:
    data = domain_data(DIGITS, test_envs=[0, 5])
    data.setup()
    envs = data.envs
    data.setup()
    assert data.envs is envs
    assert data.env_names == ["0", "15", "30", "45", "60", "75"]
    assert (data.num_classes, data.channels, data.train_envs) == (10, 1, [1, 2, 3, 4])
    assert (data.sizes["0/in"], data.sizes["0/out"]) == (240, 60)
    assert (data.sizes["75/in"], data.sizes["75/out"]) == (240, 59)
    assert sum(map(len, data.envs)) == 1797
    assert data.modality == "image"
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.image.shape == (16, 1, 16, 16) and batch.image.dtype == torch.float32
    assert batch.env.tolist() == [env for env in (1, 2, 3, 4) for _ in range(4)]
    assert batch.split.tolist() == [0] * 16 and batch.label.dtype == torch.int64


def test_data_hash_changes_with_split_and_files(tree: Path) -> None:
    def data_hash(**changes: Any) -> str:
        data = pets(tree, **changes)
        data.setup()
        return data.data_hash

    assert data_hash() == data_hash(cache=False, test_envs=[1])
    assert data_hash() != data_hash(trial_seed=1)
    before = data_hash()
    (tree / "art" / "cat" / "0.png").rename(tree / "art" / "cat" / "00.png")
    renamed = data_hash()
    assert renamed != before
    Image.new("RGB", (8, 8)).save(tree / "art" / "cat" / "00.png")
    assert data_hash() not in (before, renamed)


def test_loaders_are_equal_with_and_without_cache_and_workers(tree: Path) -> None:
    loaded = []
    for cache, workers in ((False, 0), (True, 0), (True, 2)):
        data = pets(tree, cache=cache, workers=workers)
        data.setup()
        loaded.append([*data.train_dataloader(), *data.val_dataloader()])
    for other in loaded[1:]:
        assert len(other) == len(loaded[0])
        for ours, theirs in zip(loaded[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("cache", "cache_gb", "kept"), [("auto", 2.0, True), ("auto", 1e-6, False)]
)
def test_auto_cache_keeps_what_fits(tree: Path, cache: str, cache_gb: float, kept: bool) -> None:
    data = pets(tree, cache=cache, cache_gb=cache_gb)
    data.setup()
    assert (type(data.envs[0]).__name__ == "CachedEnvironment") == kept


def test_training_environments_are_evaluated_augmented_only_if_asked(tree: Path) -> None:
    def images(augment_eval: bool) -> dict[int, Tensor]:
        data = pets(tree, augment_eval=augment_eval)
        data.setup()
        batches = list(data.val_dataloader())
        return {env: torch.cat([b.image for b in batches if b.env[0] == env]) for env in range(3)}

    augmented, plain = images(True), images(False)
    assert [torch.equal(augmented[env], plain[env]) for env in range(3)] == [True, False, False]


def test_evaluations_of_fewer_images_are_parts_of_whole_ones(tree: Path) -> None:
    def seen(count: int | None) -> dict[tuple[int, int], list[int]]:
        data = pets(tree, eval_images=count, cache=False)
        data.setup()
        found: dict[tuple[int, int], list[int]] = {}
        for keys in data.val_dataloader().batch_sampler:
            for key in keys:
                found.setdefault((key.env, key.split), []).append(key.item)
        assert [len(each) for each in found.values()] == [*data.sizes.values()][count is not None :]
        assert sum(len(part) for parts in data.splits for part in parts) == images
        assert data.sizes.get("train") == (
            count and sum(len(data.splits[env][0]) for env in (1, 2))
        )
        return found

    images = sum(1 for _ in tree.glob("*/*/*"))
    every, few = seen(None), seen(3)
    assert sum(map(len, every.values())) == images
    assert few == {key: items[:3] for key, items in every.items()} != every


def test_photographs_are_normalised_as_the_backbone_was_trained(tree: Path) -> None:
    def images(**changes: Any) -> Tensor:
        data = pets(tree, **changes)
        data.setup()
        return torch.cat([batch.image for batch in data.val_dataloader()])

    mean, std = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    ours = (
        torch.tensor(IMAGENET_STD)[:, None, None] * images()
        + torch.tensor(IMAGENET_MEAN)[:, None, None]
    )
    torch.testing.assert_close(images(mean=mean, std=std) * 0.5 + 0.5, ours)


def test_loaders_leave_the_global_generator_alone(tree: Path) -> None:
    data = pets(tree)
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_all_problems_are_reported_at_once(tree: Path) -> None:
    shutil.rmtree(tree / "photo" / "dog")
    shutil.rmtree(tree / "sketch" / "dog")
    (tree / "sketch" / "dog").mkdir()
    (tree / "art" / "cat" / "3.png").write_bytes(b"not an image")
    assert problems(pets(tree, test_envs=[3], batch_size=15)) == [
        "data Test: 5 problem(s)",
        "  data.test_envs: there is no environment 3; the data set has 0 (art), 1 (photo), "
        "2 (sketch)",
        "  photo lacks class dog of the other environments. Add images of it here, remove its "
        "folder everywhere, or take the classes of all with data.class_union=true.",
        "  sketch has no images in class dog. Add some, remove it, or accept that with "
        "data.class_union=true.",
        "  data.batch_size: 15 is more than the in split of photo (8), sketch (8). Lower "
        "data.batch_size or add images.",
        "  unreadable images: 1. Replace or remove them, or leave them out with "
        "data.skip_invalid=true:",
        f"    {tree / 'art' / 'cat' / '3.png'}: not an image, or of a format that Pillow cannot "
        "read",
    ]


def test_truncated_files_are_found_by_decoding_only(tree: Path) -> None:
    path = tree / "art" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:-300])
    pets(tree, verify="header").setup()
    (_, _, found) = problems(pets(tree, verify="decode"))
    assert str(path) in found and "truncated" in found


def test_bad_images_are_left_out_and_counted_if_asked(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truncated files too, although training would read them without the switch."""
    whole = pets(tree)
    whole.setup()
    cut = tree / "art" / "cat" / "3.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    (tree / "art" / "dog" / "9.png").write_bytes(b"")
    (tree / "sketch" / "dog" / "note.gif").write_bytes(b"GIF")
    data = pets(tree, skip_invalid=True, cache=True)
    data.setup()
    assert data.left_out == {
        "art: images that cannot be read": 2,
        "sketch: files with suffix .gif": 1,
    }
    assert "left out: art: images that cannot be read: 2" in caplog.text
    assert [len(e) for e in data.envs] == [18, 20, 20]
    assert [(e.labels == 0).sum() for e in data.envs] == [9, 10, 10]
    files = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    kept = [i for i, file in enumerate(files) if file not in ("cat/3.png", "dog/9.png")]
    for place, index in enumerate(kept):
        assert data.envs[0].load(place).tobytes() == whole.envs[0].load(index).tobytes()
    assert data.data_hash != whole.data_hash


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_training_is_named_without_a_traceback(tree: Path, workers: int) -> None:
    for index in range(10):
        (tree / "photo" / "dog" / f"{index}.png").write_bytes(b"x")
    data = pets(tree, verify="none", cache=False, workers=workers)
    data.setup()
    with pytest.raises(BadImage) as error:
        list(data.train_dataloader())
    assert re.fullmatch(
        rf"{tree}/photo/dog/\d.png: cannot be read as an image: not an image, or of a format that "
        r"Pillow cannot read\.",
        str(error.value),
    )


def test_environments_are_named_or_counted(tree: Path) -> None:
    for test_envs in (["sketch", "art"], [2, "art"], [2, 0]):
        data = pets(tree, test_envs=test_envs)
        data.setup()
        assert data.test_envs == [2, 0] and data.train_envs == [1]
    digits = domain_data(DIGITS, test_envs=["15"])
    digits.setup()
    assert digits.test_envs == [1]


def test_a_union_of_classes_keeps_the_labels_of_all(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tree / "photo" / "cat")
    (tree / "art" / "dog").rename(tree / "art" / "bird")
    data = pets(tree, class_union=True, class_balanced=True, cache=True)
    data.setup()
    assert data.class_names == ["bird", "cat", "dog"] and data.num_classes == 3
    found = [np.bincount(e.labels, minlength=3).tolist() for e in data.envs]
    assert found == [[10, 10, 0], [0, 0, 10], [0, 10, 10]]
    assert "art has no images of class dog" in caplog.text
    assert "photo has no images of classes bird, cat" in caplog.text
    assert "no training environment has images of class bird" in caplog.text
    labels = torch.cat([batch.label for batch in data.train_dataloader()])
    assert set(labels.tolist()) == {1, 2}
    (tree / "art" / "fish").mkdir()
    message = "no environment has images in class fish"
    assert message in problems(pets(tree, class_union=True))[1]


def test_names_that_differ_in_case_alone_are_pointed_out(tree: Path) -> None:
    (tree / "photo" / "dog").rename(tree / "photo" / "Dog")
    assert "It has dog: give both one spelling" in problems(pets(tree))[1]


def test_orientations_that_are_not_applied_are_counted(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tree / "art" / "cat" / "turned.jpg", exif=exif)
    pets(tree).setup()
    assert "1 images have an EXIF orientation, which is not applied" in caplog.text


def test_class_balanced_is_passed_on(tree: Path) -> None:
    for name in "23456789":
        (tree / "photo" / "dog" / f"{name}.png").unlink()
    data = pets(tree, class_balanced=True)
    data.setup()
    sampler = data.train_dataloader().batch_sampler
    assert isinstance(sampler, StepBatches)
    draw = sampler.draw
    assert isinstance(draw, EnvironmentDraw) and draw.weights is not None
    labels = data.envs[1].labels[draw.pools[1]]
    assert [draw.weights[1][labels == label].sum() for label in (0, 1)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_envs": []}, "data.test_envs: empty: name at least one environment; the data"),
        (
            {"test_envs": [0, 1, 2]},
            "data.test_envs: [0, 1, 2] leaves no environment to train on; the data set has 0 "
            "(art), 1 (photo), 2 (sketch). Leave at least one out of data.test_envs.",
        ),
        (
            {"test_envs": ["scetch", 1]},
            "data.test_envs: there is no environment scetch; the data set has 0 (art), 1 (photo)",
        ),
        ({"std": (0.2, 0.2, 0.0)}, "data.std: expected more than 0, found (0.2, 0.2, 0.0)"),
        ({"test_envs": [-1]}, "data.test_envs: there is no environment -1; the data set has 0 ("),
        (
            {"batch_size": 6, "accumulate": 4},
            "data.batch_size: 6 images per environment do not divide into 4 parts "
            "(devices x trainer.accumulate_grad_batches). Use a multiple of 4.",
        ),
    ],
)
def test_refusals(tree: Path, changes: dict[str, Any], message: str) -> None:
    assert message in problems(pets(tree, **changes))[1]


@pytest.mark.parametrize(
    ("test_envs", "says"),
    [([1], '"1"'), ([10], '"10"'), ([0, 1], '"1"'), (["10"], 1), ([0], 0), ([2], 2)],
)
def test_a_number_that_names_another_environment_is_ambiguous(
    tree: Path, test_envs: list[int | str], says: str | int
) -> None:
    for name, number in zip(("art", "photo", "sketch"), ("1", "2", "10"), strict=True):
        (tree / name).rename(tree / number)
    data = pets(tree, test_envs=test_envs)
    if isinstance(says, int):
        data.setup()
        assert data.test_envs == [says]
    else:
        assert f"Quote names: 'data.test_envs=[{says}]'" in problems(data)[1]


def test_one_environment_and_one_class_are_not_enough(tree: Path) -> None:
    for folder in ("art", "photo", "sketch/dog"):
        shutil.rmtree(tree / folder)
    assert problems(pets(tree)) == [
        "data Test: 2 problem(s)",
        "  two or more environments are needed: one to test on, others to train on; "
        "found 1: sketch. The layout is environment/class/image",
        "  two or more classes are needed; found 1: cat",
    ]


def test_check_table(tree: Path) -> None:
    data = pets(tree)
    data.setup()
    console = Console(file=io.StringIO(), width=100)
    data.print_check(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["role", "test", "train", "train"] in [row[:4] for row in rows]
    assert ["in", "16", "16", "16", "48"] in rows and ["out", "4", "4", "4", "12"] in rows
    assert ["images", "20", "20", "20", "60"] in rows
    assert ["dog", "10", "10", "10", "30"] in rows


def test_linear_baseline_learns_the_training_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread, however many there are: others add in another order."""
    threads: list[int] = []
    fit = LogisticRegression.fit

    def noted(self: LogisticRegression, *arguments: Any) -> LogisticRegression:
        threads.extend(library["num_threads"] for library in threadpool_info())
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", noted)
    data = domain_data(DIGITS, image_size=28)
    data.setup()
    with threadpool_limits(2):
        baseline = linear_pixel_baseline(data)
    assert set(threads) == {1}
    assert baseline["name"] == "linear classifier on pixels"
    scores = {name: found["accuracy"] for name, found in baseline["scores"].items()}
    assert scores["0/out"] < 0.7 < 0.85 < scores["30/out"] and len(scores) == 2 * 6
    data.eval_images = 1
    of_one = linear_pixel_baseline(data)["scores"].values()
    assert {found["accuracy"] for found in of_one} <= {0.0, 1.0}


class Recorder(pl.LightningModule):
    """Notes (step, digest of the batch) in training and evaluation; trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, str]] = []
        self.evaluated: list[tuple[int, str]] = []

    def training_step(self, batch: ImageBatch) -> Tensor:
        self.trained.append((self.global_step, digest(batch)))
        return self.weight * batch.image.mean()

    def validation_step(self, batch: ImageBatch) -> None:
        self.evaluated.append((self.global_step - 1, digest(batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digest(batch: ImageBatch) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


class Saver(pl.Callback):
    """Saves after the step `after`, before or after the evaluation that may follow it."""

    def __init__(self, path: Path, after: int, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_: self._save(trainer))
        self.path, self.after = path, after

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step - 1 == self.after:
            trainer.save_checkpoint(self.path)


def fit(
    tree: Path, *callbacks: pl.Callback, resume: Path | None = None, **trainer: Any
) -> Recorder:
    recorder = Recorder()
    pl.Trainer(
        max_steps=12,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **trainer,
    ).fit(
        recorder,
        datamodule=pets(tree, accumulate=trainer.get("accumulate_grad_batches", 1)),
        ckpt_path=resume,
    )
    return recorder


def test_lightning_evaluates_at_the_steps_of_domainbed(tree: Path) -> None:
    recorder = fit(tree)
    assert [step for step, _ in recorder.trained] == list(range(12))
    assert sorted({step for step, _ in recorder.evaluated}) == [0, 5, 10, 11]
    per_evaluation = len(recorder.evaluated) / 4
    assert per_evaluation == 3 * (2 + 1)
    accumulated = fit(tree, accumulate_grad_batches=2)
    assert [step for step, _ in accumulated.trained] == [s for s in range(12) for _ in range(2)]
    assert sorted({step for step, _ in accumulated.evaluated}) == [0, 5, 10, 11]


@pytest.mark.parametrize(
    ("after", "hook"),
    [
        (0, "on_validation_end"),
        (3, "on_train_batch_end"),
        (5, "on_validation_end"),
        (7, "on_train_batch_end"),
    ],
)
def test_a_killed_run_continues_exactly(tree: Path, tmp_path: Path, after: int, hook: str) -> None:
    checkpoint = tmp_path / "last.ckpt"
    whole = fit(tree, Saver(checkpoint, after, hook))
    resumed = fit(tree, resume=checkpoint)
    assert resumed.trained == [entry for entry in whole.trained if entry[0] > after]
    assert resumed.evaluated == [entry for entry in whole.evaluated if entry[0] > after]


def test_copies_of_files_are_counted_where_every_image_is_read(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tree / "art/cat/0.png", tree / "photo/cat/copy.png")
    shutil.copy(tree / "art/cat/1.png", tree / "art/dog/copy.png")
    pets(tree).setup()
    assert "byte for byte" not in caplog.text
    pets(tree, verify="decode").setup()
    assert "2 image files are byte for byte the same as one in another of the environments" in (
        caplog.text
    )
    assert "another of the classes, e.g. art/cat, art/dog" in caplog.text


def test_images_of_12_bits_in_16_are_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, most in (("dim", 4095), ("full", 60000), ("black", 0)):
        pixels = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(pixels).save(tree / "art" / "cat" / f"{name}.png")
    pets(tree, verify="decode").setup()
    assert "1 images have 16 bits and no value above 4095" in caplog.text
