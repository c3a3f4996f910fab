"""What a device holds of a model that several share: planned, and counted on one of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from vl_models import vl_model

from dynmoe.adaptation.expert_parallel import SharedExperts
from dynmoe.adaptation.fsdp2 import Shards
from dynmoe.backbones.vlm import VisionLanguageModel
from dynmoe.estimate.sizes import held, number

DEVICES = 3


@pytest.fixture
def first_device() -> Iterator[None]:
    """The first of `DEVICES` processes, of which the others are made up: nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=DEVICES)
    yield
    distributed.destroy_process_group()


def model() -> VisionLanguageModel:
    made = vl_model(moe="dynmoe", moe_arguments={"max_experts": 8, "num_experts": 4})
    return made.train().requires_grad_(True)


def in_memory(module: nn.Module, trained: bool = False) -> int:
    """Numbers that this process has memory for."""
    parameters = [p for p in module.parameters() if p.requires_grad or not trained]
    return sum(p.numel() for p in parameters if p.untyped_storage().nbytes() >= p.nbytes)


def test_shares_of_all_weights(first_device: None) -> None:
    whole = model()
    planned = held(whole, DEVICES)["FSDP2"]
    Shards(whole, init_device_mesh("cpu", (DEVICES,)), reshard_after_forward=True)
    found = sum(getattr(p, "_local_tensor", p).numel() for p in whole.parameters())
    assert found == planned.parameters == planned.trained
    assert number(whole) / DEVICES < found < number(whole) / 2


@pytest.mark.parametrize("size", [None, 1, 3])
def test_shared_experts(first_device: None, size: int | None) -> None:
    whole = model()
    for p in whole.vision.parameters():
        p.requires_grad_(False)
    every, strategy = number(whole), OmegaConf.create({"size": size})
    planned = held(whole, DEVICES, strategy)["experts shared"]
    SharedExperts(whole, DEVICES if size is None else size)
    assert in_memory(whole) == planned.parameters
    assert in_memory(whole, trained=True) == planned.trained
    assert (planned.parameters == every) == (size == 1)


def test_others() -> None:
    whole = model()
    every = number(whole)
    assert [*held(whole, 1)] == [""]
    found = held(whole, 4, "auto")
    assert (found["DDP"].parameters, found["DDP"].averaged) == (every, every)
    assert found["FSDP"].parameters == every / 4
    assert "experts shared" not in held(vl_model(), 4)
