"""Models with MoE layers under PyTorch's FSDP2 (``fully_shard``): each rank holds a share of every
parameter.

FSDP2 sums the gradients of those parameters that have one on this rank. Ranks that use different
experts would so sum the gradients of different parameters: every rank gives a gradient for every
expert, 0 where it has none, and an expert that no rank used loses it again, as on one device.

Routers are kept whole on all ranks: FSDP2 takes no scalars, which thresholds are, and they are
small. Experts are made whole to be changed (``adapt.whole``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dynmoe.adaptation.fsdp import average_gradients, blocks
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, moe_layers

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class MoEFSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy``, with ``fully_shard`` on the blocks that transformers
    names.

    It shards any LightningModule, which needs no ``configure_model``. Parameters are gathered in
    the precision they are kept in, gradients reduced in it; products are computed in that of
    ``trainer.precision`` by autocast, as on one device: routers stay in fp32. Training computes
    what one device computes (tests/adaptation/test_fsdp2.py), weight decay included. Checkpoints
    are those of one device.

    ``reshard_after_forward=False`` keeps a block whole until its backward pass: less to send.

    Raises:
        ConfigError: PyTorch's FSDP2 cannot yet reduce parameters that only some ranks used.
    """

    def __init__(self, reshard_after_forward: bool = True, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"trainer.strategy: PyTorch {torch.__version__} gives experts that one rank alone "
                "used wrong gradients under fully_shard. Take PyTorch 2.14, or trainer=fsdp."
            )
        self.reshard_after_forward = reshard_after_forward
        self._shards: Shards | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model before its optimizer is made."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._shards = Shards(
            self.model, self.device_mesh["data_parallel"], self.reshard_after_forward
        )
        for step in STEPS:  # Lightning calls these, not the forward of the module
            register_fsdp_forward_method(self.model, step)
        is_training = trainer.state.fn == TrainerFn.FITTING
        if is_training:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                SplitGroups(optimizer)
        self.setup_precision_plugin()
        self.precision_plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign]
        if is_training:
            _optimizers_to_device(self.optimizers, self.root_device)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        assert self._shards is not None
        self._shards.settle_gradients()

    def optimizer_step(self, *args: Any, **named: Any) -> Any:
        out = super().optimizer_step(*args, **named)
        assert self._shards is not None
        self._shards.end_step()
        return out

    # Checkpoints: the parent's would give all parameters a state of the optimizer, empty slots too.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # weights are read into the whole model, before it is sharded

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, *args: Any, **named: Any) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, *args, **named)

    def load_model_state_dict(self, *args: Any, **named: Any) -> None:
        ParallelStrategy.load_model_state_dict(self, *args, **named)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on rank 0, nothing on the others."""
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, keyed as on one device; nothing on the others."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        moments = {key: gathered(each) for key, each in sorted(state["state"].items())}
        return {**state, "state": moments} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {key: scattered(each, own[key]) for key, each in state["state"].items()}
            optimizer.load_state_dict({**state, "state": shares})


class Shards:
    """A model whose blocks, and the rest of it as one more, are sharded over the ranks of ``mesh``.

    All ranks start from rank 0's weights.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), 0)
        self.layers = moe_layers(model)
        self.whole = unsharded(model)
        kinds = blocks(model)
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(self.whole)}
        for block in [m for m in model.modules() if type(m) in kinds][::-1]:  # inner ones first
            fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        root: Any = fully_shard(model, **options)
        root.set_reduce_scatter_unused_params(True)
        for layer in self.layers.values():
            layer.experts.sharded = True
            layer.experts.register_forward_pre_hook(partial(self._saw_experts, layer))
        self._used: dict[MoELayer, Tensor] = {}

    def _saw_experts(self, layer: MoELayer, _: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            used_E = args[1].dispatch_TE.any(0)
            # NOTE: by the mask on the device: slots' numbers would have to be sent there.
            used_S = torch.zeros_like(layer.active_E).masked_scatter(layer.active_E, used_E)
            before_S = self._used.get(layer)
            self._used[layer] = used_S if before_S is None else before_S | used_S

    def settle_gradients(self) -> None:
        """Average the gradients that FSDP2 leaves alone, and take the zeros from experts that no
        rank has used in this step: an optimizer would move and decay them by its moments.

        After each backward pass.
        """
        layers = self.layers.values()
        used = [self._used.get(layer, torch.zeros_like(layer.active_E)) for layer in layers]
        dtype = next((p.dtype for p in self.whole), torch.float32)
        flags = [used_S.to(dtype) for used_S in used]
        average_gradients(self.whole, *flags)
        shares = torch.cat(flags).tolist() if flags else []
        experts = (expert for layer in layers for expert in layer.experts.slots)
        for expert, share in zip(experts, shares, strict=True):
            if not share:
                for p in expert.parameters():
                    p.grad = None

    def end_step(self) -> None:
        """Forget who was used: the optimizer has taken its step."""
        self._used = {}


def unsharded(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank keeps whole: those of routers, and scalars."""
    routers = [p for layer in moe_layers(model).values() for p in layer.router.parameters()]
    scalars = [p for p in model.parameters() if p.ndim == 0]
    return list(dict.fromkeys([*routers, *scalars]))


class SplitGroups:
    """Within a step of ``optimizer`` no group of it holds both shares and whole parameters, which
    fused and foreach operations take apart from each other alone."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups: list[dict[str, Any]] = []
        optimizer.register_step_pre_hook(self._split)
        optimizer.register_step_post_hook(self._join)

    def _split(self, optimizer: Optimizer, *_: Any) -> None:
        self._groups, optimizer.param_groups = optimizer.param_groups, []
        for group in self._groups:
            for kind in (True, False):
                own = [p for p in group["params"] if isinstance(p, DTensor) == kind]
                optimizer.param_groups.append({**group, "params": own})

    def _join(self, optimizer: Optimizer, *_: Any) -> None:
        halves, optimizer.param_groups = optimizer.param_groups, self._groups
        for group, half in zip(self._groups, halves[::2], strict=True):
            group.update({key: half[key] for key in half if key != "params"})


def clip_by_norm(optimizer: Optimizer, clip_val: float) -> None:
    """Clip by the norm over all gradients: PyTorch takes either shares or whole ones."""
    every = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    shares: list[Any] = [p for p in every if isinstance(p, DTensor)]
    others = [p for p in every if not isinstance(p, DTensor)]
    norms: list[Any] = [
        nn.utils.get_total_norm([p.grad for p in part]) for part in (shares, others)
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in (shares, others):
        nn.utils.clip_grads_with_norm_(part, clip_val, total)


@torch.no_grad()
def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of ``state``, whole and on the CPU, on rank 0; all ranks call it alike."""
    found = {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if distributed.get_rank() == 0:
            found[key] = value.cpu() if isinstance(value, Tensor) else value
    return found


def scattered(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """This rank's share of what an optimizer keeps of ``parameter``."""
    return {key: share_of(value, parameter) for key, value in state.items()}


def share_of(value: Any, parameter: Tensor) -> Any:
    """This rank's share of a whole tensor of the shape of ``parameter``, sharded as that is."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    # Every rank has the whole: none has to send it.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
