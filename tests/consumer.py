"""A user's code, as a strict type checker sees it (tests/test_package.py). Its calls run too."""

import functools
from collections.abc import Iterator
from typing import Any, assert_type

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_danns import DANNMLP, DaleModule, DANNLinear, UsageError, daleify, fisher_param_groups, project_
from lightning_danns.analysis import Daleified
from lightning_danns.layers import DANNComponents


class Excitatory(DaleModule):
    """A layer of one's own."""

    nonnegative = ("W",)

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.rand(3, 4))

    def lr_factors(self) -> dict[str, float]:
        return {"W": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T


def layers() -> None:
    layer = DANNLinear(8, 10, 2, inputs="pixels", balanced=True)
    assert_type(layer.Wex, nn.Parameter)
    assert_type(layer.components(torch.rand(4, 8)), DANNComponents)
    assert_type(Excitatory().nonnegative_parameters(), Iterator[tuple[str, nn.Parameter]])


def own_loop() -> None:
    net = nn.Sequential(DANNLinear(8, 10, 2), nn.ReLU(), DANNLinear(10, 3, 1))
    groups = fisher_param_groups(net, lr=0.1)
    assert_type(groups, list[dict[str, Any]])
    optimizer = torch.optim.SGD(groups)
    net(torch.rand(4, 8)).sum().backward()
    optimizer.step()
    project_(net)


def modules() -> None:
    model = DANNMLP(hidden_sizes=[20], ni=2, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert_type(model.forward(torch.rand(2, 1, 28, 28)), Tensor)
    module: pl.LightningModule = model
    assert_type(module.training, bool)


def conversion() -> None:
    try:
        made = daleify(nn.Linear(4, 3), torch.rand(2, 4), balanced=True)
    except UsageError as error:
        assert_type(error.args, tuple[Any, ...])
        raise
    assert_type(made, Daleified)
    assert_type(made.kept, dict[str, str])


def wrong() -> None:
    """Mistakes that a type checker must find: without an error, its ``type: ignore`` would be one."""
    DANNLinear(8, 10, 2, inputs="normalised")  # type: ignore[arg-type]
    DANNLinear(8, 10)  # type: ignore[call-arg]
    daleify(nn.Linear(4, 3), torch.rand(2, 4), change=["relu"])  # type: ignore[list-item]
    project_(torch.rand(3))  # type: ignore[arg-type]
