"""How experts come and go: the pure decision, and the callback that applies it between steps."""

from dynmoe.adaptation.callback import Decision, DynMoECallback, Schedule, decide
from dynmoe.adaptation.fsdp import MoEFSDPStrategy

__all__ = ["Decision", "DynMoECallback", "MoEFSDPStrategy", "Schedule", "decide"]
