"""Trained runs for other software, and published MoE-LLaVA and DynMoE-LLaVA checkpoints as ours."""

from typing import TYPE_CHECKING

from dynmoe.lazy import lazy

if TYPE_CHECKING:
    from dynmoe.convert.transformers_folder import save_transformers

__all__ = ["save_transformers"]

__getattr__ = lazy(__name__, {"transformers_folder": "save_transformers"})
