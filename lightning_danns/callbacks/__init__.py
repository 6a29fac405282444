"""What acts and watches while a Trainer runs."""

from lightning_danns.callbacks.compiling import Compiled
from lightning_danns.callbacks.conflicts import refuse_conflicts, refuse_unlogged
from lightning_danns.callbacks.finetuning import StartFrom, Unfreeze, load_body_
from lightning_danns.callbacks.monitoring import DaleDiagnostics, FisherMonitor
from lightning_danns.callbacks.projection import DaleProjection, refuse_unprojected
from lightning_danns.callbacks.start import StandardisedStart, StrongStart
from lightning_danns.callbacks.steps import CosineStepControl, DecayToInhibition, LayerGradientClipping

__all__ = [
    "Compiled",
    "CosineStepControl",
    "DaleDiagnostics",
    "DaleProjection",
    "DecayToInhibition",
    "FisherMonitor",
    "LayerGradientClipping",
    "StandardisedStart",
    "StartFrom",
    "StrongStart",
    "Unfreeze",
    "load_body_",
    "refuse_conflicts",
    "refuse_unlogged",
    "refuse_unprojected",
]
