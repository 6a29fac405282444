"""Diagonal natural gradient against a naive loop over samples."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import DANNMLP, MLP, DANNLinear, DiagonalNGD, MNISTDataModule, UsageError, project_
from lightning_danns.optim import mean_squared_gradients
from lightning_danns.testing import assert_dale


def network(ni, seed=0):
    torch.manual_seed(seed)
    layers = DANNLinear(7, 6, ni, inputs="pixels"), nn.ReLU(), DANNLinear(6, 5, 1), nn.ReLU(), nn.Linear(5, 4)
    return nn.Sequential(*layers).double()


def naive_fisher(model, images, generator):
    """Mean squared gradients by one backward pass a sample, with labels drawn 32 at a time."""
    chances = model(images).softmax(-1).split(32)
    labels = torch.cat([chance.multinomial(1, generator=generator)[:, 0] for chance in chances])
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
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(straight, optimizer, range(3, 5))
    train(resumed, other, range(3, 5))
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


NGD = functools.partial(DiagonalNGD, lr=1.0)


def test_it_trains_a_dann_through_the_trainer(data_dir, make_trainer):
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[20], ni=1, balanced=False, correction="none", optimizer=NGD)
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


def test_factors_of_a_later_group_are_refused():
    optimizer = DiagonalNGD(network(1).parameters())
    with pytest.raises(UsageError, match=r"lr_scale=0\.1.*correction='none'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "name": "Wix", "lr_scale": 0.1})


def backward(model, images):
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 4).backward()


def test_every_step_needs_the_fisher_information_of_its_batch():
    model, images = network(1), torch.rand(8, 7, dtype=torch.float64)
    optimizer = DiagonalNGD(model.parameters())
    backward(model, images)
    for _ in range(2):  # the first step, and a later one for which F would be stale
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UsageError, match="update_fisher"):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        optimizer.update_fisher(model, images)
        optimizer.step()


def test_information_of_one_of_two_networks_is_not_taken_for_that_of_both():
    first, second, images = nn.Linear(7, 4), nn.Linear(7, 4), torch.rand(8, 7)
    optimizer = DiagonalNGD([*first.parameters(), *second.parameters()])
    for network_ in (first, second):
        optimizer.update_fisher(network_, images)
        backward(network_, images)
    with pytest.raises(UsageError, match="the network that holds all parameters"):
        optimizer.step()


def test_parts_of_a_batch_count_as_one_batch():
    images = torch.rand(20, 7, dtype=torch.float64)
    whole, parts = network(2), network(2)
    for model, sizes in ((whole, [20]), (parts, [8, 12])):
        optimizer = DiagonalNGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):  # the first F and a running one
            for part in images.split(sizes):
                optimizer.update_fisher(model, part, generator)
            backward(model, images)
            optimizer.step()
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_gradient_accumulation_equals_a_larger_batch(data_dir, make_trainer):
    def fit(batch_size, accumulate):
        torch.manual_seed(0)
        model = DANNMLP(hidden_sizes=[20], ni=2, balanced=False, correction="none", optimizer=NGD)
        images = TensorDataset(torch.rand(60, 1, 28, 28, dtype=torch.float64), torch.arange(60) % 10)
        trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(model.double(), DataLoader(images, batch_size))
        assert trainer.global_step == 4
        return model

    for one, two in zip(fit(30, 1).parameters(), fit(15, 2).parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_a_copy_of_the_optimizer_works():
    model, images = network(2), torch.rand(8, 7, dtype=torch.float64)
    optimizer = DiagonalNGD(model.parameters(), lr=1.0)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for network_, optimizer_ in ((model, optimizer), (twin, twin_optimizer)):
        optimizer_.update_fisher(network_, images, torch.Generator().manual_seed(0))
        backward(network_, images)
        optimizer_.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("trained", ["Wix", "b"])
def test_a_layer_whose_normalising_parameter_is_not_trained_is_refused(trained):
    layer, images = DANNLinear(7, 4, 2), torch.rand(8, 7)
    partial = DiagonalNGD([getattr(layer, trained)])
    with pytest.raises(UsageError, match="'Wex' normalises"):
        partial.update_fisher(layer, images)
    layer.Wex.requires_grad_(False)
    with pytest.raises(UsageError, match="'Wex' normalises"):
        DiagonalNGD(layer.parameters()).update_fisher(layer, images)
    layer.requires_grad_(False)  # as a whole it is left alone
    model = nn.Sequential(layer, nn.Linear(4, 4))
    optimizer = DiagonalNGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.update_fisher(model, images)
    backward(model, images)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.bias"}


def test_under_dropout_labels_come_from_the_network_that_is_differentiated():
    """Whatever units are dropped, this softmax is 0 or 1, so that a label drawn from it has no gradient."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1000.0, 0.0], [0.0, 3000.0]]))
        model[1].bias.copy_(torch.tensor([500.0, 0.0]))
    squares = mean_squared_gradients(model, torch.ones(200, 2))
    assert all(bool((square == 0).all()) for square in squares.values())
    for parameter in model.parameters():
        parameter.data.div_(1000)
    assert all(bool((square > 0).any()) for square in mean_squared_gradients(model, torch.ones(200, 2)).values())


def test_autocast_does_not_change_the_estimate():
    model, images = network(2).float(), torch.rand(8, 7)
    plain = mean_squared_gradients(model, images, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = mean_squared_gradients(model, images, torch.Generator().manual_seed(0))
    assert all(torch.equal(plain[p], cast[p]) for p in model.parameters())


def test_labels_are_drawn_with_the_probabilities_of_the_softmax():
    """With logits = bias, the squared gradient of b_k averages to the Fisher information p_k (1 - p_k)."""
    model = nn.Linear(1, 3).double()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.7, 0.2, 0.1]).log())
    n = 20_000
    squares = mean_squared_gradients(model, torch.zeros(n, 1, dtype=torch.float64), torch.Generator().manual_seed(0))
    p = model.bias.detach().softmax(-1)
    torch.testing.assert_close(squares[model.bias], p * (1 - p), rtol=0, atol=5 * 0.5 / n**0.5)


def test_batch_normalisation_is_refused_by_name():
    network, images = MLP(hidden_sizes=[8], norm="batch").network, torch.rand(5, 1, 28, 28)
    with pytest.raises(UsageError, match="layer '2' normalises over the batch"):
        mean_squared_gradients(network, images)
    assert len(mean_squared_gradients(network.eval(), images)) == 6  # by running statistics: samples are independent
    network[2] = nn.BatchNorm1d(8, track_running_stats=False).eval()
    with pytest.raises(UsageError, match="layer '2' normalises over the batch"):
        mean_squared_gradients(network, images)


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
    before = weight.detach().clone()
    optimizer.step()
    inverse = 1 / (optimizer.state[weight]["fisher"] + 1e-8)
    expected = before - weight.grad * inverse / inverse.norm()
    torch.testing.assert_close(weight.detach(), expected)
