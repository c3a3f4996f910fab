"""How experts come and go: schedule, pure decision, and the process in any training loop."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.adaptation.adapt import Adaptation
    from dynmoe.adaptation.callback import DynMoECallback
    from dynmoe.adaptation.decision import Decision, Schedule, decide
    from dynmoe.adaptation.fsdp import MoEFSDPStrategy
    from dynmoe.adaptation.trainer_callback import DynMoETrainerCallback

__all__ = [
    "Adaptation",
    "Decision",
    "DynMoECallback",
    "DynMoETrainerCallback",
    "MoEFSDPStrategy",
    "Schedule",
    "decide",
]

# A plain loop needs neither Lightning nor transformers.
__getattr__ = lazy(
    __name__,
    {
        "adapt": "Adaptation",
        "callback": "DynMoECallback",
        "decision": "Decision Schedule decide",
        "fsdp": "MoEFSDPStrategy",
        "trainer_callback": "DynMoETrainerCallback",
    },
)
