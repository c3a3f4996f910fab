"""How experts come and go: a schedule, a pure decision, and the callback that applies it."""

from dynmoe.adaptation.callback import Decision, DynMoECallback, Schedule, decide
from dynmoe.adaptation.fsdp import MoEFSDPStrategy

__all__ = ["Decision", "DynMoECallback", "MoEFSDPStrategy", "Schedule", "decide"]
