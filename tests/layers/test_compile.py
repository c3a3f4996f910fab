"""A layer inside torch.compile, torch.export, pickle and copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import partial

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dynmoe.layers import AverageKeyRouter, MoELayer, TopAnyRouter, record_routing
from dynmoe.layers.ffn import GatedFFN

DIM = 8


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(**options: object) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(Mlp(DIM, 16), DIM, TopAnyRouter, 4, 6, init="fresh")
    layer.remove_expert(1)
    return layer


class Blocks(nn.Module):
    """Two residual blocks, each with an MoE layer in a nested module, as in a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(DIM), make_layer()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.slow
def test_one_graph_break_a_layer() -> None:
    assert torch._dynamo.explain(make_layer())(torch.randn(3, 5, DIM)).graph_break_count == 1
    options = {"patch_size": 4, "embed_dim": DIM, "depth": 3, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, **options)
    vit.blocks[0].mlp, vit.blocks[2].mlp = make_layer(), make_layer()
    # Without this setting a break also ends the graph of every function it is called from.
    with torch._dynamo.config.patch(nested_graph_breaks=True):
        reasons = torch._dynamo.explain(vit)(torch.randn(2, 3, 8, 8)).break_reasons
    assert len(reasons) == 2


@pytest.mark.slow
def test_compiled_equals_eager_and_new_loads_compile_nothing() -> None:
    model, counter = Blocks(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    loads, frames = set(), []
    for seed in range(5):
        x = torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(seed))
        with record_routing(model) as tape:
            y = compiled(x)
        loads.add(tuple(tape["layers.0.1"][0].stats.load_E.tolist()))
        grads = torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True)
        expected = model(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            grads, torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
        )
        frames.append(counter.frame_count)
    assert len(loads) > 1
    assert frames[-1] == frames[0]


@pytest.mark.parametrize("gated", [False, True])
def test_export_of_a_compacted_layer_takes_any_batch(gated: bool) -> None:
    """And tokens that are not finite, which come out as 0."""
    layer = make_layer()
    if gated:
        gate, up, down = nn.Linear(DIM, 12), nn.Linear(DIM, 12), nn.Linear(12, DIM)
        ffn = GatedFFN(gate, up, nn.SiLU(), down, 0.1)
        layer = MoELayer(ffn, DIM, TopAnyRouter, 4, init="fresh")
    layer = layer.eval().compact()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 5, DIM),), dynamic_shapes=({0: batch},))
    for size in (1, 3, 17):
        x = torch.randn(size, 5, DIM)
        x[0, 1], x[-1, 2, 0] = torch.nan, torch.inf
        y = program.module()(x)
        torch.testing.assert_close(y, layer(x))
        assert y[0, 1].eq(0).all() and y[-1, 2].eq(0).all()


def test_export_of_mean_keys_needs_no_operation_on_quantised_weights() -> None:
    """ONNX has none."""
    layer = MoELayer(Mlp(DIM, 16), DIM, partial(AverageKeyRouter, top_k=2), 4, init="fresh")
    program = torch.export.export(layer.eval(), (torch.randn(3, DIM),))
    assert "dequantize" not in program.graph_module.code


def test_pickle_copy_and_state_dict_keep_the_pool() -> None:
    layer, x = make_layer().eval(), torch.randn(7, DIM)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    restored = MoELayer(Mlp(DIM, 16), DIM, TopAnyRouter, 4, 6, init="fresh").eval()
    restored.load_state_dict(layer.state_dict())
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(layer), restored):
        assert other.live == layer.live == (0, 2, 3)
        assert other(x).equal(layer(x))


def test_made_without_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = MoELayer(Mlp(DIM, 16), DIM, TopAnyRouter, 4, 6)
    assert layer.live == (0, 1, 2, 3)
