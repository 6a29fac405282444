"""A start from data: each unit centred and standardised over a batch, and nothing else changed."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    ColumnEILinear,
    DANNConv2d,
    DANNConvNet,
    DANNLinear,
    StandardisedStart,
    UsageError,
    standardise_,
)
from lightning_danns.layers import dale_layers
from lightning_danns.testing import assert_dale


def units_of(z, layer):
    return z.movedim(layer.unit_dim, 0).flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["dense", "groups", "columns"]), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31)
)
def test_units_are_standardised_and_stay_as_they_were_but_for_it(kind, divisive, bias, balanced, seed):
    torch.manual_seed(seed)
    options = {"divisive": divisive, "bias": bias, "balanced": balanced, "dtype": torch.float64}
    x = torch.rand(40, 4, 5, 5, dtype=torch.float64)
    if kind == "groups":
        layer = DANNConv2d(4, 6, 2, 3, groups=2, **options)
    elif kind == "dense":
        layer, x = DANNLinear(100, 6, 2, **options), x.flatten(1)
    else:
        layer, x = ColumnEILinear(100, 6, 20, bias=bias, balanced=balanced, dtype=torch.float64), x.flatten(1)
    out = DANNLinear(6, 3, 1, dtype=torch.float64)
    net = nn.Sequential(layer, nn.ReLU(), *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if kind == "groups" else []), out)
    was = units_of(layer(x), layer)
    last = {name: value.clone() for name, value in out.named_parameters()}
    told = standardise_(net, x)
    mean, std = was.mean(1, keepdim=True), was.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(told, {"0": std.flatten()}, rtol=1e-9, atol=1e-12)
    expected = (was - mean) / std if bias else was / std
    torch.testing.assert_close(units_of(layer(x), layer), expected, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(value, last[name]) for name, value in out.named_parameters())
    assert_dale(net)


def test_each_layer_sees_what_those_below_make_of_the_batch():
    torch.manual_seed(0)
    net = DANNConvNet(input_shape=(3, 16, 16)).network
    x = h = torch.rand(50, 3, 16, 16)
    state = torch.get_rng_state()
    standardise_(net, x)
    assert torch.equal(state, torch.get_rng_state())
    layers = [layer for _, layer in dale_layers(net)]
    for module in net:
        h = module(h)
        if module in layers[:-1]:
            z = units_of(h, module)
            torch.testing.assert_close(z.mean(1), torch.zeros(len(z)), rtol=0, atol=1e-5)
            torch.testing.assert_close(z.std(1, correction=0), torch.ones(len(z)), rtol=1e-5, atol=0)
    assert_dale(net)


def test_a_unit_that_does_not_vary_keeps_its_gain_and_the_mode_and_hooks_are_as_before():
    torch.manual_seed(0)
    net = nn.Sequential(DANNLinear(9, 4, 2), nn.Dropout(0.5), DANNLinear(4, 2, 1))
    net[1].eval()
    net[0].Wex.data[1], net[0].Wei.data[1] = 0, 0
    standardise_(net, torch.rand(20, 9))
    assert net[0].g[1] == 1
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert [module.training for module in net] == [True, False, True]
    assert not any(module._forward_hooks for module in net)


def test_what_cannot_be_standardised_is_refused_and_left():
    torch.manual_seed(0)
    layer = DANNLinear(4, 4, 1)
    with pytest.raises(UsageError, match="1 signed layers run"):
        standardise_(layer, torch.rand(8, 4))
    with pytest.raises(UsageError, match=r"'0' runs 2 times"):
        standardise_(nn.Sequential(layer, nn.ReLU(), layer), torch.rand(8, 4))
    with pytest.raises(UsageError, match=r"'0': z is not finite"):
        standardise_(nn.Sequential(layer, nn.ReLU(), DANNLinear(4, 2, 1)), torch.full((8, 4), torch.nan))
    assert bool((layer.g == 1).all())
    assert not layer._forward_hooks


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(24, 1, 4, 4), torch.randint(4, (24,))), batch_size=6)


def small(lr=1e-9):
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=lr)
    return DANNMLP(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8, 8], ni=2, optimizer=sgd)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fit_begins_with_its_first_batch(precision, compiled, batches, make_trainer):
    model = small()
    if compiled:
        model.network.compile(backend="eager")
    make_trainer(callbacks=[StandardisedStart()], precision=precision, accumulate_grad_batches=2).fit(model, batches)
    first = model.network[1]
    z = first(batches.dataset.tensors[0][:6].flatten(1).to(first.Wex)).double()  # steps of 1e-9 change nothing
    rough = {"bf16-true": 0.15, "bf16-mixed": 0.05}.get(precision, 1e-4)  # b and g have few bits
    torch.testing.assert_close(z.mean(0), torch.zeros(8).double(), rtol=0, atol=rough)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(8).double(), rtol=rough, atol=0)


def test_a_fit_that_goes_on_is_left_alone_and_a_trained_network_refused(batches, make_trainer, tmp_path):
    def fit(epochs, path=None):
        model = small(lr=0.1)
        trainer = make_trainer(max_epochs=epochs, callbacks=[StandardisedStart()])
        trainer.fit(model, batches, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    straight = fit(2)
    fit(1)
    resumed = fit(2, tmp_path / "1.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(UsageError, match=r"network\.1\.b is not 0.*Leave the callback out"):
        make_trainer(callbacks=[StandardisedStart()]).fit(straight, batches)
