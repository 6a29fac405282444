"""Many replicas in one process: each is the single run of its seed and learning rate."""

import csv
import functools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_danns import (
    DANNMLP,
    MLP,
    ColumnEIMLP,
    ConvNet,
    DANNConvNet,
    DANNLinear,
    DiagonalNGD,
    ImageClassifier,
    LayerGradientClipping,
    MNISTDataModule,
    ReplicatedClassifier,
    UsageError,
)
from lightning_danns.testing import assert_dale

SGD = functools.partial(torch.optim.SGD, lr=0.05)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3)
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
SMALL = functools.partial(DANNMLP, hidden_sizes=[12, 9], ni=[3, 2])


@pytest.fixture
def data(data_dir):
    return MNISTDataModule(str(data_dir), val_size=50, order_seed=5)


def single(classifier, seed, rate=None):
    """The classifier of a run of its own: its seed alone, and its learning rate in its optimizer."""
    torch.manual_seed(seed)
    model = classifier()
    if rate is not None:
        factory = model.optimizer_factory
        model.optimizer_factory = functools.partial(factory.func, **{**factory.keywords, "lr": rate})
    return model


def assert_same(replica, run, **tolerance):
    for (name, ours), theirs in zip(replica.state_dict().items(), run.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    "classifier",
    [
        SMALL,
        functools.partial(DANNMLP, hidden_sizes=[12], divisive=False, correction="none"),
        functools.partial(ColumnEIMLP, hidden_sizes=[22]),
        functools.partial(MLP, hidden_sizes=[12], norm="layer"),
        functools.partial(MLP, hidden_sizes=[12], norm="batch"),
        functools.partial(DANNConvNet, channels=[4, 6], hidden_sizes=[8]),
        functools.partial(ConvNet, channels=[4], hidden_sizes=[8], norm="batch"),
    ],
    ids=["dann", "subtractive", "column_ei", "layernorm", "batchnorm", "dann_conv", "conv_batchnorm"],
)
def test_a_replica_is_the_single_run_of_its_seed_and_rate(classifier, optimizer, data, make_trainer):
    classifier = functools.partial(classifier, optimizer=optimizer)
    precise = {"precision": "64-true", "max_epochs": 3}
    rates = [0.02, 0.003]
    model = ReplicatedClassifier(classifier, seeds=[3, 8], learning_rates=rates)
    together = make_trainer(**precise)
    together.fit(model, datamodule=data)
    for index, (rate, seed) in enumerate([(rates[0], 3), (rates[0], 8), (rates[1], 3), (rates[1], 8)]):
        if index in (0, 3):
            run, alone = single(classifier, seed, rate), make_trainer(**precise)
            alone.fit(run, datamodule=data)
            assert_same(model.replicas[index], run, rtol=1e-6, atol=1e-8)
            for name in alone.logged_metrics:
                assert together.logged_metrics[f"{name}/{index}"] == pytest.approx(float(alone.logged_metrics[name]))
