"""``dynmoe-eval mode=quantize``: what is refused, and a trained run with fewer bits."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from tiny_runs import Trained, forty_images

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vit
from dynmoe.config.compose import search_path
from dynmoe.config.quantize import Choice, Quantisation, batches_of, exports_of, quantisations_of
from dynmoe.errors import ConfigError
from dynmoe.layers import TopKRouter
from dynmoe.records import Record, RunFolder
from dynmoe.report.evaluations import newest, title_of
from dynmoe.report.quantize import FP32, draw_quantisations, quantize_table, subject_of
from dynmoe.training import build, evaluate, torchao_export
from dynmoe.training.bits import places_in
from dynmoe.training.quantize import quantize

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on top-2, as far as it is read before data and weights are."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "selected.ckpt").touch()
    return configured(folder, "moe=topk")


def configured(folder: Path, *words: str) -> Path:
    with search_path():
        cfg = compose("config", ["task=vit_domainbed", *words])
    del cfg.logger
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant.bits.default=2"], "quant.bits.default=2: expected with mode=quantize"),
        (["mode=quantize", "budget.rule=ratio"], "budget.rule=ratio: expected with mode=budget"),
        (["mode=quantize", "quant.bit.default=2"], "quant.bit.default=2: unknown argument.*quant"),
        (["mode=quantize", "quant.method=awq"], "quant.method: expected gptq or rtn, found 'awq'"),
        (["mode=quantize", "quant.bits.default=2,1"], "bits.default: .*2 to 8, or 16.*found 1"),
        (["mode=quantize", "quant.bits.default=null"], "bits.default: .*2 to 8.*None"),
        (["mode=quantize", "quant.bits.attention=[4,x]"], "bits.attention: .*found 'x'"),
        (["mode=quantize", "quant.bits.blocks=firs:4"], "bits.blocks: expected first:N.*'firs:4'"),
        (["mode=quantize", "quant.bits.blocks=first:0.5"], "bits.blocks: .*found 'first:0.5'"),
        (
            ["mode=quantize", "quant.bits.experts=frequency"],
            "bits.experts: .*frequency:N or rare:N",
        ),
        (["mode=quantize", "quant.bits.experts=rare:99"], "experts: a layer has up to 8 experts"),
        (["mode=quantize", "quant.bits.linears=outlier:2"], "bits.linears: .*share above 0"),
        (["mode=quantize", "quant.bits.shared=4"], "bits.shared: .*no shared experts. Leave it"),
        (["mode=quantize", "quant.bits.named=4"], "bits.named: expected names .*blocks.0.attn"),
        (["mode=quantize", "quant.bits.named={a: 9}"], "bits.named: expected names of modules"),
        (["mode=quantize", "quant.group_size=0"], "quant.group_size: .*-1 for all of a row"),
        (["mode=quantize", "quant.percdamp=-1"], "quant.percdamp: expected 0 or more"),
        (["mode=quantize", "quant.sym=2"], "quant.sym: expected true or false, found 2"),
        (["mode=quantize", "quant.calib.batches=0"], "calib.batches: .*1 or more, found 0"),
        (["mode=quantize", "quant.calib.batches=1,2"], "calib.batches: a number|expected a number"),
        (["mode=quantize", "quant.export=int3"], "quant.export: expected int8 or int4"),
    ],
)
def test_a_wrong_option_is_named(saved: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.parse([f"run={saved}", *words])


def test_policies_for_experts_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    configured(folder, "moe=dense")
    with pytest.raises(ConfigError, match=r"quant.bits.experts: this run has no MoE layer"):
        evaluate.parse([f"run={folder}", "mode=quantize", "quant.bits.experts=frequency:1"])
    configured(folder, "moe=softmoe")
    with pytest.raises(ConfigError, match=r"in Soft MoE .*quant.bits.experts=random:N"):
        evaluate.parse([f"run={folder}", "mode=quantize", "quant.bits.experts=rare:1"])
    evaluate.parse([f"run={folder}", "mode=quantize", "quant.bits.experts=random:1"])
    configured(folder, "moe=topk", "moe.shared_experts=1")
    evaluate.parse([f"run={folder}", "mode=quantize", "quant.bits.shared=4"])


def test_the_predictor_needs_blocks_that_hand_on_every_token(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    configured(folder, "moe=topk", "backbone.token_sparsify={keep: 0.7}")
    words = [f"run={folder}", "mode=quantize"]
    with pytest.raises(ConfigError, match=r"quant.bits.blocks: predictor .*Choose first:N"):
        evaluate.parse([*words, "quant.bits.blocks=null,predictor:1"])
    evaluate.parse([*words, "quant.bits.blocks=null,first:1"])


def test_every_combination_is_a_quantisation(saved: Path) -> None:
    words = (
        "quant.method=rtn quant.bits.default=2,[4] quant.bits.experts=null,frequency:2 "
        "quant.bits.attention=8 quant.calib.batches=3 quant.export=int8"
    )
    words = words.replace("2,[4]", "2,4")
    cfg = evaluate.parse([f"run={saved}", "mode=quantize", *words.split()])[3]
    common = {"method": "rtn", "attention": 8}
    assert quantisations_of(cfg) == [
        Quantisation(default=default, experts=experts, **common)
        for default in (2, 4)
        for experts in (None, Choice("frequency", 2))
    ]
    assert batches_of(cfg) == 3 and exports_of(cfg) == ["int8"]
    named = "quant.bits.named={blocks.0.attn: 8, blocks.1: 16}"
    cfg = evaluate.parse([f"run={saved}", "mode=quantize", named])[3]
    assert quantisations_of(cfg) == [Quantisation(named={"blocks.0.attn": 8, "blocks.1": 16})]


@pytest.mark.skipif(HAS_TORCHAO, reason="for machines without torchao")
def test_an_export_without_torchao_is_refused_first(saved: Path) -> None:
    words = [f"run={saved}", "mode=quantize", "quant.export=int8"]
    with pytest.raises(ConfigError, match=r"quant.export=int8: .*pip install -e '.\[torchao\]'"):
        quantize(*evaluate.parse(words)[1:])


def line(method: str, bits: float | None, score: float, **options: object) -> Record:
    record: Record = {"method": method, "score": score, "loss": 1 - score, "measure": "accuracy"}
    record |= {"mean_k": 1.5, "layers": {"a": 1.5}, "step": 8, "checkpoint": "last.ckpt"}
    record["data_hash"] = "1f"
    if bits is not None:
        base = {"method": method, "bits.default": 4, "bits.attention": None, "bits.experts": None}
        record |= {"options": {**base, **options}, "average_bits": bits}
        record |= {"average_bits_with_grids": bits + 0.14, "fallback": ["x"], "kept_rtn": []}
        record |= {"output_error": 0.01, "rtn_output_error": 0.03}
    return record


LINES = [
    line(FP32, None, 0.9),
    line("gptq", 2.0, 0.5, **{"bits.default": 2}),
    line("gptq", 3.0, 0.8, **{"bits.default": 3}),
    line("gptq", 2.5, 0.7, **{"bits.default": 2, "bits.experts": "frequency:2"}),
]
EXPORT = {
    **line("torchao int8", None, 0.89),
    **{"bytes": 2_500_000, "fp32_bytes": 9_000_000, "samples_per_s": 10.0},
    "fp32_samples_per_s": 12.0,
}


def test_table() -> None:
    table = quantize_table(LINES, "a run")
    assert table.columns[:5] == ("weights", "bits", "with grids", "mean k", "accuracy")
    assert table.rows[0][:6] == ("fp32", "-", "-", "1.50", "90.00", "0.1000")
    assert [row[0] for row in table.rows[1:]] == [
        "gptq default 2",
        "gptq default 3",
        "gptq experts frequency:2 default 2",
    ]
    assert table.rows[1][1:3] == ("2.00", "2.14") and table.rows[1][6] == "0.01 (0.03)"
    whole = quantize_table([*LINES, EXPORT], "a run")
    assert whole.columns[-2:] == ("MB", "samples/s")
    assert whole.rows[0][-2:] == ("9.0", "12.0") and whole.rows[-1][-2:] == ("2.5", "10.0")


def test_figure() -> None:
    scores, losses = draw_quantisations([*LINES, EXPORT], "a run").axes
    own, uniform, frequent = scores.lines
    assert np.asarray(own.get_ydata()).tolist() == [90.0, 90.0]
    assert np.asarray(uniform.get_xydata()).tolist() == [[2.0, 50.0], [3.0, 80.0]]
    assert np.asarray(frequent.get_xydata()).tolist() == [[2.5, 70.0]]
    assert [each.get_label() for each in scores.lines] == [
        "fp32",
        "gptq",
        "gptq experts frequency:2",
    ]
    assert np.asarray(losses.lines[1].get_ydata()).tolist() == pytest.approx([0.5, 0.2])


def test_evaluations_of_several_weights() -> None:
    """Each with its own line of reference; an equal evaluation shows once."""
    others = [{**each, "checkpoint": "selected.ckpt", "step": 4} for each in LINES]
    again = {**LINES[1], "score": 0.55}
    found = newest([*LINES, *others, again, EXPORT], subject_of)
    assert found == [LINES[0], again, *LINES[2:], EXPORT, *others]
    assert title_of("a run", LINES) == "a run, last.ckpt, step 8"
    assert title_of("a run", found) == "a run"
    table = quantize_table(found, "a run")
    assert table.rows[0][0] == "last.ckpt, step 8: fp32"
    assert table.rows[-1][0] == "selected.ckpt, step 4: gptq experts frequency:2 default 2"
    lines = draw_quantisations(found, "a run").axes[0].lines
    assert [line.get_linestyle() for line in lines[:2]] == ["--", ":"]
    assert lines[2].get_label() == "last.ckpt, step 8: gptq"
    assert np.asarray(lines[2].get_ydata()).tolist() == [pytest.approx(55), 80.0]


def test_evaluations_on_other_data() -> None:
    """They are told apart: no loss of one data set beside the weights of another."""
    others = [{**each, "data_hash": "2e"} for each in LINES]
    found = newest([*LINES, *others], subject_of)
    assert found == [*LINES, *others] and title_of("a run", found) == "a run, last.ckpt, step 8"
    rows = [row[0] for row in quantize_table(found, "a run").rows]
    assert rows[0] == "data 1f: fp32" and rows[len(LINES)] == "data 2e: fp32"


def test_a_line_that_is_no_number_or_cut_short(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("quantize", {**LINES[1], "loss": float("nan")})
    with (tmp_path / "quantize.jsonl").open("a") as file:
        file.write('{"step": 8, "met')
    folder.mend("quantize")
    folder.append("quantize", LINES[2])
    first, second = folder.read("quantize")
    assert np.isnan(first["loss"]) and first["options"]["bits.attention"] is None
    assert second == LINES[2] and quantize_table([first, second], "").rows[0][4] == "50.00"


@pytest.fixture(scope="module")
def run(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on 40 images."""
    return trained(*forty_images(tmp_path_factory.mktemp("images")), moe="dynmoe")


def quantised(folder: RunFolder, *words: str) -> list[Record]:
    given = [f"run={folder.path}", "mode=quantize", "checkpoint=last", "data.workers=0", *words]
    new = quantize(*evaluate.parse(given)[1:])
    return folder.read("quantize")[-len(new) :]


def test_a_trained_run_with_fewer_bits(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("quant.method=rtn,gptq", "quant.bits.default=8,2", "quant.calib.batches=2")
    own, *found = quantised(run, *words, "quant.bits.named={blocks.1: 16}")
    last = run.read("results")[-1]
    assert own["method"] == FP32 and own["scores"] == last["scores"] and own["step"] == last["step"]
    assert [(each["method"], each["options"]["bits.default"]) for each in found] == [
        *(("rtn", 8), ("rtn", 2), ("gptq", 8), ("gptq", 2))
    ]
    for each in found:
        assert {n: b for n, b in each["bits"].items() if n.startswith("blocks.1.")} == {
            f"blocks.1.{name}": 16 for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        }
        default = each["options"]["bits.default"]
        assert default < each["average_bits"] < each["average_bits_with_grids"] < 16
        assert each["layers_by_kind"]["expert"].keys() == {str(default)}
    assert found[0]["loss"] == pytest.approx(own["loss"], rel=1e-2)
    assert abs(found[1]["loss"] - own["loss"]) > abs(found[0]["loss"] - own["loss"])
    assert found[3]["output_error"] < found[3]["rtn_output_error"]
    assert (run.path / "figures" / "quantize.png").stat().st_size > 0
    if found[3]["fallback"]:
        said = " ".join(capsys.readouterr().out.split())
        assert found[3]["fallback"][0] in said
    assert not [*run.path.glob(".quantize*")]  # where the weights of before were
    before = run.read("quantize")
    own, more = quantised(run, "quant.method=rtn", "quant.bits.default=3")
    assert run.read("quantize") == [*before, own, more]
    said = " ".join(capsys.readouterr().out.split())
    assert "rtn named {'blocks.1': 16} default 8" in said and "rtn default 3" in said


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
def test_an_export_computes_with_its_files(tmp_path: Path) -> None:
    options = {"patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = build_vit("vit_tiny_patch16_224", 3, image_size=28, options=options).eval()
    router = partial(TopKRouter, top_k=4)
    add_moe_layers(model, router=router, num_experts=4, max_experts=4, layers=[1], init="copy")
    images, places = torch.randn(4, 3, 28, 28), places_in(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
    sizes = []
    for name, tolerance in (("int8", 0.02), ("int4", 0.3)):
        args = (RunFolder(tmp_path), Path("last.ckpt"), model, places, name, [(images,)])
        exported, about = torchao_export.export(*args)
        assert not about["left_out"] and about["samples_per_s"] > 0
        file = tmp_path / "quantized" / name / "weights.pt"
        assert file.stat().st_size == about["bytes"] < about["fp32_bytes"]
        sizes.append(about["bytes"])
        again = copy.deepcopy(model).to(torchao_export.FORMATS[name].dtype)
        again.load_state_dict(torch.load(file, weights_only=True), assign=True)
        kind = type(again.get_submodule("blocks.1.mlp.experts.slots.0.fc1").weight).__name__
        assert kind.lower().startswith(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "int4"):
            found, read = exported(images).float(), again(images).float()
        assert torch.equal(found, read)
        assert float((found - expected).norm() / expected.norm()) < tolerance
    assert sizes[1] < sizes[0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_an_export_of_a_run_from_elsewhere(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration calls no code that was not allowed by name."""
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.moe.router._target_ = "my_routers.Router"
    OmegaConf.save(cfg, folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"int8: expected an export.* quant.export=int8"):
        torchao_export.load(folder, "int8")
    about = folder / "quantized" / "int8" / "about.json"
    about.parent.mkdir(parents=True)
    about.write_text("{}")
    with pytest.raises(ConfigError, match=r"int8: expected an export"):
        torchao_export.load(folder, "int8")

    about.write_text('{"checkpoint": "last.ckpt"}')
    monkeypatch.setattr(torchao_export, "check", lambda formats: None)
    settled: list[str] = []

    def settle(cfg: DictConfig) -> None:
        settled.append(cfg.moe.router._target_)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "settle_runtime", settle)
    with pytest.raises(ConfigError, match="targets=my_routers"):
        torchao_export.load(folder, "int8", ["other"])
    assert not settled
    with pytest.raises(KeyboardInterrupt):
        torchao_export.load(folder, "int8", ["my_routers"])
    assert settled == ["my_routers.Router"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
def test_an_exported_run(run: RunFolder) -> None:
    own, int8, _ = quantised(run, "quant.method=rtn", "quant.export=int8")
    assert int8["method"] == "torchao int8" and not int8["left_out"]
    assert int8["loss"] == pytest.approx(own["loss"], rel=1e-2)
    model = torchao_export.load(run.path, "int8")
    assert type(model.get_submodule("blocks.1.attn.qkv").weight).__name__ == "Int8Tensor"
