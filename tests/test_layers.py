"""The dense layer against a per-neuron loop, and the contract of signed layers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_danns import DaleModule, DANNLinear, UsageError, project_
from lightning_danns.layers import dale_layers, refuse_negative_inputs, sign_violations
from lightning_danns.testing import assert_dale


def one_by_one(layer, x, eps):
    """z of one input vector, neuron by neuron in Python floats."""
    weights = {name: p.tolist() for name, p in layer.named_parameters()}
    z_i = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weights["Wix"]]
    z = []
    for j in range(layer.ne):
        total = sum(w * v for w, v in zip(weights["Wex"][j], x, strict=True))
        total -= sum(w * i for w, i in zip(weights["Wei"][j], z_i, strict=True))
        if layer.divisive:
            gains = [math.exp(a) for a in weights["alpha"]]
            gamma = sum(w * gain * i for w, gain, i in zip(weights["Wei"][j], gains, z_i, strict=True)) + eps
            total = weights["g"][j] * total / gamma
        z.append(total + (weights["b"][j] if "b" in weights else 0))
    return z


def perturbed(layer):
    """The layer with every parameter moved off its special start value, signs kept."""
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    return layer


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 7), ne=st.integers(1, 6), ni=st.integers(1, 6), divisive=st.booleans(), bias=st.booleans(),
    eps=st.sampled_from([None, 0.3, 10.0]), leading=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_forward_equals_a_loop_over_neurons(d, ne, ni, divisive, bias, eps, leading, seed):
    torch.manual_seed(seed)
    layer = perturbed(DANNLinear(d, ne, min(ni, ne), divisive=divisive, bias=bias, eps=eps, dtype=torch.float64))
    x = torch.rand(*leading, d, dtype=torch.float64) + 0.1
    z = layer(x)
    assert z.shape == (*leading, ne)
    expected = [one_by_one(layer, row.tolist(), eps or 1e-8) for row in x.reshape(-1, d)]
    torch.testing.assert_close(z.reshape(-1, ne), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"divisive": False}, {"eps": 0.3}], ids=str)
def test_gradients_agree_with_finite_differences(options):
    torch.manual_seed(0)
    layer = perturbed(DANNLinear(5, 4, 2, **options, dtype=torch.float64))
    names, values = zip(*layer.named_parameters(), strict=True)
    x = (torch.rand(3, 5, dtype=torch.float64) + 0.1).requires_grad_()

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *values))


def test_subtractive_layer_is_one_effective_matrix():
    layer = perturbed(DANNLinear(6, 5, 2, divisive=False, dtype=torch.float64))
    x = torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.Wex - layer.Wei @ layer.Wix).T + layer.b)
    assert {name for name, _ in layer.named_parameters()} == {"Wex", "Wix", "Wei", "b"}


def test_components_compose_to_the_output():
    layer = perturbed(DANNLinear(6, 5, 2, dtype=torch.float64))
    x = torch.rand(4, 6, dtype=torch.float64)
    parts = layer.components(x)
    torch.testing.assert_close(layer.g * (parts.z_e - parts.subtraction) / parts.gamma + layer.b, layer(x))
    assert parts.z_i.shape == (4, 2)
    assert bool((parts.z_i >= 0).all())
    assert bool((parts.gamma > 0).all())
    assert DANNLinear(6, 5, 2, divisive=False).components(x.float()).gamma is None


def test_device_dtype_state_and_repr_behave_like_torch():
    layer = DANNLinear(6, 5, 2, device="meta", dtype=torch.bfloat16)
    assert layer.Wex.device.type == "meta"
    assert layer.alpha.dtype == torch.bfloat16
    layer, other = DANNLinear(6, 5, 2), DANNLinear(6, 5, 2)
    other.load_state_dict(layer.state_dict())
    x = torch.rand(3, 6)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    assert "in_features=6, ne=5, ni=2" in repr(layer)
    before = layer.Wex.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.Wex)


def test_forward_stores_nothing_on_the_layer():
    layer = DANNLinear(6, 5, 2)
    before = set(vars(layer))
    layer(torch.rand(3, 6))
    assert set(vars(layer)) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 5, 0), "ni=0"),
        ((6, 5, 6), "ni=6.*ne=5"),
        ((6, 0, 1), "ne=0"),
        ((0, 5, 1), "in_features=0"),
        ((6, 5, 2.0), r"ni=2\.0: both are whole"),
        ((6, "5", 2), "ne='5'"),
    ],
)
def test_wrong_sizes_are_refused_by_value(arguments, message):
    with pytest.raises(UsageError, match=message):
        DANNLinear(*arguments)


def test_wrong_options_are_refused_by_value():
    with pytest.raises(UsageError, match="inputs='images'"):
        DANNLinear(6, 5, 2, inputs="images")
    with pytest.raises(UsageError, match="inhibition='random'"):
        DANNLinear(6, 5, 2, inhibition="random")
    for eps in (0, -0.3, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"eps={eps}"):
            DANNLinear(6, 5, 2, eps=eps)


def test_wrong_input_width_is_refused_by_shape():
    with pytest.raises(UsageError, match=r"\(3, 7\).*6 features"):
        DANNLinear(6, 5, 2)(torch.rand(3, 7))


def test_projection_clamps_signed_parameters_and_nothing_else():
    model = nn.Sequential(DANNLinear(6, 5, 2), nn.ReLU(), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.data.sub_(10)
    before = {name: p.clone() for name, p in model.named_parameters()}
    project_(model)
    for name, parameter in model.named_parameters():
        signed = name in ("0.Wex", "0.Wix", "0.Wei", "0.g")
        assert torch.equal(parameter, before[name].clamp(min=0) if signed else before[name]), name
    assert_dale(model)


def test_a_new_layer_joins_by_declaring_itself():
    class Lateral(DaleModule):
        nonnegative = ("U", "switched_off")

        def __init__(self):
            super().__init__()
            self.U, self.switched_off = nn.Parameter(torch.tensor([-1.0, 2.0])), None

    model = nn.ModuleList([Lateral(), nn.Linear(2, 2)])
    assert [name for name, _ in dale_layers(model)] == ["0"]
    assert sign_violations(model) == {"0.U": -1.0}
    project_(model)
    assert model[0].U.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("bad", [-1e-30, math.nan])
def test_assert_dale_fails_for_a_single_wrong_weight(bad):
    model = nn.Sequential(DANNLinear(6, 5, 2))
    assert_dale(model)
    model[0].Wei.data[3, 1] = bad
    with pytest.raises(AssertionError, match=r"0\.Wei"):
        assert_dale(model)


def test_assert_dale_fails_when_there_is_nothing_to_assert():
    with pytest.raises(AssertionError, match="no DaleModule"):
        assert_dale(nn.Linear(2, 2))


def test_negative_inputs_are_refused_by_layer_and_value_once():
    model = nn.Sequential(DANNLinear(6, 5, 2), nn.Tanh(), DANNLinear(5, 3, 1))
    x = torch.rand(20, 6)
    refuse_negative_inputs(model)
    with pytest.raises(UsageError, match=r"layer '2' \(DANNLinear\).*-0\."):
        model(x)
    model(x)  # checked once, and not again


def test_inputs_by_keyword_are_checked_and_nan_and_copies_pass():
    layer = DANNLinear(6, 5, 2)
    refuse_negative_inputs(layer)
    copy.deepcopy(layer)(torch.rand(2, 6))
    with pytest.raises(UsageError, match="must be >= 0"):
        layer(x=-torch.rand(2, 6))
    refuse_negative_inputs(layer)
    assert layer(torch.full((2, 6), math.nan)).isnan().all()  # the weights of a diverged layer below, say others


def test_one_name_without_its_comma_is_refused():
    class Single(DaleModule):
        nonnegative = "W"

    with pytest.raises(UsageError, match=r"Single\.nonnegative='W' is a string"):
        project_(Single())


def test_a_name_that_no_parameter_has_is_refused():
    class Misspelt(DaleModule):
        nonnegative = ("Wx",)

    with pytest.raises(UsageError, match=r"Misspelt\.nonnegative names 'Wx'"):
        project_(Misspelt())


def test_a_network_compiles_whole_while_its_inputs_are_checked():
    model = nn.Sequential(DANNLinear(6, 5, 2), nn.ReLU(), DANNLinear(5, 3, 1))
    refuse_negative_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(2, 6)
    torch.testing.assert_close(compiled(x), model(x))


def test_ending_the_input_check_removes_it():
    layer = DANNLinear(6, 5, 2)
    refuse_negative_inputs(layer)()
    layer(-torch.rand(2, 6))


def test_other_wrong_inputs_are_refused():
    layer = DANNLinear(4, 3, 1)
    for x in (torch.tensor(1.0), torch.ones(2, 4, dtype=torch.uint8)):
        with pytest.raises(UsageError, match="floating-point"):
            layer(x)


def test_a_reparametrised_signed_weight_is_refused():
    from torch.nn.utils import prune

    layer = DANNLinear(6, 5, 2)
    prune.random_unstructured(layer, "Wex", amount=0.2)
    with pytest.raises(UsageError, match=r"DANNLinear\.Wex.*no parameter of its own"):
        project_(layer)
