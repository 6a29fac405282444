"""Weight decay to inhibition, against autograd, an ordinary layer's decay and plain loops."""

import functools

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
    CosineStepControl,
    DaleModule,
    DaleProjection,
    DANNConv2d,
    DANNLinear,
    DANNResNet,
    DecayToInhibition,
    DiagonalNGD,
    ReplicatedClassifier,
    UsageError,
    fisher_param_groups,
    project_,
)
from lightning_danns.layers import imbalances, sign_violations
from lightning_danns.optim import decay_to_inhibition_

SGD = torch.optim.SGD
MAKERS = {
    "dense": lambda balanced: DANNLinear(9, 6, 3, balanced=balanced),
    "one interneuron": lambda balanced: DANNLinear(9, 6, 1, divisive=False, balanced=balanced),
    "convolution": lambda balanced: DANNConv2d(4, 6, 3, 3, balanced=balanced),
    "groups of channels": lambda balanced: DANNConv2d(4, 6, 2, 3, groups=2, balanced=balanced),
}


def with_zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.fixture(params=MAKERS)
def layer(request):
    torch.manual_seed(0)
    return perturbed(MAKERS[request.param](False)).double()


def test_the_gradient_is_that_of_the_net_weights_with_inhibition_held(layer):
    with_zero_gradients(layer)
    optimizer = SGD(fisher_param_groups(layer, lr=0.1, weight_decay=0.3, decay_to="inhibition"))
    decay_to_inhibition_(layer, optimizer)
    (expected,) = torch.autograd.grad(0.3 / 2 * layer.net_weight().square().sum(), layer.Wex)
    torch.testing.assert_close(layer.Wex.grad, expected, rtol=1e-12, atol=1e-14)
    for name, parameter in layer.named_parameters():
        if name != "Wex":
            assert not parameter.grad.any()


@pytest.mark.parametrize("kind", MAKERS)
def test_net_weights_decay_like_those_of_an_ordinary_layer(kind):
    """With momentum too, and each unit keeps its total excitation, so its balance."""
    torch.manual_seed(1)
    layer = with_zero_gradients(MAKERS[kind](True).double())
    project_(layer)  # balanced in the new precision
    ordinary = nn.Linear(1, 1).double()
    ordinary.weight = nn.Parameter(layer.net_weight().detach().clone())
    with_zero_gradients(ordinary)
    options = {"lr": 0.05, "momentum": 0.9}
    ours = SGD(fisher_param_groups(layer, lr=0.05, weight_decay=0.1, decay_to="inhibition"), **options)
    theirs = SGD(ordinary.parameters(), weight_decay=0.1, **options)
    excitation = layer.Wex.detach().flatten(1).sum(1)
    for _ in range(7):
        with_zero_gradients(layer)
        decay_to_inhibition_(layer, ours)
        ours.step()
        theirs.step()
    assert (layer.Wex > 0).all()  # so nothing was clamped
    project_(layer)
    torch.testing.assert_close(layer.net_weight(), ordinary.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.Wex.detach().flatten(1).sum(1), excitation, rtol=1e-12, atol=0)
    assert not imbalances(layer)


OPTIMIZERS = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
    "decoupled NAdam": functools.partial(torch.optim.NAdam, lr=0.01, decoupled_weight_decay=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "ascent": functools.partial(SGD, lr=0.01, maximize=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_net_weights_decay_as_each_optimizer_decays_an_ordinary_layers(kind):
    """Under the same gradients, if inhibition stands still."""
    torch.manual_seed(1)
    layer = DANNLinear(9, 6, 3, divisive=False, bias=False).double()
    layer.Wex.data.add_(1)
    layer.Wix.requires_grad_(False)
    layer.Wei.requires_grad_(False)
    ordinary = nn.Linear(9, 6, bias=False).double()
    ordinary.weight = nn.Parameter(layer.net_weight().detach().clone())
    ours = OPTIMIZERS[kind](fisher_param_groups(layer, weight_decay=0.3, decay_to="inhibition"))
    theirs = OPTIMIZERS[kind](ordinary.parameters(), weight_decay=0.3)
    for k in range(5):
        gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(k)).double()
        layer.Wex.grad, ordinary.weight.grad = gradient.clone(), gradient
        decay_to_inhibition_(layer, ours)
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.net_weight(), ordinary.weight, rtol=1e-9, atol=1e-11)


def test_an_optimizer_whose_decay_is_unknown_is_refused():
    layer = with_zero_gradients(DANNLinear(6, 5, 2))
    groups = fisher_param_groups(layer, "none", weight_decay=0.1, decay_to="inhibition")
    with pytest.raises(UsageError, match="how DiagonalNGD decays"):
        decay_to_inhibition_(layer, DiagonalNGD(groups, lr=0.1))


@settings(deadline=None, max_examples=100)
@given(kind=st.sampled_from(sorted(MAKERS)), balanced=st.booleans(), seed=st.integers(0, 10**6),
       exponent=st.floats(-3, 3), decay=st.sampled_from([0.0, 0.01, 10.0]))  # fmt: skip
def test_weights_stay_signed_and_balanced_at_any_rate(kind, balanced, seed, exponent, decay):
    torch.manual_seed(seed)
    layer = MAKERS[kind](balanced)
    groups = fisher_param_groups(layer, lr=10**exponent, weight_decay=decay, decay_to="inhibition")
    optimizer = SGD(groups, momentum=0.9)
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = 10 ** torch.empty(()).uniform_(-4, 2) * torch.randn(parameter.shape)
        decay_to_inhibition_(layer, optimizer)
        optimizer.step()
        project_(layer)
        assert not sign_violations(layer)
        assert not imbalances(layer)


def test_excitation_decays_to_inhibition_and_other_weights_to_0_but_inhibition_does_not():
    model = nn.Sequential(DANNLinear(6, 5, 2), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), DANNLinear(5, 3, 1))
    groups = fisher_param_groups(model, weight_decay=0.01, decay_to="inhibition")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for key, decaying in {"weight_decay": {"2.weight"}, "decay_to_inhibition": {"0.Wex", "4.Wex"}}.items():
        rates = {names[p]: group.get(key, 0.0) for group in groups for p in group["params"]}
        assert {name: rate for name, rate in rates.items() if rate} == dict.fromkeys(decaying, 0.01)
        assert rates.keys() == set(names.values())
    unnamed = [group for group in groups if group["name"] == "base/decays to inhibition"]
    assert len(unnamed) == 1


def test_without_it_groups_are_what_they_were():
    model = DANNLinear(6, 5, 2)
    groups = fisher_param_groups(model, weight_decay=0.01)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "base": 0.01, "base/no decay": 0.0, "Wix": 0.01, "Wei": 0.01, "alpha": 0.0
    }  # fmt: skip
    assert not any("decay_to_inhibition" in group for group in groups)
    with_zero_gradients(model)
    decay_to_inhibition_(model, SGD(fisher_param_groups(model, lr=0.1, weight_decay=0.01)))
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_what_has_no_gradient_or_another_optimizer_does_not_decay():
    first, second = DANNLinear(6, 5, 2), DANNLinear(6, 5, 2)
    model = nn.Sequential(first, second)
    optimizer = SGD(fisher_param_groups(first, lr=0.1, weight_decay=0.01, decay_to="inhibition"))
    second.Wex.grad = torch.zeros_like(second.Wex)
    decay_to_inhibition_(model, optimizer)
    assert first.Wex.grad is None
    assert not second.Wex.grad.any()


def test_a_layer_of_ones_own_joins_by_saying_what_its_weights_decay_to():
    class Excitatory(DaleModule):
        nonnegative = ("W",)

        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.rand(3, 4))

        def decays_to(self):
            return {"W": torch.full_like(self.W, 0.5)}

    layer = with_zero_gradients(Excitatory())
    optimizer = SGD(fisher_param_groups(layer, lr=1.0, weight_decay=0.1, decay_to="inhibition"))
    before = layer.W.detach().clone()
    decay_to_inhibition_(layer, optimizer)
    optimizer.step()
    torch.testing.assert_close(layer.W.detach(), 0.9 * before + 0.05)


def small(**kwargs):
    torch.manual_seed(0)
    options = {"optimizer": functools.partial(SGD, lr=0.1, momentum=0.9), "weight_decay": 0.1, "hidden_sizes": [8]}
    return DANNMLP(**{"input_shape": (1, 4, 4), "num_classes": 4, "decay_to": "inhibition", **options, **kwargs})


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 1, 4, 4, generator=generator), torch.arange(12) % 4
    return DataLoader(TensorDataset(images, labels), batch_size=4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_fit_is_the_loop_that_adds_the_decay_before_each_step(batches, make_trainer, accumulate):
    model, twin = small(), small()
    make_trainer(accumulate_grad_batches=accumulate, max_epochs=2).fit(model, batches)
    groups = fisher_param_groups(twin.network, lr=0.1, weight_decay=0.1, decay_to="inhibition")
    optimizer = SGD(groups, momentum=0.9)
    for _ in range(2):
        for k, (images, labels) in enumerate(batches):
            (nn.functional.cross_entropy(twin(images), labels) / accumulate).backward()
            if (k + 1) % accumulate == 0:
                decay_to_inhibition_(twin.network, optimizer)
                optimizer.step()
                project_(twin.network)
                optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    undecayed = small(weight_decay=0.0)
    make_trainer(accumulate_grad_batches=accumulate, max_epochs=2).fit(undecayed, batches)
    assert undecayed.network[1].net_weight().norm() > 1.01 * model.network[1].net_weight().norm()


def test_a_checkpoint_keeps_it_and_does_not_go_on_without(batches, make_trainer, tmp_path):
    model = small()
    trainer = make_trainer()
    trainer.fit(model, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert DANNMLP.load_from_checkpoint(tmp_path / "a.ckpt").decay_to == "inhibition"
    whole = small()
    make_trainer(max_epochs=2).fit(whole, batches)
    resumed = small()
    make_trainer(max_epochs=2).fit(resumed, batches, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(UsageError, match="same correction and decay_to"):
        make_trainer(max_epochs=2).fit(small(decay_to="zero"), batches, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=r"decay_to_inhibition=0\.2"):
        make_trainer(max_epochs=2).fit(small(weight_decay=0.2), batches, ckpt_path=tmp_path / "a.ckpt")


def test_residual_nets_and_a_trainer_that_has_the_callback_already(make_trainer):
    model = DANNResNet(
        input_shape=(3, 8, 8), num_classes=4, norm="batch", weight_decay=0.1, decay_to="inhibition",
        optimizer=functools.partial(SGD, lr=0.1),
    )  # fmt: skip
    batches = DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 4), batch_size=4)
    trainer = make_trainer(callbacks=[DecayToInhibition()])
    trainer.fit(model, batches)
    assert sum(isinstance(callback, DecayToInhibition) for callback in trainer.callbacks) == 1
    assert not imbalances(model)


def test_wrong_use_is_refused(batches, make_trainer):
    with pytest.raises(UsageError, match="decay_to='nothing'"):
        fisher_param_groups(DANNLinear(4, 3, 1), weight_decay=0.1, decay_to="nothing")
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"weight_decay={rate}"):
            fisher_param_groups(DANNLinear(4, 3, 1), weight_decay=rate)
    for model in (nn.Linear(4, 3), ColumnEILinear(4, 3, 1)):
        with pytest.raises(UsageError, match=f"no layer of {type(model).__name__} has inhibition"):
            fisher_param_groups(model, weight_decay=0.1, decay_to="inhibition")
    shared = nn.Sequential(DANNLinear(6, 6, 2), DANNLinear(6, 6, 2))
    shared[1].Wex = shared[0].Wex
    with pytest.raises(UsageError, match="share excitatory weights"):
        fisher_param_groups(shared, weight_decay=0.1, decay_to="inhibition")
    with pytest.raises(UsageError, match="without weight_decay"):
        make_trainer().fit(small(weight_decay=None), batches)
    with pytest.raises(UsageError, match=r"gradient_clip_val=0\.5"):
        make_trainer(gradient_clip_val=0.5).fit(small(), batches)
    with pytest.raises(UsageError, match="decay_to='inhibition', which replicas do not know"):
        ReplicatedClassifier(small, seeds=[0, 1], learning_rates=[0.1])


class WithoutSuper(DANNMLP):
    def configure_callbacks(self):
        return [DaleProjection()]


def test_a_decay_that_would_not_happen_is_refused(batches, make_trainer):
    torch.manual_seed(0)
    options = {"input_shape": (1, 4, 4), "num_classes": 4, "hidden_sizes": [8], "weight_decay": 0.1}
    with pytest.raises(UsageError, match="nothing carries that out"):
        make_trainer().fit(WithoutSuper(**options, decay_to="inhibition"), batches)
    with pytest.raises(UsageError, match="DecayToInhibition has nothing to do"):
        make_trainer(callbacks=[DecayToInhibition()]).fit(small(decay_to="zero"), batches)
    with pytest.raises(UsageError, match="two callbacks DecayToInhibition"):
        make_trainer(callbacks=[DecayToInhibition(), DecayToInhibition()]).fit(small(), batches)
    plain = small(optimizer=functools.partial(SGD, lr=0.1))
    with pytest.raises(UsageError, match="plain SGD"):
        make_trainer(callbacks=[CosineStepControl(0.1)]).fit(plain, batches)


class ByHand(DANNMLP):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_decays_alike(batches, make_trainer):
    options = {
        "input_shape": (1, 4, 4), "num_classes": 4, "hidden_sizes": [8], "weight_decay": 0.1,
        "decay_to": "inhibition", "optimizer": functools.partial(SGD, lr=0.1, momentum=0.9),
    }  # fmt: skip
    torch.manual_seed(0)
    by_hand = ByHand(**options)
    make_trainer().fit(by_hand, batches)
    usual = small()
    make_trainer().fit(usual, batches)
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), usual.parameters(), strict=True))


def test_autocast_does_not_round_it(layer):
    half = layer.float()
    exact = half.decays_to()["Wex"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.decays_to()["Wex"], exact)


def test_scaled_gradients_are_refused(make_trainer):
    trainer = make_trainer()
    trainer.strategy.precision_plugin.precision = "16-mixed"
    model = small(optimizer=functools.partial(SGD, lr=0.1, fused=True))
    with pytest.raises(UsageError, match="fused=False, or bf16-mixed"):
        DecayToInhibition().on_before_optimizer_step(trainer, model, model.configure_optimizers())
