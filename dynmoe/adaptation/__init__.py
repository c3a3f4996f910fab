"""How experts come and go: the pure decision, and the callback that applies it between steps."""

from dynmoe.adaptation.callback import Decision, DynMoECallback, Schedule, decide

__all__ = ["Decision", "DynMoECallback", "Schedule", "decide"]
