"""Settings of the process: what `auto` means, and what is said to hold does hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from dynmoe import process, runtime

AUTO = {"matmul_precision": "auto", "malloc": "auto", "fused_attention": "auto"}


@pytest.fixture(autouse=True)
def restore_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("exact", "precision"), [(True, "medium"), (False, "highest")])
def test_auto_on_a_cpu(exact: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "medium_is_exact", lambda: exact)
    monkeypatch.setattr(
        runtime, "tune_malloc", lambda: monkeypatch.setattr(runtime, "_tuned", True)
    )
    settings = runtime.apply(AUTO, "cpu")
    expected = {"matmul_precision": precision, "malloc": "tuned", "fused_attention": False}
    assert settings == {**expected, "wait": process.waiting()}
    assert torch.get_float32_matmul_precision() == precision


def test_auto_elsewhere_is_pytorchs_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_tuned", False)
    settings = runtime.apply(AUTO, "cuda")
    expected = {"matmul_precision": "highest", "malloc": "system", "fused_attention": True}
    assert settings == {**expected, "wait": process.waiting()}


def test_a_tuned_process_stays_tuned_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_tuned", True)
    assert runtime.apply({**AUTO, "malloc": "system"}, "cpu")["malloc"] == "tuned"


def test_probe_tells_bf16_from_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__

    def in_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float32:
            return product(a.bfloat16(), b.bfloat16()).float()
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", in_bf16)
    assert not runtime.medium_is_exact()


def test_gain_of_bf16_is_measured_where_there_are_matrix_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    for capabilities, known in (
        ({"amx_bf16": True}, True),
        ({"amx_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        gain = runtime.bf16_gain(model)
        assert (gain is not None and 0 < gain < 1000) if known else gain is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert runtime.bf16_gain(nn.Identity()) is None


def test_plain_attention_gives_the_same_logits() -> None:
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    runtime.set_fused_attention(vit, True)
    fused = vit(x)
    runtime.set_fused_attention(vit, False)
    assert not any(block.attn.fused_attn for block in vit.blocks)
    torch.testing.assert_close(vit(x), fused)
