"""Classification of sequences by a recurrent DANN: each row of an image is one step."""

import torch
from torch import nn

from lightning_danns import Classification, DANNLinear


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
