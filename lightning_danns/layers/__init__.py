"""Layers in plain torch, usable in any training loop."""

from lightning_danns.layers.dale import (
    DaleModule,
    dale_layers,
    project_,
    refuse_negative_inputs,
    sign_violations,
)
from lightning_danns.layers.dann import DANNComponents, DANNLinear

__all__ = [
    "DANNComponents",
    "DANNLinear",
    "DaleModule",
    "dale_layers",
    "project_",
    "refuse_negative_inputs",
    "sign_violations",
]
