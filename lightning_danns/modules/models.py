"""The experiments: which network of which layers, as LightningModules with flat, serialisable arguments."""

from collections.abc import Sequence
from typing import Any

from lightning_danns.modules.base import ImageClassifier
from lightning_danns.networks import DANNFamily, Norm, StandardFamily, mlp


class DANNMLP(ImageClassifier):
    """Multilayer perceptron of Dale's ANN layers; its output layer has one interneuron.

    Args:
        hidden_sizes: excitatory units of each hidden layer.
        ni: interneurons, one number for every hidden layer or one each; a tenth of the units if not given.
        divisive: whether inhibition divides as well as subtracts.
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
        divisive: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = mlp(self.input_shape, hidden_sizes, self.num_classes, DANNFamily(divisive), ni)


class MLP(ImageClassifier):
    """Ordinary multilayer perceptron, the control: W ~ N(0, k/d) with k = 1 in the first layer and 2 elsewhere.

    Args:
        hidden_sizes: units of each hidden layer.
        norm: normalisation of the hidden layers: ``"none"``, ``"layer"`` or ``"batch"``.
        kwargs: see `ImageClassifier`.
    """

    def __init__(self, hidden_sizes: Sequence[int] = (500, 500, 500), norm: Norm = "none", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = mlp(self.input_shape, hidden_sizes, self.num_classes, StandardFamily(norm))
