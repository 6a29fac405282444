"""Dale's ANNs for PyTorch Lightning. Names load on first use: layers do not wait for Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_danns.analysis import activity as activity
    from lightning_danns.analysis import daleify as daleify
    from lightning_danns.callbacks import Compiled as Compiled
    from lightning_danns.callbacks import CosineStepControl as CosineStepControl
    from lightning_danns.callbacks import DaleDiagnostics as DaleDiagnostics
    from lightning_danns.callbacks import DaleProjection as DaleProjection
    from lightning_danns.callbacks import DecayToInhibition as DecayToInhibition
    from lightning_danns.callbacks import FisherMonitor as FisherMonitor
    from lightning_danns.callbacks import LayerGradientClipping as LayerGradientClipping
    from lightning_danns.callbacks import StandardisedStart as StandardisedStart
    from lightning_danns.callbacks import StartFrom as StartFrom
    from lightning_danns.callbacks import StrongStart as StrongStart
    from lightning_danns.callbacks import Unfreeze as Unfreeze
    from lightning_danns.callbacks import load_body_ as load_body_
    from lightning_danns.data import CIFAR10DataModule as CIFAR10DataModule
    from lightning_danns.data import FashionMNISTDataModule as FashionMNISTDataModule
    from lightning_danns.data import ImageDataModule as ImageDataModule
    from lightning_danns.data import ImageFolderDataModule as ImageFolderDataModule
    from lightning_danns.data import ImageNetDataModule as ImageNetDataModule
    from lightning_danns.data import KMNISTDataModule as KMNISTDataModule
    from lightning_danns.data import MNIST5kDataModule as MNIST5kDataModule
    from lightning_danns.data import MNISTDataModule as MNISTDataModule
    from lightning_danns.errors import UsageError as UsageError
    from lightning_danns.layers import ColumnEILinear as ColumnEILinear
    from lightning_danns.layers import DaleBatchNorm1d as DaleBatchNorm1d
    from lightning_danns.layers import DaleBatchNorm2d as DaleBatchNorm2d
    from lightning_danns.layers import DaleModule as DaleModule
    from lightning_danns.layers import DANNConv2d as DANNConv2d
    from lightning_danns.layers import DANNLinear as DANNLinear
    from lightning_danns.layers import project_ as project_
    from lightning_danns.layers import standardise_ as standardise_
    from lightning_danns.layers import strengthen_ as strengthen_
    from lightning_danns.modules import DANNMLP as DANNMLP
    from lightning_danns.modules import DANNVGG as DANNVGG
    from lightning_danns.modules import MLP as MLP
    from lightning_danns.modules import VGG as VGG
    from lightning_danns.modules import Classification as Classification
    from lightning_danns.modules import ColumnEIMLP as ColumnEIMLP
    from lightning_danns.modules import ConvNet as ConvNet
    from lightning_danns.modules import DaleLightningModule as DaleLightningModule
    from lightning_danns.modules import DANNConvNet as DANNConvNet
    from lightning_danns.modules import DANNResNet as DANNResNet
    from lightning_danns.modules import ImageClassifier as ImageClassifier
    from lightning_danns.modules import Regression as Regression
    from lightning_danns.modules import ResNet as ResNet
    from lightning_danns.modules import Task as Task
    from lightning_danns.modules import export_pretrained as export_pretrained
    from lightning_danns.modules import load_pretrained as load_pretrained
    from lightning_danns.optim import DiagonalNGD as DiagonalNGD
    from lightning_danns.optim import Sequential as Sequential
    from lightning_danns.optim import WarmupCosine as WarmupCosine
    from lightning_danns.optim import fisher_param_groups as fisher_param_groups
    from lightning_danns.optim import fisher_ratios as fisher_ratios
    from lightning_danns.optim import measured_factors as measured_factors
    from lightning_danns.replicas import ReplicatedClassifier as ReplicatedClassifier
    from lightning_danns.testing import assert_dale as assert_dale

__version__ = "0.1.0"

_ROOMS = {
    "layers": (
        "ColumnEILinear DANNConv2d DANNLinear DaleBatchNorm1d DaleBatchNorm2d DaleModule project_ standardise_ "
        "strengthen_"
    ),
    "optim": "DiagonalNGD Sequential WarmupCosine fisher_param_groups fisher_ratios measured_factors",
    "callbacks": (
        "Compiled CosineStepControl DaleDiagnostics DaleProjection DecayToInhibition FisherMonitor "
        "LayerGradientClipping StandardisedStart StartFrom StrongStart Unfreeze load_body_"
    ),
    "modules": (
        "Classification ColumnEIMLP ConvNet DANNConvNet DANNMLP DANNResNet DANNVGG DaleLightningModule "
        "ImageClassifier MLP Regression ResNet Task VGG export_pretrained load_pretrained"
    ),
    "replicas": "ReplicatedClassifier",
    "analysis": "activity daleify",
    "data": (
        "CIFAR10DataModule FashionMNISTDataModule ImageDataModule ImageFolderDataModule ImageNetDataModule "
        "KMNISTDataModule MNIST5kDataModule MNISTDataModule"
    ),
    "errors": "UsageError",
    "testing": "assert_dale",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
