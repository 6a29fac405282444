"""Statistics of the first weights and drives against the closed forms of the method."""

import math

import pytest
import torch

from lightning_danns import DANNLinear
from lightning_danns.initialization import excitatory_scale, exponential_, log_gain


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("inputs", "variance"), [("rectified", 2 * math.pi / (400 * (2 * math.pi - 1))), ("pixels", 1 / 800)]
)
def test_weights_are_exponential_with_the_stated_scale(inputs, variance):
    layer = DANNLinear(400, ne=1000, ni=100, inputs=inputs)
    for weight in (layer.Wex, layer.Wix):
        n, s = weight.numel(), math.sqrt(variance)
        assert weight.mean().item() == pytest.approx(s, rel=5 / math.sqrt(n))
        assert weight.std().item() == pytest.approx(s, rel=10 / math.sqrt(n))
        # an exponential variable exceeds its mean with probability 1/e
        assert (weight > s).double().mean().item() == pytest.approx(1 / math.e, abs=3 / math.sqrt(n))


def test_the_other_parameters_start_at_their_stated_values():
    layer = DANNLinear(400, ne=50, ni=5)
    assert torch.equal(layer.Wei, torch.full((50, 5), 0.2))
    torch.testing.assert_close(layer.alpha.exp(), torch.full((5,), math.sqrt((2 * math.pi - 1) / 400)))
    assert torch.equal(layer.g, torch.ones(50))
    assert torch.equal(layer.b, torch.zeros(50))


def test_one_interneuron_subtracts_the_exact_mean_over_units():
    layer = DANNLinear(30, ne=20, ni=1, dtype=torch.float64)
    parts = layer.components(torch.rand(7, 30, dtype=torch.float64))
    centred = parts.z_e - parts.subtraction
    torch.testing.assert_close(centred.mean(-1), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_iid_inhibition_has_the_stated_means():
    layer = DANNLinear(400, ne=500, ni=50, inhibition="iid")
    expected = math.sqrt(excitatory_scale(400, "rectified") / 50)
    assert layer.Wix.mean().item() == pytest.approx(expected, rel=0.05)
    assert layer.Wei.mean().item() == pytest.approx(expected, rel=0.05)


def test_drive_of_rectified_gaussians_is_centred_and_standardised():
    x = torch.randn(2000, 500, dtype=torch.float64).relu()
    layer = DANNLinear(500, ne=500, ni=50, dtype=torch.float64)
    z = layer(x)
    assert abs(z.mean().item()) < 0.1
    # over units with x held fixed, std is √(π / (2π - 1)) = 0.77
    assert z.std(1).mean().item() == pytest.approx(math.sqrt(math.pi / (2 * math.pi - 1)), rel=0.05)
    # gamma is the joint std of z_e over inputs and units
    parts = layer.components(x)
    assert parts.gamma.mean().item() == pytest.approx(parts.z_e.std().item(), rel=0.05)


def test_ratio_of_std_and_mean_of_the_drive_is_the_initial_gain():
    x = torch.randn(4000, 300, dtype=torch.float64).relu()
    z_e = x @ exponential_(torch.empty(1000, 300, dtype=torch.float64), mean=0.7).T
    assert (z_e.std() / z_e.mean()).item() == pytest.approx(math.exp(log_gain(300)), rel=0.02)


def test_draws_follow_torch_seeds_and_generators():
    torch.manual_seed(3)
    first = DANNLinear(8, 6, 2).Wix
    torch.manual_seed(3)
    assert torch.equal(DANNLinear(8, 6, 2).Wix, first)
    draws = [exponential_(torch.empty(9), 2.0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
