"""An autoencoder: a task whose targets are its inputs."""

from torch import nn

from lightning_danns import DANNLinear, Task


class Autoencoder(Task):
    def __init__(self, d: int = 784, code: int = 30, **kwargs):
        super().__init__(**kwargs)
        encoder = DANNLinear(d, code, 3, inputs="pixels"), nn.ReLU()
        self.network = nn.Sequential(nn.Flatten(), *encoder, nn.Linear(code, d))

    def step(self, batch):
        x = batch[0].flatten(1)
        return (outputs := self(x)), x, self.loss(outputs, x)
