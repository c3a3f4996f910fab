"""Models with MoE layers under PyTorch's FSDP: each rank holds a share of every block's parameters.

Routers are kept whole on all ranks: FSDP takes no scalars, which thresholds are, and they are
small. Experts are sharded with their block, and made whole to be changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from torchmetrics import Metric

from dynmoe.layers.moe import moe_layers


class MoEFSDPStrategy(FSDPStrategy):
    """Lightning's ``FSDPStrategy`` whose units are the blocks that transformers names.

    Parameters are gathered in the precision they are kept in, gradients reduced in it; products
    are computed in that of ``trainer.precision`` by autocast, as on one device: routers stay in
    fp32. Training computes what DDP computes (tests/adaptation/test_fsdp.py), but that weight decay
    also shrinks empty slots, whose gradient may be 0 instead of none.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(mixed_precision=MixedPrecision(), **options)
        self._whole: list[nn.Parameter] = []

    def _setup_model(self, model: nn.Module) -> nn.Module:
        layers = moe_layers(model).values()
        self._whole = [p for layer in layers for p in layer.router.parameters()]
        # FSDP moves parameters, but not those that it ignores, nor what metrics have summed.
        for module in (*(layer.router for layer in layers), *_metrics(model)):
            module.to(self.root_device)
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(blocks(model)),
            ignored_states=self._whole,
            device_id=self.root_device,  # Lightning gives a number, which means a GPU
            sharding_strategy=self.sharding_strategy,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            **self.kwargs,
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """FSDP asks for a state of every parameter that shares a block with one that has some."""
        with full_state(getattr(optimizer, "_optimizer", optimizer)):
            return super().optimizer_state(optimizer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the routers' gradients over ranks, which FSDP does for all others."""
        super().post_backward(closure_loss)
        average_gradients(self._whole)


def blocks(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of the blocks in all models of transformers within ``model``."""
    names = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    return {type(module) for module in model.modules() if type(module).__name__ in names}


def _metrics(model: nn.Module) -> list[Metric]:
    return [module for module in model.modules() if isinstance(module, Metric)]


def average_gradients(
    parameters: Iterable[nn.Parameter], *others: Tensor, group: Any = None
) -> None:
    """Average over the ranks of ``group`` (None: all) in one call, ``others`` as well.

    A parameter that has a gradient on some ranks alone, such as a threshold where no expert serves
    a token, counts as 0 on the others; one that has none anywhere keeps none.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained and not others:
        return
    like = trained[0] if trained else others[0]
    has = like.new_tensor([p.grad is not None for p in trained])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    # NOTE: one call, in the order of parameters: calls that ranks make in different orders hang.
    parts = [*gradients, has, *others]
    flat = nn.utils.parameters_to_vector(parts)
    distributed.all_reduce(flat, group=group)
    nn.utils.vector_to_parameters(flat / distributed.get_world_size(group), parts)
    for p, grad, share in zip(trained, gradients, has.tolist(), strict=True):
        p.grad = grad if share else None


@contextmanager
def full_state(optimizer: Optimizer) -> Iterator[None]:
    """Within the block give parameters that Adam has not moved the state it begins with: 0."""
    known: dict[str, Tensor] = next((state for state in optimizer.state.values() if state), {})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [p for p in parameters if not optimizer.state.get(p)]
    for p in missing:
        optimizer.state[p] = {
            key: torch.zeros_like(value if key == "step" else p) for key, value in known.items()
        }
    yield
    for p in missing:
        del optimizer.state[p]
