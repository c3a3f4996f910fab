"""Changes between optimizer steps: the state of routers, and which experts there are."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.adaptation.adapt import Adaptation
    from dynmoe.adaptation.callback import DynMoECallback, RouterCallback
    from dynmoe.adaptation.decision import Decision, GrowthSchedule, Schedule, decide
    from dynmoe.adaptation.expert_parallel import MoEExpertParallelStrategy
    from dynmoe.adaptation.fsdp import MoEFSDPStrategy
    from dynmoe.adaptation.fsdp2 import MoEFSDP2Strategy
    from dynmoe.adaptation.growth import DriftGrowth
    from dynmoe.adaptation.mass_callback import MassCallback
    from dynmoe.adaptation.trainer_callback import DynMoETrainerCallback, MoETrainerCallback
    from dynmoe.adaptation.updates import RouterUpdates

__all__ = [
    "Adaptation",
    "Decision",
    "DriftGrowth",
    "DynMoECallback",
    "DynMoETrainerCallback",
    "GrowthSchedule",
    "MassCallback",
    "MoEExpertParallelStrategy",
    "MoEFSDP2Strategy",
    "MoEFSDPStrategy",
    "MoETrainerCallback",
    "RouterCallback",
    "RouterUpdates",
    "Schedule",
    "decide",
]

# A plain loop needs neither Lightning nor transformers.
__getattr__ = lazy(
    __name__,
    {
        "adapt": "Adaptation",
        "callback": "DynMoECallback RouterCallback",
        "expert_parallel": "MoEExpertParallelStrategy",
        "decision": "Decision GrowthSchedule Schedule decide",
        "fsdp": "MoEFSDPStrategy",
        "fsdp2": "MoEFSDP2Strategy",
        "growth": "DriftGrowth",
        "mass_callback": "MassCallback",
        "trainer_callback": "DynMoETrainerCallback MoETrainerCallback",
        "updates": "RouterUpdates",
    },
)
