"""How experts come and go: the pure decision, and the callback that applies it between steps."""

from dynmoe.adaptation.callback import DynMoECallback
from dynmoe.adaptation.controller import Plan, plan
from dynmoe.adaptation.schedule import Schedule

__all__ = ["DynMoECallback", "Plan", "Schedule", "plan"]
