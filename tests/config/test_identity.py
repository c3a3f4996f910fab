"""A run's folder follows from what it computes: not from spelling, order or display."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from dynmoe.config import places
from dynmoe.config.compose import search_path
from dynmoe.config.runs import config_hash, flat, run_name


@pytest.fixture(scope="module", autouse=True)
def hydra_finds_our_files() -> Iterator[None]:
    with search_path():
        yield


@cache
def config(*overrides: str) -> DictConfig:
    return compose("config", ["task=vit_domainbed", *overrides])


@pytest.fixture(scope="module")
def plain() -> str:
    return run_name(config())


def test_the_name_is_readable_and_safe(plain: str) -> None:
    assert re.fullmatch(r"rotateddigits_dynmoe_env0_seed0_[0-9a-f]{8}", plain)
    odd = run_name(config("data.name='My: Set/2'", "moe=topk", "data.test_envs=[0,2]", "seed=7"))
    assert re.fullmatch(r"my-set-2_topk_env0-2_seed7_[0-9a-f]{8}", odd)


def test_an_environment_is_the_same_by_index_and_by_name(tmp_path: Path) -> None:
    def names(data: str, *sets: str) -> set[str]:
        return {
            run_name(config(data, f"data.root={tmp_path}", f"data.test_envs={e}")) for e in sets
        }

    assert len(names("data=pacs", "[3,0]", "[sketch,art_painting]", "[3,art_painting]")) == 1
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
    assert len(names("data=image_folder", "[1]", "[b]")) == 1
    assert flat(config("data.test_envs=['15']"))["data.test_envs"] == [1]


def test_order_and_spelled_out_defaults_do_not_matter(plain: str) -> None:
    one = config("moe.aux_weight=0.1", "trainer.accumulate_grad_batches=2", "moe=topk")
    two = config("moe=topk", "++trainer.accumulate_grad_batches=2", "moe.aux_weight=0.1")
    assert run_name(one) == run_name(two)
    assert run_name(config("seed=0", "moe=dynmoe")) == plain


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (("moe=topk", "moe.num_experts=4", "moe.top_k=1"), "topk_num_experts4-top_k1"),
        (("moe=topk", "moe.num_experts=8", "moe.top_k=2"), "topk"),  # those of its file
        (("task.optimizer.lr=0.01", "trial_seed=2"), "dynmoe_trial_seed2-lr0.01"),
        (("task.optimizer.lr=1e-3",), "dynmoe"),  # that of the protocol
        (("moe.layers=[2,4]", "moe.router.gate_grad=all"), "dynmoe_layers2-4-gate_gradall"),
        (("data.batch_size=8", "task.steps=7"), "dynmoe_batch_size8-steps7"),
    ],
)
def test_a_folder_names_what_differs(overrides: tuple[str, ...], shown: str) -> None:
    name = run_name(config(*overrides))
    assert re.fullmatch(rf"rotateddigits_{re.escape(shown)}_env0_seed0_[0-9a-f]{{8}}", name)


def test_runs_that_were_kept_before_a_key_keep_their_folder() -> None:
    now = config("data=pacs", "data.root=/x")
    before = now.copy()
    del before.data.eval_images
    assert (run_name(now), flat(now)) == (run_name(before), flat(before))
    some = config("data=pacs", "data.root=/x", "data.eval_images=7")
    assert run_name(some) != run_name(now) and flat(some)["data.eval_images"] == 7


def test_long_folder_names_stay_distinct() -> None:
    adaptation = ("start", "length", "period", "min_experts")
    long = [f"moe.adaptation.{key}=1{'0' * 30}" for key in adaptation]
    one, two = (run_name(config(*long, f"moe.adaptation.period={n}{'0' * 30}")) for n in (1, 2))
    assert one != two and len(one) == len(two) < 140


@pytest.mark.parametrize(
    "override",
    [
        "overwrite=true",
        "mode=check",
        "name=elsewhere",
        "paths.outputs=/tmp/elsewhere",
        "logger=none",
        "trainer.enable_progress_bar=false",
        "data.workers=2",
        "runtime.progress_every=5",
        "hydra.verbose=true",
        "protocol.datasets.DomainNet.eval_every=7",
    ],
)
def test_what_does_not_change_the_result_does_not_change_the_folder(
    override: str, plain: str
) -> None:
    assert run_name(config(override)) == plain


@pytest.mark.parametrize(
    "override",
    ["trial_seed=1", "moe.num_experts=5", "task.steps=7", "trainer.precision=bf16-mixed"],
)
def test_what_changes_the_result_changes_the_hash(override: str) -> None:
    assert config_hash(config(override)) != config_hash(config())


# Places.


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a/dog/1.jpg", "b/dog/1.jpg", "b/cat/2.jpg"):
        file = tmp_path / "mydata" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "mydata"


def name_of(*overrides: str) -> str:
    places.fingerprint.cache_clear()
    return run_name(compose("config", ["task=vit_domainbed", "data=image_folder", *overrides]))


def test_the_place_of_the_data_is_not_their_identity(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(images)
    shutil.copytree(images, tmp_path / "elsewhere" / "mydata")
    spellings = ("mydata", "mydata/", "./mydata", images, "link", "elsewhere/mydata")
    names = {name_of(f"data.root={spelling}") for spelling in spellings}
    assert len(names) == 1
    (images / "notes.txt").write_text("beside the data")
    assert {name_of("data.root=mydata")} == names != {name_of(f"data.root={images}/a")}


def test_an_earlier_run_is_known_by_its_folder(images: Path, tmp_path: Path) -> None:
    def named(start: Path) -> str:
        return run_name(compose("config", ["task=vl", f"stage.start={start}"]))

    start = tmp_path / "vl_instruct" / "scenes_seed0_0123abcd"
    before = named(start)
    start.mkdir(parents=True)
    shutil.copytree(tmp_path / "vl_instruct", tmp_path / "moved" / "vl_instruct")
    moved = tmp_path / "moved" / "vl_instruct" / start.name
    assert named(start) == named(moved) == before != named(start.with_name("scenes_seed1_0123abcd"))


def test_weights_are_known_by_what_they_are(images: Path, tmp_path: Path) -> None:
    def named(file: str) -> str:
        return name_of(f"data.root={images}", f"backbone.pretrained={tmp_path / file}")

    large = b"0" * (places.BLOCK * places.BLOCKS * 2)
    for file, content in {"a.pth": large, "b.pth": large, "c.pth": large[:-1] + b"1"}.items():
        (tmp_path / file).write_bytes(content)
    assert named("a.pth") == named("b.pth") != named("c.pth")


def test_the_configuration_remembers_absolute_paths(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"x")
    cfg = compose(
        "config",
        [
            *("task=vit_domainbed", "data=image_folder", "data.root=mydata/"),
            "backbone.pretrained=weights.pth",
        ],
    )
    places.make_absolute(cfg)
    monkeypatch.chdir("/")
    assert cfg.data.root == cfg.data.environments.root == str(images)
    assert cfg.backbone.pretrained == str(tmp_path / "weights.pth")
    assert Path(cfg.paths.outputs).is_absolute()
