"""Training with experts that ranks share (dynmoe/layers/expert_parallel.py), beside DDP.

Groups of ranks share the experts of every layer; all else is DDP's. Several groups are replicas:
the ranks that own an expert in them average its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynmoe.adaptation.fsdp import average_gradients
from dynmoe.errors import ConfigError
from dynmoe.layers.expert_parallel import ExpertParallel, dealt
from dynmoe.layers.moe import MoELayer, moe_layers
from dynmoe.layers.routers import Router


class MoEExpertParallelStrategy(DDPStrategy):
    """Lightning's ``DDPStrategy``, under which ``size`` ranks share the experts of each MoE layer;
    None: all ranks.

    A rank keeps parameters, gradients and optimizer state of the experts that it owns, and of all
    else what DDP keeps. Training computes what one device computes
    (tests/adaptation/test_expert_parallel.py). Experts are dealt evenly; after an update of
    adaptation they move until no rank has two more than another. Checkpoints are those of one
    device, and may be resumed on any number of ranks.

    Raises:
        ConfigError: at the start of ``fit``: ``size`` does not divide the ranks, no MoE layer, or
            one whose routing or loss needs the weights of all experts.
    """

    def __init__(self, size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.size = size
        self._experts: SharedExperts | None = None

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        size = self.world_size if self.size is None else self.size
        self._experts = SharedExperts(model, size)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, self._experts.names
        )
        return super()._setup_model(model)

    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        if self._experts is not None:
            clip = self._experts.clip_by_norm
            self.precision_plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._experts is not None:
            self._experts.average_gradients()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of all experts, on rank 0."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        if self._experts is not None:
            state |= self._experts.weights()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of all experts, on rank 0."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if self._experts is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state["state"] = self._experts.gathered_state(state["state"], parameters)
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._experts is not None:
            for optimizer in self.optimizers:
                self._experts.forget_others(optimizer)


class SharedExperts:
    """The experts of a model, dealt to groups of ``size`` ranks, with rank 0's weights."""

    def __init__(self, model: nn.Module, size: int) -> None:
        ranks = distributed.get_world_size()
        if ranks % size:
            raise ConfigError(
                f"trainer.strategy.size: {size} ranks that share experts do not divide the {ranks} "
                "ranks. Set it to a divisor of trainer.devices, or null"
            )
        # NOTE: not a device mesh, which takes DDP's group where one holds all ranks: the order of
        # DDP's messages among the layers' differs from rank to rank.
        self.group = _own_group([range(i, i + size) for i in range(0, ranks, size)])
        self.replicas = _own_group([range(i, ranks, size) for i in range(size)])
        self.is_first_replica = distributed.get_rank() < size
        self.layers = moe_layers(model)
        if not self.layers:
            raise ConfigError("trainer: no MoE layer has experts to share. Set trainer=ddp")
        self.names: list[str] = []
        self._keys: dict[MoELayer, str] = {
            module: name for name, module in model.named_modules() if isinstance(module, MoELayer)
        }
        for name, layer in self.layers.items():
            check(name, layer)
            pool = layer.experts
            if pool.parallel is not None:
                raise ConfigError(
                    f"trainer: ranks share the experts of {name} since an earlier fit. Make the "
                    "model anew, and give its checkpoint"
                )
            prefix = f"{self._keys[layer]}.experts.slots."
            self.names += [f"{prefix}{key}" for key in pool.slots.state_dict()]
            for tensor in (*pool.slots.parameters(), *pool.slots.buffers()):
                distributed.broadcast(tensor.detach(), 0)
            for p in pool.slots.parameters():
                if p.requires_grad:
                    # All ranks' tokens are in it, and DDP's other gradients are means over ranks.
                    p.register_hook(lambda grad: grad / size)
            pool.parallel = ExpertParallel(self.group, dealt(layer.live, layer.max_experts, size))
            pool.parallel.release(pool)

    def _owned(self) -> list[nn.Parameter]:
        return [
            p
            for layer in self.layers.values()
            for slot, expert in enumerate(layer.experts.slots)
            if layer.experts.parallel is not None and layer.experts.parallel.owns(slot)
            for p in expert.parameters()
            if p.requires_grad
        ]

    def average_gradients(self) -> None:
        """Average over replicas: a replica without tokens for an expert adds 0. After each backward
        pass."""
        if distributed.get_world_size(self.replicas) > 1:
            average_gradients(self._owned(), group=self.replicas)

    def clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the norm over the gradients of all experts and all other parameters."""
        owned = set(self._owned())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None]
        apart = nn.utils.get_total_norm([p.grad for p in parameters if p in owned])
        others = nn.utils.get_total_norm([p.grad for p in parameters if p not in owned])
        square = apart.to(others.device) ** 2
        distributed.all_reduce(square, group=self.group)
        nn.utils.clip_grads_with_norm_(parameters, clip_val, (square + others**2).sqrt())

    def weights(self) -> dict[str, Tensor]:
        """The entries of experts in the model's ``state_dict``, on rank 0."""
        found: dict[str, Tensor] = {}
        for layer in self.layers.values():
            pool = layer.experts
            assert pool.parallel is not None
            with pool.parallel.whole(pool):  # one layer at a time
                if distributed.get_rank() == 0:
                    prefix = f"{self._keys[layer]}.experts.slots."
                    state = pool.slots.state_dict()
                    found |= {f"{prefix}{k}": v.cpu().clone() for k, v in state.items()}
        return found

    def gathered_state(
        self, state: dict[int, Any], parameters: Sequence[nn.Parameter]
    ) -> dict[int, Any]:
        """An optimizer's state with that of all experts, on rank 0. ``parameters`` by number."""
        if not self.is_first_replica:
            return state
        owned = set(self._owned())
        mine = {
            number: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in each.items()}
            for number, each in state.items()
            if parameters[number] in owned
        }
        is_first = distributed.get_rank() == 0
        every: list[Any] = [None] * distributed.get_world_size(self.group)
        distributed.gather_object(mine, every if is_first else None, group=self.group, group_dst=0)
        if is_first:
            state = dict(
                sorted((state | {n: s for part in every for n, s in part.items()}).items())
            )
        return state

    def forget_others(self, optimizer: Optimizer) -> None:
        """Drop the state of experts that other ranks own."""
        owned = set(self._owned())
        for layer in self.layers.values():
            for p in layer.experts.slots.parameters():
                if p not in owned:
                    optimizer.state.pop(p, None)


def _own_group(every: Sequence[Sequence[int]]) -> Any:
    """A new group for each of ``every``; the one of this rank."""
    groups = [distributed.new_group(list(ranks)) for ranks in every]
    rank = distributed.get_rank()
    return next(group for group, ranks in zip(groups, every, strict=True) if rank in ranks)


def check(name: str, layer: MoELayer) -> None:
    """Refuse a layer whose routing or loss needs the weights or the outputs of all experts.

    Raises:
        ConfigError: naming it.
    """
    router = type(layer.router)
    if router.prepare is not Router.prepare:
        raise ConfigError(
            f"trainer: {router.__name__} of {name} reads the weights of all experts, which ranks "
            "share. Set trainer=ddp or trainer=fsdp2"
        )
    if layer.conflict is not None:
        raise ConfigError(
            f"moe.conflict: {name} compares gradients of a token at all of its experts, which "
            "ranks share. Set trainer=ddp, or moe.conflict=null"
        )
