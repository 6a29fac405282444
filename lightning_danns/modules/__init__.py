"""LightningModules: the experiments of this package, and the base of yours."""

from lightning_danns.modules.base import ImageClassifier
from lightning_danns.modules.models import (
    DANNMLP,
    DANNVGG,
    MLP,
    VGG,
    ColumnEIMLP,
    ConvNet,
    DANNConvNet,
    DANNResNet,
    ResNet,
)
from lightning_danns.modules.replicated import ReplicatedClassifier

__all__ = [
    "DANNMLP",
    "DANNVGG",
    "MLP",
    "VGG",
    "ColumnEIMLP",
    "ConvNet",
    "DANNConvNet",
    "DANNResNet",
    "ImageClassifier",
    "ReplicatedClassifier",
    "ResNet",
]
