"""Layers in plain torch, usable in any training loop."""

from lightning_danns.layers.column_ei import ColumnEILinear
from lightning_danns.layers.dale import (
    DaleModule,
    DANNComponents,
    dale_layers,
    project_,
    refuse_negative_inputs,
    sign_violations,
    unobservable,
)
from lightning_danns.layers.dann_conv import DANNConv2d
from lightning_danns.layers.dann_linear import DANNLinear

__all__ = [
    "ColumnEILinear",
    "DANNComponents",
    "DANNConv2d",
    "DANNLinear",
    "DaleModule",
    "dale_layers",
    "project_",
    "refuse_negative_inputs",
    "sign_violations",
    "unobservable",
]
