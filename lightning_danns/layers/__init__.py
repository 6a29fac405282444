"""Layers in plain torch, usable in any training loop."""

from lightning_danns.layers.batch_norm import DaleBatchNorm1d, DaleBatchNorm2d
from lightning_danns.layers.column_ei import ColumnEILinear
from lightning_danns.layers.dale import (
    Balance,
    DaleModule,
    DANNComponents,
    dale_layers,
    imbalance,
    imbalances,
    project_,
    refuse_negative_inputs,
    sign_violations,
    unobservable,
)
from lightning_danns.layers.dann_conv import DANNConv2d
from lightning_danns.layers.dann_linear import DANNLinear
from lightning_danns.layers.standardise import standardise_
from lightning_danns.layers.strength import strengthen_

__all__ = [
    "Balance",
    "ColumnEILinear",
    "DANNComponents",
    "DANNConv2d",
    "DANNLinear",
    "DaleBatchNorm1d",
    "DaleBatchNorm2d",
    "DaleModule",
    "dale_layers",
    "imbalance",
    "imbalances",
    "project_",
    "refuse_negative_inputs",
    "sign_violations",
    "standardise_",
    "strengthen_",
    "unobservable",
]
