"""The experiments: which network of which layers, as LightningModules with flat, serialisable arguments."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inhibition
from lightning_danns.layers import ColumnEILinear
from lightning_danns.modules.tasks import ImageClassifier
from lightning_danns.networks import (
    ColumnEIFamily,
    DaleNorm,
    DANNFamily,
    Norm,
    Shortcut,
    StandardFamily,
    cnn,
    mlp,
    resnet,
    vgg,
)


class DANNMLP(ImageClassifier):
    """Multilayer perceptron of Dale's ANN layers; its output layer has one interneuron.

    Args:
        hidden_sizes: excitatory units of each hidden layer.
        ni: interneurons, one number for every hidden layer or one each; a tenth of the units if not given.
        divisive: whether inhibition divides as well as subtracts; if not given, it does unless there is a ``norm``.
        balanced: whether each unit's inhibition is kept equal to its excitation (`DANNLinear`); ``False`` is the
            published method.
        inhibition, eps: how inhibition starts, and the semi-saturation of its division (`DANNLinear`).
        norm: ``"batch"`` standardises hidden units over the batch (`DaleBatchNorm1d`), in place of division.
        kwargs: see `ImageClassifier`.

    Example:
        >>> import torch
        >>> model = DANNMLP(hidden_sizes=[500, 500, 500], ni=50)
        >>> model(torch.rand(32, 1, 28, 28)).shape
        torch.Size([32, 10])
        >>> from lightning_danns.testing import assert_dale
        >>> assert_dale(model)
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (500, 500, 500),
        ni: int | list[int] | None = None,
        divisive: bool | None = None,
        balanced: bool = True,
        inhibition: Inhibition | None = None,
        eps: float | None = None,
        norm: DaleNorm = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = mlp(
            self.input_shape, hidden_sizes, self.num_classes, DANNFamily(divisive, balanced, inhibition, eps, norm), ni
        )


class MLP(ImageClassifier):
    """Ordinary multilayer perceptron, the control: W ~ N(0, k/d) with k = 1 in the first layer and 2 elsewhere.

    Args:
        hidden_sizes: units of each hidden layer.
        norm: normalisation of the hidden layers (`Norm`).
        kwargs: see `ImageClassifier`.
    """

    def __init__(self, hidden_sizes: Sequence[int] = (500, 500, 500), norm: Norm = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = mlp(self.input_shape, hidden_sizes, self.num_classes, StandardFamily(norm))


class ColumnEIMLP(ImageClassifier):
    """Multilayer perceptron whose units excite or inhibit all their targets: Dale's principle without interneurons.

    The bias of the first layer, whose inputs are all excitatory, starts centred on the mean pixel of the data.

    Args:
        hidden_sizes: units of each hidden layer, excitatory and inhibitory together (550 = 500 + 50).
        ratio: excitatory units for each inhibitory one.
        pixel_mean: mean pixel in [0, 1]; taken from the data module when the first fit starts if not given.
        balanced: whether the inhibitory weights onto each unit are kept equal in sum to its excitatory ones, in every
            layer that has inhibitory inputs (all but the first).
        kwargs: see `ImageClassifier`.
    """

    centred: torch.Tensor

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (550, 550, 550),
        ratio: int = 10,
        pixel_mean: float | None = None,
        balanced: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = mlp(self.input_shape, hidden_sizes, self.num_classes, ColumnEIFamily(ratio, balanced))
        # saved with the weights, so that a trained network is never centred again; a float, which can be averaged
        self.register_buffer("centred", torch.tensor(0.0))
        if pixel_mean is not None:
            self._centre_(pixel_mean)

    def on_train_start(self) -> None:  # not earlier, because all strategies have restored a checkpoint only here
        super().on_train_start()
        if self.centred:
            return
        bias = self._first.b
        if bias is not None and bool(bias.any()):
            return  # away from its start at 0, it was trained or loaded without this module's flag
        mean = getattr(getattr(self.trainer, "datamodule", None), "pixel_mean", None)
        if mean is None:
            raise UsageError(
                "ColumnEIMLP needs the mean pixel of its data: give pixel_mean, or a data module that has it"
            )
        self._centre_(mean)

    @property
    def _first(self) -> ColumnEILinear:
        return next(layer for layer in self.modules() if isinstance(layer, ColumnEILinear))

    def _centre_(self, pixel_mean: float) -> None:
        self._first.centre_(pixel_mean)
        self.centred.fill_(1)


class DANNConvNet(ImageClassifier):
    """Small convolutional network of Dale's ANN layers, for images of 28 x 28 or 32 x 32 pixels and others.

    Args:
        channels: excitatory channels of each 3x3 convolution; each is followed by ReLU and 2x2 max-pooling.
        hidden_sizes: excitatory units of each hidden dense layer.
        conv_ni: interneurons of each convolution, one number or one each; a tenth of the channels if not given.
        ni: the same for the hidden dense layers.
        divisive: whether inhibition divides as well as subtracts; if not given, it does unless there is a ``norm``.
        balanced: whether each unit's inhibition is kept equal to its excitation (`DANNLinear`); ``False`` is the
            published method.
        inhibition, eps: how inhibition starts, and the semi-saturation of its division (`DANNLinear`).
        norm: ``"batch"`` standardises hidden units over the batch (`DaleBatchNorm1d`), in place of division.
        kwargs: see `ImageClassifier`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        hidden_sizes: Sequence[int] = (256,),
        conv_ni: int | list[int] | None = None,
        ni: int | list[int] | None = None,
        divisive: bool | None = None,
        balanced: bool = True,
        inhibition: Inhibition | None = None,
        eps: float | None = None,
        norm: DaleNorm = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        blocks = _one_each(channels)
        self.network = cnn(
            self.input_shape,
            blocks,
            hidden_sizes,
            self.num_classes,
            DANNFamily(divisive, balanced, inhibition, eps, norm),
            conv_ni=conv_ni,
            ni=ni,
        )


class ConvNet(ImageClassifier):
    """The control of `DANNConvNet`: ordinary layers, He-normal weights, zero biases.

    Args:
        channels, hidden_sizes: see `DANNConvNet`.
        norm: as in `Norm`, but not ``"layer"``.
        kwargs: see `ImageClassifier`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        hidden_sizes: Sequence[int] = (256,),
        norm: Norm = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        blocks = _one_each(channels)
        self.network = cnn(self.input_shape, blocks, hidden_sizes, self.num_classes, StandardFamily(norm))


def _one_each(channels: Sequence[int]) -> list[list[int]]:
    """Blocks of one convolution."""
    if isinstance(channels, Integral):
        raise UsageError(f"channels={channels}: give a list, one number for each convolution")
    return [[n] for n in channels]


class DANNVGG(ImageClassifier):
    """VGG of Dale's ANN layers; interneurons 10-20-40-80-80 in the blocks, 409, 409 and 1 in the dense layers.

    Args:
        depth: 16 or 19 layers.
        dropout: probability of dropping a hidden dense unit.
        divisive: whether inhibition divides as well as subtracts; if not given, it does unless there is a ``norm``.
        balanced: whether each unit's inhibition is kept equal to its excitation (`DANNLinear`); ``False`` is the
            published method.
        inhibition, eps: how inhibition starts, and the semi-saturation of its division (`DANNLinear`).
        norm: ``"batch"`` standardises hidden units over the batch (`DaleBatchNorm1d`), in place of division.
        kwargs: see `ImageClassifier`.
    """

    def __init__(
        self,
        depth: int = 16,
        dropout: float = 0.5,
        divisive: bool | None = None,
        balanced: bool = True,
        inhibition: Inhibition | None = None,
        eps: float | None = None,
        norm: DaleNorm = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = vgg(
            depth, self.input_shape, self.num_classes, DANNFamily(divisive, balanced, inhibition, eps, norm), dropout
        )


class VGG(ImageClassifier):
    """The control of `DANNVGG`: ordinary layers, He-normal weights, zero biases.

    Args:
        depth: 16 or 19 layers.
        dropout: probability of dropping a hidden dense unit.
        norm: as in `Norm`, but not ``"layer"``.
        kwargs: see `ImageClassifier`.
    """

    def __init__(self, depth: int = 16, dropout: float = 0.5, norm: Norm = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = vgg(depth, self.input_shape, self.num_classes, StandardFamily(norm), dropout)


class DANNResNet(ImageClassifier):
    """Residual network of Dale's ANN layers; interneurons a tenth of the channels.

    Args:
        depth: 20, 32 or 56 (for 32 x 32 pixels), 18, 34 or 50 (for larger images).
        shortcut: where a block adds its input: ``"after"`` its last ReLU or ``"before"`` it (`ResidualBlock`).
        divisive: whether inhibition divides as well as subtracts; if not given, it does unless there is a ``norm``.
        balanced: whether each unit's inhibition is kept equal to its excitation (`DANNLinear`); ``False`` is the
            published method.
        inhibition, eps: how inhibition starts, and the semi-saturation of its division (`DANNLinear`).
        norm: ``"batch"`` standardises hidden units over the batch (`DaleBatchNorm1d`), in place of division.
        kwargs: see `ImageClassifier`.
    """

    def __init__(
        self,
        depth: int = 20,
        shortcut: Shortcut = "after",
        divisive: bool | None = None,
        balanced: bool = True,
        inhibition: Inhibition | None = None,
        eps: float | None = None,
        norm: DaleNorm = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        family = DANNFamily(divisive, balanced, inhibition, eps, norm)
        self.network = resnet(depth, self.input_shape, self.num_classes, family, shortcut)


class ResNet(ImageClassifier):
    """The control of `DANNResNet`: the same graph of ordinary layers, He-normal weights, zero biases.

    Args:
        depth: see `DANNResNet`.
        shortcut: see `DANNResNet`; ``"before"`` is the usual place.
        norm: as in `Norm`, but not ``"layer"``.
        kwargs: see `ImageClassifier`.
    """

    def __init__(self, depth: int = 20, shortcut: Shortcut = "before", norm: Norm = "batch", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        family = StandardFamily(norm, conv_bias=norm in ("none", "centred"))
        self.network = resnet(depth, self.input_shape, self.num_classes, family, shortcut)
