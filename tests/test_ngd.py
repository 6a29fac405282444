"""Diagonal natural gradient against a naive loop over samples."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_danns import DANNMLP, MLP, DANNLinear, DiagonalNGD, MNISTDataModule, UsageError, project_
from lightning_danns.optim import mean_squared_gradients
from lightning_danns.testing import assert_dale


def network(ni, seed=0):
    torch.manual_seed(seed)
    layers = DANNLinear(7, 6, ni, inputs="pixels"), nn.ReLU(), DANNLinear(6, 5, 1), nn.ReLU(), nn.Linear(5, 4)
    return nn.Sequential(*layers).double()


def naive_fisher(model, images, generator):
    """Mean squared gradients by one backward pass a sample."""
    labels = torch.multinomial(model(images).softmax(-1), 1, generator=generator)[:, 0]
    total = {p: torch.zeros_like(p) for p in model.parameters()}
    for image, label in zip(images, labels, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), list(total))
        for p, gradient in zip(total, gradients, strict=True):
            total[p] += gradient**2 / len(images)
    return total


@pytest.mark.parametrize("ni", [1, 3])
def test_squared_gradients_equal_a_loop_over_samples(ni):
    model, images = network(ni), torch.rand(70, 7, dtype=torch.float64)  # three chunks
    ours = mean_squared_gradients(model, images, torch.Generator().manual_seed(1))
    expected = naive_fisher(model, images, torch.Generator().manual_seed(1))
    assert set(ours) == set(model.parameters())
    for p, value in expected.items():
        torch.testing.assert_close(ours[p], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("ni", [1, 3])
def test_steps_equal_the_formula(ni):
    model, lr, f, c, eps = network(ni), 0.5, 0.01, 0.1, 1e-3
    optimizer = DiagonalNGD(model.parameters(), lr=lr, fisher_scale=f, decay=c, eps=eps)
    twin = network(ni)
    fisher = None
    for step in range(3):
        torch.manual_seed(10 + step)
        images, labels = torch.rand(20, 7, dtype=torch.float64), torch.randint(4, (20,))
        optimizer.update_fisher(model, images, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        project_(model)

        estimate = list(naive_fisher(twin, images, torch.Generator().manual_seed(step)).values())
        fisher = (
            [f * e for e in estimate]
            if fisher is None
            else [(1 - c) * F_ + c * f * e for F_, e in zip(fisher, estimate, strict=True)]
        )
        parameters = list(twin.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(twin(images), labels), parameters)
        norms = {}
        for (name, _), F_ in zip(twin.named_parameters(), fisher, strict=True):
            if name.endswith(("Wex", "weight")):
                norms[name.split(".")[0]] = (1 / (F_ + eps)).norm()
        with torch.no_grad():
            for (name, p), gradient, F_ in zip(twin.named_parameters(), gradients, fisher, strict=True):
                p -= lr * gradient / (F_ + eps) / norms[name.split(".")[0]]
        project_(twin)
        for ours, theirs in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_state_resumes_to_the_bit():
    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            images = torch.rand(9, 7, dtype=torch.float64)
            optimizer.update_fisher(model, images)
            optimizer.zero_grad()
            F.cross_entropy(model(images), torch.randint(4, (9,))).backward()
            optimizer.step()

    straight, resumed = network(2), network(2, seed=1)
    optimizer = DiagonalNGD(straight.parameters(), lr=0.1)
    train(straight, optimizer, range(3))
    resumed.load_state_dict(straight.state_dict())
    other = DiagonalNGD(resumed.parameters(), lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as if from a file
    train(straight, optimizer, range(3, 5))
    train(resumed, other, range(3, 5))
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


NGD = functools.partial(DiagonalNGD, lr=1.0)


def test_it_trains_a_dann_through_the_trainer(data_dir, make_trainer):
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[20], ni=1, correction="none", optimizer=NGD)
    data = MNISTDataModule(str(data_dir), val_size=50, batch_size=30)
    trainer = make_trainer(max_epochs=2)
    before = model.network[1].Wix.clone()
    trainer.fit(model, datamodule=data)
    assert not torch.equal(before, model.network[1].Wix)
    assert torch.isfinite(model.network[1].Wix).all()
    assert all("fisher" in trainer.optimizers[0].state[p] for p in model.parameters())
    assert_dale(model)


def test_it_is_refused_together_with_fisher_factors():
    with pytest.raises(UsageError, match="correction='none'"):
        DANNMLP(hidden_sizes=[20], optimizer=NGD).configure_optimizers()


def test_a_step_without_fisher_information_is_refused():
    model = network(1)
    optimizer = DiagonalNGD(model.parameters())
    model(torch.rand(3, 7, dtype=torch.float64)).sum().backward()
    with pytest.raises(UsageError, match="update_fisher"):
        optimizer.step()


def test_batch_normalisation_is_refused_by_name():
    model = MLP(hidden_sizes=[8], norm="batch")
    with pytest.raises(UsageError, match="layer '2' normalises over the batch"):
        mean_squared_gradients(model.network, torch.rand(5, 1, 28, 28))


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"decay": 1.5}, {"fisher_scale": 0}, {"eps": 0}], ids=str)
def test_wrong_settings_are_refused_by_value(wrong):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        DiagonalNGD(network(1).parameters(), **wrong)


def test_a_shared_parameter_steps_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False)).double()
    model[2].weight = model[0].weight
    optimizer = DiagonalNGD(model.parameters(), lr=1.0)
    images = torch.rand(8, 6, dtype=torch.float64)
    optimizer.update_fisher(model, images)
    F.cross_entropy(model(images), torch.arange(8) % 6).backward()
    weight = model[0].weight
    inverse = 1 / (optimizer.state[weight]["fisher"] + 1e-8)
    expected = weight.detach() - weight.grad * inverse / inverse.norm()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)
