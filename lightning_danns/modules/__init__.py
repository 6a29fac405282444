"""LightningModules: the base under Dale's principle, tasks on it, and the experiments of this package."""

from lightning_danns.modules.base import DaleLightningModule
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
from lightning_danns.modules.released import export_pretrained, load_pretrained
from lightning_danns.modules.tasks import Classification, ImageClassifier, Regression, Task

__all__ = [
    "DANNMLP",
    "DANNVGG",
    "MLP",
    "VGG",
    "Classification",
    "ColumnEIMLP",
    "ConvNet",
    "DANNConvNet",
    "DANNResNet",
    "DaleLightningModule",
    "ImageClassifier",
    "Regression",
    "ResNet",
    "Task",
    "export_pretrained",
    "load_pretrained",
]
