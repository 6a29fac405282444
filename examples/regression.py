"""Regression on vectors. Inhibition only subtracts, because division would remove the scale of the input."""

from torch import nn

from lightning_danns import DANNLinear, Regression


class Line(Regression):
    def __init__(self, d: int = 8, width: int = 50, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(DANNLinear(d, width, width // 10, divisive=False), nn.ReLU(), nn.Linear(width, 1))
