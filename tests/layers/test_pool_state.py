"""The layer computes with the experts that its buffer marks, whoever wrote the buffer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes, join_group
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dynmoe.layers import MoELayer, TopAnyRouter, record_routing

DIM, SLOTS = 8, 5


def make_layer(seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
    return MoELayer(mlp, DIM, TopAnyRouter, 2, SLOTS, init="fresh").eval()


@pytest.fixture
def changed() -> MoELayer:
    """A layer that gained and lost experts since it was made."""
    layer = make_layer()
    layer.remove_expert(0)
    layer.add_expert(3, torch.ones(DIM), "fresh")
    layer.add_expert(4, -torch.ones(DIM), "slot")
    return layer


def averaged(layer: MoELayer, **options: object) -> MoELayer:
    average = AveragedModel(make_layer(), **options)  # type: ignore[arg-type]
    average.update_parameters(layer)
    return average.module


def ema_of_steps(layer: MoELayer) -> MoELayer:
    average = AveragedModel(make_layer(), multi_avg_fn=get_ema_multi_avg_fn(0.0))
    for other in (make_layer(), layer):
        average.update_parameters(other)
    return average.module


def by_assignment(layer: MoELayer) -> MoELayer:
    other = make_layer()
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def into_state(write: Callable[[Tensor, Tensor], object]) -> Callable[[MoELayer], MoELayer]:
    """Write every tensor of the layer's state into a layer that has been called before."""

    def copied(layer: MoELayer) -> MoELayer:
        other = make_layer()
        other(torch.randn(3, DIM))
        for mine, its in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            write(mine, its)
        return other

    return copied


def replaced(layer: MoELayer) -> MoELayer:
    other = into_state(lambda mine, its: its.dtype.is_floating_point and mine.copy_(its))(layer)
    other.active_E = layer.active_E.clone()
    return other


def with_data_of(layer: MoELayer) -> MoELayer:
    """The same tensors with other memory, as FSDP moves them."""
    other = make_layer()
    for mine, its in zip(
        (*other.parameters(), *other.buffers()),
        (*layer.parameters(), *layer.buffers()),
        strict=True,
    ):
        mine.data = its.data.clone()
    return other


def as_bits(layer: MoELayer) -> MoELayer:
    """A buffer of another type, as frameworks that cast all buffers leave it."""
    other = copy.deepcopy(layer)
    other.active_E = layer.active_E.bfloat16()
    return other


def saved(layer: MoELayer) -> MoELayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: MoELayer = torch.load(file, weights_only=False)
    return loaded


def distributed_checkpoint(layer: MoELayer) -> MoELayer:
    """It reads into the tensors of a state, and leaves the module alone."""
    other = make_layer()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(layer.state_dict(), checkpoint_id=folder, no_dist=True)
        dcp.load(other.state_dict(), checkpoint_id=folder, no_dist=True)
    return other


def in_inference_mode(layer: MoELayer) -> MoELayer:
    """Tensors made there have no version counter."""
    with torch.inference_mode():
        other = copy.deepcopy(make_layer())
        other(torch.randn(3, DIM))
        for mine, its in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            mine.copy_(its)
    return other


WAYS = {
    "SWA": averaged,
    "EMA": ema_of_steps,
    "load_state_dict(assign=True)": by_assignment,
    "copy_ into the state": into_state(lambda mine, its: mine.copy_(its)),
    "copy_ into the data": into_state(lambda mine, its: mine.data.copy_(its)),
    "other data": with_data_of,
    "another tensor": replaced,
    "another type": as_bits,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved,
    "distributed checkpoint": distributed_checkpoint,
    "inference mode": in_inference_mode,
    "to": lambda layer: copy.deepcopy(layer).to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("way", WAYS)
def test_equal_states_compute_alike(way: str, changed: MoELayer) -> None:
    other = WAYS[way](changed)
    assert other.live == (1, 3, 4)
    x = torch.randn(40, DIM)
    with torch.no_grad():
        torch.testing.assert_close(other(x), changed(x))
        small = other.compact()
        assert small.max_experts == 3
        torch.testing.assert_close(small(x), changed(x))


def test_write_into_the_buffer_alone(changed: MoELayer) -> None:
    changed.active_E.fill_(False)
    changed.active_E[2] = True
    with record_routing(changed) as tape:
        changed(torch.randn(6, DIM))
    assert changed.live == (2,) and tape[""][0].mask.shape == (6, 1)
    changed.active_E.fill_(False)
    with pytest.raises(ValueError, match=r"no expert is alive.*active_E"):
        changed(torch.randn(6, DIM))


def test_functional_call_has_its_own_pool_for_the_call(changed: MoELayer) -> None:
    x = torch.randn(20, DIM)
    only = torch.arange(SLOTS) == 4
    found = torch.func.functional_call(changed, {"active_E": only}, (x,))
    torch.testing.assert_close(found, changed.experts.slots[4](x))
    assert changed.live == (1, 3, 4)


@pytest.mark.slow
def test_compiled_code_follows_the_buffer(changed: MoELayer) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(DIM), make_layer())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(20, DIM)
    compiled(x)
    for mine, its in zip(
        model[1].state_dict().values(), changed.state_dict().values(), strict=True
    ):
        mine.copy_(its)
    for _ in range(2):  # once as it was compiled for the old pool, once compiled anew
        torch.testing.assert_close(compiled(x), changed(model[0](x)))


def test_a_device_is_read_only_where_the_buffer_was_written(
    changed: MoELayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU is spared: the host knows by identity and version that nothing was written."""
    reads = []

    tolist = Tensor.tolist

    def counted(self: Tensor) -> object:
        reads.append(self)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    monkeypatch.setattr(MoELayer, "_on_host", lambda self: False)
    for _ in range(3):
        assert changed.live == (1, 3, 4)
    assert len(reads) <= 1
    changed.active_E[2] = True
    assert changed.live == (1, 2, 3, 4)
    changed.active_E = changed.active_E.clone()
    changed.active_E[1] = False
    for _ in range(3):
        assert changed.live == (2, 3, 4)
    assert len(reads) <= 3
    twin = copy.deepcopy(changed)
    twin.active_E[2] = False
    assert twin.live == (3, 4) and changed.live == (2, 3, 4)


def _broadcast(rank: int, ranks: int, port: int, folder: str) -> None:
    join_group(rank, ranks, port)
    layer = make_layer()
    model = nn.parallel.DistributedDataParallel(layer, find_unused_parameters=True)
    x = torch.randn(9, DIM)
    model(x).sum().backward()
    if rank == 0:
        layer.remove_expert(0)
        layer.add_expert(4, torch.ones(DIM))
    model(x)  # rank 0's buffers go to all others before it
    torch.save(layer.live, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_buffers_broadcast_by_ddp(tmp_path: Path) -> None:
    in_processes(_broadcast, str(tmp_path))
    assert torch.load(tmp_path / "1.pt") == torch.load(tmp_path / "0.pt") == (1, 4)
