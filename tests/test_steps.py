"""Layer-wise clipping and the cosine rule against direct computations."""

import copy
import functools
import math

import pytest
import torch
from test_layers import perturbed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    CosineStepControl,
    DANNLinear,
    LayerGradientClipping,
    UsageError,
    fisher_param_groups,
)
from lightning_danns.optim import clip_layers_, limit_clamping_


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [perturbed(DANNLinear(9, 6, 2)), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), perturbed(DANNLinear(6, 3, 1))]
    model = nn.Sequential(*layers).double()
    model(torch.rand(5, 9, dtype=torch.float64)).square().sum().backward()
    return model


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e6])
def test_clipping_equals_scaling_gradients_and_clipping_each_layer(model, max_norm):
    twin = copy.deepcopy(model)  # without gradients
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    optimizer = torch.optim.SGD(fisher_param_groups(model, lr=0.1))
    clip_layers_(model, optimizer, max_norm)
    optimizer.step()
    for layer in (twin[0], twin[2], twin[4]):
        factors = layer.lr_factors() if isinstance(layer, DANNLinear) else {}
        for name, parameter in layer.named_parameters():
            parameter.grad *= factors.get(name, 1)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def cosine_of_clamping(layer, gradients, factors, lr):
    """cos of the angle between a layer's signed parameters before and after clamping, element by element."""
    after = [
        value - lr * factors.get(name, 1) * slope
        for name, parameter in layer.nonnegative_parameters()
        for value, slope in zip(parameter.flatten().tolist(), gradients[name].flatten().tolist(), strict=True)
    ]
    clamped = [max(value, 0) for value in after]
    dot = sum(a * c for a, c in zip(after, clamped, strict=True))
    return dot / math.sqrt(sum(a * a for a in after) * sum(c * c for c in clamped))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1, 1.0])
def test_the_cosine_rule_takes_the_largest_rate_of_its_grid(model, epsilon):
    lr, halvings = 50.0, 12
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(fisher_param_groups(model, lr=lr))
    chosen = limit_clamping_(model, optimizer, epsilon, halvings)
    assert set(chosen) == {"0", "4"}
    for name, fraction in chosen.items():
        layer = model[int(name)]
        own = {key.split(".")[1]: value for key, value in gradients.items() if key.startswith(name)}
        fitting = [
            2.0**-k
            for k in range(halvings + 1)
            if cosine_of_clamping(layer, own, layer.lr_factors(), lr / 2**k) >= 1 - epsilon - 1e-12
        ]
        assert fraction == max(fitting, default=2.0**-halvings)
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, own[key] * fraction)
    assert torch.equal(model[2].weight.grad, gradients["2.weight"])
    if epsilon == 1.0:
        assert set(chosen.values()) == {1.0}
    elif epsilon == 0.0:
        assert min(chosen.values()) < 1


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, momentum=0.9),
        functools.partial(torch.optim.SGD, weight_decay=0.1),
        torch.optim.Adam,
    ],
)
def test_the_cosine_rule_is_refused_where_it_cannot_predict_the_step(model, optimizer):
    with pytest.raises(UsageError, match="plain SGD"):
        limit_clamping_(model, optimizer(model.parameters(), lr=0.1), 0.1)


def fit(callbacks, make_trainer, lr=20.0, **kwargs):
    torch.manual_seed(0)
    model = DANNMLP(
        input_shape=(1, 4, 4),
        num_classes=4,
        hidden_sizes=[8],
        ni=2,
        optimizer=functools.partial(torch.optim.SGD, lr=lr),
    )
    before = [p.detach().clone() for p in model.parameters()]
    batches = DataLoader(TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8) % 4), batch_size=8)
    make_trainer(callbacks=callbacks, **kwargs).fit(model, batches)
    return [(p - b).norm().item() for p, b in zip(model.parameters(), before, strict=True)]


def test_callbacks_shorten_the_steps_of_a_fit(make_trainer):
    free = fit([], make_trainer)
    clipped = fit([LayerGradientClipping(1e-4)], make_trainer)
    controlled = fit([CosineStepControl(1e-4, halvings=20)], make_trainer)
    assert max(clipped) <= 20 * 1e-4
    assert sum(clipped) < sum(free)
    assert sum(controlled) < sum(free)


def test_wrong_use_of_the_callbacks_is_refused(make_trainer):
    with pytest.raises(UsageError, match="max_norm=0"):
        LayerGradientClipping(0)
    with pytest.raises(UsageError, match="epsilon=2"):
        CosineStepControl(2)
    for callback in (LayerGradientClipping(1.0), CosineStepControl(0.1)):
        with pytest.raises(UsageError, match=r"gradient_clip_val=0\.5"):
            fit([callback], make_trainer, gradient_clip_val=0.5)


def test_the_cosine_rule_is_refused_for_layers_that_share_a_parameter():
    shared = nn.Sequential(DANNLinear(6, 6, 2), DANNLinear(6, 6, 2))
    shared[1].Wex = shared[0].Wex
    with pytest.raises(UsageError, match="share a parameter"):
        limit_clamping_(shared, torch.optim.SGD(shared.parameters(), lr=0.1), 0.1)


def test_the_cosine_rule_leaves_what_another_optimizer_steps(model):
    gradient = model[0].b.grad.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model[0].b], lr=50.0)
    assert limit_clamping_(model, optimizer, 0.0, 12)["0"] < 1
    assert torch.equal(model[0].b.grad, gradient)
