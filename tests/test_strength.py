"""A start with stronger excitation and inhibition: the same network, further from the bound of its net weights."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import perturbed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    ColumnEILinear,
    DANNConv2d,
    DANNLinear,
    StandardisedStart,
    StrongStart,
    UsageError,
    strengthen_,
)
from lightning_danns.layers import dale_layers
from lightning_danns.testing import assert_dale


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["dense", "one interneuron", "convolution", "groups"]), divisive=st.booleans(),
    balanced=st.booleans(), factor=st.floats(1, 10), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_layer_computes_what_it_did(kind, divisive, balanced, factor, seed):
    torch.manual_seed(seed)
    options = {"divisive": divisive, "balanced": balanced, "dtype": torch.float64}
    x = torch.rand(10, 4, 5, 5, dtype=torch.float64)
    if kind in ("convolution", "groups"):
        layer = DANNConv2d(4, 6, 2, 3, groups=2 if kind == "groups" else 1, **options)
    else:
        layer, x = DANNLinear(100, 6, 1 if kind == "one interneuron" else 3, **options), x.flatten(1)
    layer = layer if balanced else perturbed(layer)
    net, was, excitation, inhibition = (
        value.detach().clone() for value in (layer.net_weight(), layer(x), layer.Wex, layer.Wex - layer.net_weight())
    )
    strengthen_(layer, factor)
    torch.testing.assert_close(layer.net_weight(), net, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer(x), was, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.Wex, excitation + (factor - 1) * inhibition, rtol=1e-9, atol=1e-12)
    assert_dale(layer)


def test_a_factor_of_1_changes_nothing_to_the_bit_and_columns_are_left():
    layer, columns = DANNLinear(9, 6, 2), ColumnEILinear(6, 3, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    strengthen_(layer, 1)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    W = columns.W.detach().clone()
    strengthen_(nn.Sequential(layer, columns), 3)
    assert torch.equal(columns.W, W)


@pytest.mark.parametrize("factor", [0.5, 0, -1, math.nan, math.inf])
def test_impossible_factors_are_refused(factor):
    with pytest.raises(UsageError, match=f"factor={factor}"):
        strengthen_(DANNLinear(9, 6, 2), factor)


def test_a_layer_that_lost_its_balance_is_balanced_first():
    layer, x = DANNLinear(9, 6, 2, balanced=True).double(), torch.rand(4, 9, dtype=torch.float64)
    layer.Wei.data.mul_(1.5)
    was = layer(x)
    strengthen_(layer, 3)
    torch.testing.assert_close(layer(x), was, rtol=1e-9, atol=1e-10)


def test_shared_and_parametrized_weights_are_refused():
    model = nn.Sequential(DANNLinear(6, 6, 2), DANNLinear(6, 6, 2))
    model[1].Wix = model[0].Wix
    with pytest.raises(UsageError, match="share weights"):
        strengthen_(model)
    layer = nn.utils.parametrizations.weight_norm(DANNLinear(6, 6, 2), "Wix")
    with pytest.raises(UsageError, match="no parameter of its own"):
        strengthen_(layer)


def test_networks_without_inhibition_are_refused():
    with pytest.raises(UsageError, match="Linear has no layer"):
        strengthen_(nn.Linear(3, 3))


def make():
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    return DANNMLP(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], optimizer=optimizer)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 1, 4, 4, generator=generator), torch.arange(12) % 4
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def test_a_fit_starts_strong_and_goes_on_as_it_would_have(batches, make_trainer, tmp_path):
    def strength(model):
        return sum(float(layer.Wex.sum()) for _, layer in dale_layers(model))

    whole, halved = make(), make()
    before = strength(whole)
    make_trainer(max_epochs=2, callbacks=[StrongStart(3)]).fit(whole, batches)
    assert strength(whole) == pytest.approx(3 * before, rel=0.01)
    trainer = make_trainer(callbacks=[StrongStart(3)])
    trainer.fit(halved, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make()
    make_trainer(max_epochs=2, callbacks=[StrongStart(3)]).fit(resumed, batches, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(UsageError, match="StrongStart is for new ones"):
        make_trainer(callbacks=[StrongStart(3)]).fit(halved, batches)


def test_beside_a_standardised_start_in_any_order_and_not_twice(batches, make_trainer):
    models = [make(), make()]
    make_trainer(callbacks=[StrongStart(), StandardisedStart()]).fit(models[0], batches)
    make_trainer(callbacks=[StandardisedStart(), StrongStart()]).fit(models[1], batches)
    assert_dale(models[0])
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    with pytest.raises(UsageError, match="two callbacks StrongStart"):
        make_trainer(callbacks=[StrongStart(), StrongStart()]).fit(make(), batches)
