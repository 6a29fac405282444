"""Batch normalisation under Dale's principle: torch's own numbers, and gains that stay non-negative."""

import functools
import re

import pytest
import torch
from torch import nn

from lightning_danns import (
    DaleBatchNorm1d,
    DaleBatchNorm2d,
    DANNConvNet,
    DANNLinear,
    DANNResNet,
    UsageError,
    project_,
    standardise_,
)
from lightning_danns.layers import DaleModule, dale_layers
from lightning_danns.networks import DANNFamily
from lightning_danns.testing import assert_dale


@pytest.mark.parametrize(
    ("ours", "torchs", "shape"),
    [(DaleBatchNorm1d, nn.BatchNorm1d, (20, 6)), (DaleBatchNorm2d, nn.BatchNorm2d, (4, 6, 3, 5))],
)
def test_values_and_gradients_are_those_of_torch(ours, torchs, shape):
    torch.manual_seed(0)
    layer, reference = ours(6).double(), torchs(6).double()
    with torch.no_grad():
        for own, other in ((layer.g, reference.weight), (layer.b, reference.bias)):
            other.copy_(own.copy_(torch.rand(6)))
    for training in (True, True, False):  # twice, so that the running statistics have moved
        layer.train(training)
        reference.train(training)
        u = 3 * torch.randn(shape, dtype=torch.float64)
        dz, gradients = torch.randn_like(u), []
        for module, parameters in ((layer, (layer.g, layer.b)), (reference, (reference.weight, reference.bias))):
            x = u.clone().requires_grad_()
            gradients.append([z := module(x), *torch.autograd.grad(z, (x, *parameters), dz)])
        torch.testing.assert_close(*gradients)


def test_a_negative_gain_is_seen_and_clamped():
    network = nn.Sequential(DANNLinear(4, 6, 1, bias=False), DaleBatchNorm1d(6))
    assert_dale(network)
    network[1].g.data[2] = -1
    with pytest.raises(AssertionError, match=r"1\.g"):
        assert_dale(network)
    project_(network)
    assert network[1].g[2] == 0
    assert_dale(network)


@pytest.mark.parametrize("make", [DANNConvNet, functools.partial(DANNResNet, depth=20)], ids=["cnn", "resnet"])
@pytest.mark.parametrize("divisive", [True, None])
def test_networks_standardise_all_hidden_units_and_keep_their_signs_at_absurd_rates(make, divisive, make_trainer):
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=3.0, momentum=0.9)
    model = make(input_shape=(1, 8, 8), divisive=divisive, norm="batch", optimizer=sgd)
    *hidden, output = [layer for _, layer in dale_layers(model) if isinstance(layer, DaleModule)]
    assert [type(layer).__name__.startswith("DaleBatchNorm") for layer in hidden] == [False, True] * (len(hidden) // 2)
    assert all(layer.b is None and layer.divisive is bool(divisive) for layer in hidden[::2])
    assert output.b is not None
    images = torch.rand(32, 1, 8, 8)
    u = hidden[1](hidden[0](images))
    dims = (0, 2, 3)
    torch.testing.assert_close(u.mean(dims), torch.zeros(u.shape[1]), rtol=0, atol=1e-4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(32) % 10), 8)
    make_trainer(max_epochs=2).fit(model, data)
    assert_dale(model)


def test_synchronised_statistics_keep_the_gains_under_the_principle():
    """What ``sync_batchnorm=True`` of a Trainer does before it trains on several devices."""
    network = nn.Sequential(*DANNFamily(norm="batch").conv(3, 6, 1))
    x = torch.rand(4, 3, 8, 8)
    network(x)
    expected = network.eval()(x)
    before = [name for name, _ in dale_layers(network)]
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    assert [name for name, _ in dale_layers(network)] == before == ["0", "1"]
    assert dict(network[1].nonnegative_parameters())["g"] is network[1].g
    torch.testing.assert_close(network(x), expected)  # in evaluation mode it runs on the CPU too
    assert network[1].norm.running_mean.shape == (6,)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UsageError, match=r"norm='layer'.*'none' or 'batch'"):
        DANNResNet(norm="layer")
    for layer, shape in (
        (DaleBatchNorm1d(6), (4, 6, 6)),
        (DaleBatchNorm1d(6), (4, 5)),
        (DaleBatchNorm2d(6), (6, 3, 3)),
    ):
        with pytest.raises(UsageError, match=re.escape(str(shape))):
            layer(torch.rand(shape))
    with pytest.raises(UsageError, match="one value of each unit"):
        DaleBatchNorm1d(6)(torch.rand(1, 6))
    DaleBatchNorm1d(6).eval()(torch.rand(1, 6))
    with pytest.raises(UsageError, match=r"'1'.*norm='batch'.*leave this start out"):
        standardise_(nn.Sequential(DANNLinear(4, 6, 1, bias=False), DaleBatchNorm1d(6)), torch.rand(20, 4))
