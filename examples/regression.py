"""Regression on vectors of your own. Inhibition only subtracts, because division would remove the input's scale.

python examples/regression.py                              # made-up numbers
python examples/regression.py --table my.csv --epochs 200  # numbers with a header; the last column is the target
"""

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_danns import DANNLinear, Regression, assert_dale


class Line(Regression):
    def __init__(self, d: int = 8, width: int = 50, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(DANNLinear(d, width, width // 10, divisive=False), nn.ReLU(), nn.Linear(width, 1))


def read(table: str | None) -> tuple[Tensor, Tensor]:
    """Inputs (N, d) and targets (N, 1), standardised."""
    if table is None:
        x = torch.randn(1000, 4)
        y = x[:, :1] * x[:, 1:2] + x[:, 2:3]
    else:
        values = torch.from_numpy(np.loadtxt(table, delimiter=",", skiprows=1)).float()
        x, y = values[:, :-1], values[:, -1:]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def on_off(x: Tensor) -> Tensor:
    """Each input as a pair of non-negative ones, (N, 2 d), because a DANN has no negative inputs."""
    return torch.cat([x.relu(), (-x).relu()], 1)


def main(table: str | None = None, epochs: int = 30, width: int = 50, seed: int = 0):
    """Train on four fifths of the rows; return the module and its Trainer."""
    pl.seed_everything(seed)
    x, y = read(table)
    train, val = random_split(TensorDataset(on_off(x), y), [0.8, 0.2])
    model, trainer = Line(2 * x.shape[1], width), pl.Trainer(max_epochs=epochs, default_root_dir="runs")
    trainer.fit(model, DataLoader(train, 32, shuffle=True), DataLoader(val, 200))
    assert_dale(model)
    return model, trainer


if __name__ == "__main__":
    auto_cli(main)
