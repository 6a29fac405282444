"""Learning-rate factors: every parameter in one group, and refusals of what would undo the factors."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_danns import DaleModule, DANNLinear, Sequential, UsageError, WarmupCosine, fisher_param_groups
from lightning_danns.optim import fisher_optimizer, rehearse, require_factors

SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def model():
    return nn.Sequential(DANNLinear(9, 6, 2), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), DANNLinear(6, 3, 1))


def factor_by_name(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr_scale"] for group in groups for p in group["params"]}


def test_factors_are_those_of_the_method(model):
    factors = factor_by_name(model, fisher_param_groups(model))
    for index, d, ne in ((0, 9, 6), (4, 6, 3)):
        expected = {
            "Wex": 1, "g": 1, "b": 1, "Wix": 1 / math.sqrt(ne), "Wei": 1 / d, "alpha": 1 / (d * math.sqrt(ne))
        }  # fmt: skip
        for name, factor in expected.items():
            assert factors[f"{index}.{name}"] == pytest.approx(factor, rel=1e-12)
    assert factors["2.weight"] == factors["2.bias"] == 1


@pytest.mark.parametrize("correction", ["fisher", "none", {"0.Wix": 0.5}])
def test_every_trainable_parameter_is_in_exactly_one_group(model, correction):
    model[2].weight.requires_grad_(False)
    groups = fisher_param_groups(model, correction)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    names = [group["name"] for group in groups]
    assert len(names) == len(set(names))


def test_no_correction_is_one_ordinary_group(model):
    (group,) = fisher_param_groups(model, "none")
    assert group["lr_scale"] == 1


def test_own_factors_by_name_and_refusals(model):
    assert factor_by_name(model, fisher_param_groups(model, {"4.Wei": 0.25}))["4.Wei"] == 0.25
    with pytest.raises(UsageError, match=r"'4\.Wie'"):
        fisher_param_groups(model, {"4.Wie": 0.25})
    with pytest.raises(UsageError, match=r"4\.Wei is -1"):
        fisher_param_groups(model, {"4.Wei": -1})
    with pytest.raises(UsageError, match="'fischer'"):
        fisher_param_groups(model, "fischer")
    with pytest.raises(UsageError, match="no trainable"):
        fisher_param_groups(nn.ReLU())


def test_a_shared_parameter_with_two_factors_is_refused():
    class Half(DaleModule):
        def __init__(self, W, factor):
            super().__init__()
            self.W, self.factor = W, factor

        def lr_factors(self):
            return {"W": self.factor}

    W = nn.Parameter(torch.ones(2))
    assert len(fisher_param_groups(nn.ModuleList([Half(W, 0.5), Half(W, 0.5)]))) == 1
    with pytest.raises(UsageError, match=r"1\.W is shared.*0\.5 and 0\.25"):
        fisher_param_groups(nn.ModuleList([Half(W, 0.5), Half(W, 0.25)]))


def test_a_layer_that_names_a_parameter_it_lacks_is_refused():
    class Typo(DANNLinear):
        def lr_factors(self):
            return {"Wxi": 0.5}

    with pytest.raises(UsageError, match=r"Typo\.lr_factors.*'Wxi'.*Wex, Wix"):
        fisher_param_groups(Typo(4, 3, 1))


def test_groups_with_a_rate_step_like_scaled_gradients(model):
    """For plain SGD, scaling a group's rate equals scaling its gradient."""
    x = torch.rand(5, 9)
    model(x).square().sum().backward()
    factors = factor_by_name(model, fisher_param_groups(model))
    expected = {name: p.detach() - 0.1 * factors[name] * p.grad for name, p in model.named_parameters()}
    torch.optim.SGD(fisher_param_groups(model, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])


KEPT = {
    "StepLR": functools.partial(schedulers.StepLR, step_size=3),
    "MultiStepLR": functools.partial(schedulers.MultiStepLR, milestones=[2, 5]),
    "ExponentialLR": functools.partial(schedulers.ExponentialLR, gamma=0.9),
    "LinearLR": functools.partial(schedulers.LinearLR, total_iters=7),
    "PolynomialLR": functools.partial(schedulers.PolynomialLR, total_iters=7),
    "LambdaLR": functools.partial(schedulers.LambdaLR, lr_lambda=lambda t: min(1.0, t / 5)),
    "CosineAnnealingLR": functools.partial(schedulers.CosineAnnealingLR, T_max=9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.CosineAnnealingLR(o, T_max=6)], milestones=[3]
    ),
}
BROKEN = {
    "OneCycleLR": functools.partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=20),
    "CyclicLR": functools.partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    "CosineAnnealingLR": functools.partial(schedulers.CosineAnnealingLR, T_max=9, eta_min=1e-3),
    "ReduceLROnPlateau": functools.partial(schedulers.ReduceLROnPlateau, min_lr=1e-3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, T_max=6, eta_min=0.01)], milestones=[100]
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_multiplicative_schedulers_pass_and_keep_the_factors(model, name):
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
    rehearse(KEPT[name], optimizer)
    scheduler = KEPT[name](optimizer)
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        rates = {group["name"]: group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
        assert list(rates.values()) == pytest.approx([rates["base"]] * len(rates), rel=1e-9)


@pytest.mark.parametrize("name", BROKEN)
def test_schedulers_with_absolute_rates_are_refused_before_training(model, name):
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
    before = [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(UsageError, match=rf"{name}.*destroy the learning-rate factors.*WarmupCosine"):
        rehearse(BROKEN[name], optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == before  # rehearsed on a stand-in
    rehearse(BROKEN[name], SGD(fisher_param_groups(model, "none")))  # nothing to destroy


def test_lbfgs_is_refused_with_the_way_out(model):
    with pytest.raises(UsageError, match=r"LBFGS doesn.*parameter.*SGD or Adam"):
        fisher_optimizer(torch.optim.LBFGS, fisher_param_groups(model))
    fisher_optimizer(torch.optim.LBFGS, fisher_param_groups(model, "none"))


def test_rates_changed_from_outside_are_refused(model):
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
    require_factors(optimizer, "nobody")
    for group, rate in ((1, 0.1), (0, math.nan), (2, math.nan), (6, math.inf)):
        optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
        optimizer.param_groups[group]["lr"] = rate
        with pytest.raises(UsageError, match=r"^a callback set learning rates"):
            require_factors(optimizer, "a callback")


def test_a_tensor_rate_shared_by_the_groups_is_scaled_for_each(model):
    optimizer = fisher_optimizer(
        functools.partial(torch.optim.Adam, lr=torch.tensor(0.1), foreach=False), fisher_param_groups(model)
    )
    for group in optimizer.param_groups:
        assert float(group["lr"]) == pytest.approx(0.1 * group["lr_scale"])


def test_groups_of_somebodys_own_pass(model):
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    require_factors(optimizer, "nobody")
    require_factors(SGD(model.parameters()), "nobody")


def test_parts_have_base_rates_of_their_own_and_keep_their_factors(model):
    groups = fisher_param_groups(model, lr=0.1, rates={"0": 0.25, "4.Wei": 0.5})
    rates = {
        name: group["lr"] for group in groups for p in group["params"] for name, q in model.named_parameters() if q is p
    }
    assert rates["0.Wex"] == pytest.approx(0.1 * 0.25)
    assert rates["0.Wei"] == pytest.approx(0.1 * 0.25 / 9)
    assert rates["4.Wei"] == pytest.approx(0.1 * 0.5 / 6)
    assert rates["2.weight"] == pytest.approx(0.1)
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model, rates={"0": 0.25}))
    for given, made in zip(fisher_param_groups(model, lr=0.1, rates={"0": 0.25}), optimizer.param_groups, strict=True):
        assert made["lr"] == pytest.approx(given["lr"])
    optimizer.param_groups[1]["lr"] *= 2
    with pytest.raises(UsageError, match=r"'0\.Wix'"):
        require_factors(optimizer, "a callback")
    with pytest.raises(UsageError, match="'head'"):
        fisher_param_groups(model, rates={"head": 0.1})


def test_weights_alone_decay(model):
    groups = fisher_param_groups(model, weight_decay=0.01)
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {p: decays[p] for p in model.parameters()} == {p: 0.01 if p.dim() > 1 else 0.0 for p in model.parameters()}


def test_groups_say_which_parameters_are_signed(model):
    signed = [name for group in fisher_param_groups(model) for name in group["signed"]]
    assert sorted(signed) == sorted(f"{k}.{name}" for k in "04" for name in ("Wex", "Wix", "Wei", "g"))


def test_a_correction_of_ones_own_is_a_function_from_the_model(model):
    def slow_inhibition(model):
        return {name: 0.1 for name, _ in model.named_parameters() if name.endswith("Wix")}

    factors = factor_by_name(model, fisher_param_groups(model, slow_inhibition))
    assert {name for name, factor in factors.items() if factor != 1} == {"0.Wix", "4.Wix"}


def test_steady_inhibition_slows_the_weights_onto_interneurons_alone(model):
    published, steady = (factor_by_name(model, fisher_param_groups(model, kind)) for kind in ("fisher", "steady"))
    changed = {name: steady[name] / factor for name, factor in published.items() if steady[name] != factor}
    assert changed == {"0.Wix": pytest.approx(0.01), "4.Wix": pytest.approx(0.01)}


@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_warmup_and_cosine_scale_every_rate_alike(model, warmup):
    optimizer = fisher_optimizer(SGD, fisher_param_groups(model))
    scheduler = WarmupCosine(optimizer, total=12, warmup=warmup, floor=0.1)
    w = 3 if warmup else 0
    for t in range(13):
        expected = (t + 1) / w if t < w else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - w) / (12 - w))) / 2
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.1 * expected * group["lr_scale"])
        optimizer.step()
        scheduler.step()


def test_schedules_in_a_row_equal_torchs_and_go_on_from_a_state(model):
    makers = [
        functools.partial(schedulers.LinearLR, total_iters=3),
        functools.partial(schedulers.ExponentialLR, gamma=0.5),
    ]

    def both():
        ours, theirs = (fisher_optimizer(SGD, fisher_param_groups(model)) for _ in range(2))
        sequence = schedulers.SequentialLR(theirs, [make(theirs) for make in makers], milestones=[3])
        return (ours, Sequential(ours, makers, [3])), (theirs, sequence)

    (ours, sequence), (theirs, their_sequence) = both()
    for step in range(8):
        if step == 5:
            states = ours.state_dict(), sequence.state_dict()
            (ours, sequence), _ = both()
            ours.load_state_dict(states[0])
            sequence.load_state_dict(states[1])
        for stepped in (ours, sequence, theirs, their_sequence):
            stepped.step()
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups])


def test_an_optimizer_that_ignores_the_groups_or_refuses_its_settings_is_refused(model):
    groups = fisher_param_groups(model)
    with pytest.raises(UsageError, match="must be built of the parameter groups"):
        fisher_optimizer(lambda groups: torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.1), groups)
    with pytest.raises(UsageError, match="Invalid learning rate: -1"):
        fisher_optimizer(functools.partial(torch.optim.SGD, lr=-1), groups)
