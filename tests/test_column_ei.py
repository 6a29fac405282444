"""Sign-constrained columns against the reference arrays and an explicit matrix."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_danns import ColumnEILinear, UsageError, fisher_param_groups, project_


@pytest.mark.parametrize("steps", [1, 5])
def test_network_equals_the_reference(reference, steps):
    sizes = [(12, 11, 2), (11, 11, 1), (11, 4, 1)]
    layers = [ColumnEILinear(*size, dtype=torch.float64) for size in sizes]
    for k, layer in enumerate(layers):
        assert torch.equal(layer.sign, reference[f"column_ei/params0/layer{k}/sign"])
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(reference[f"column_ei/params0/layer{k}/{name}"])
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(fisher_param_groups(model, lr=float(reference["column_ei/lr"])))
    x, y = reference["column_ei/x"], reference["column_ei/y"]
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        if step == 0:
            torch.testing.assert_close(logits.detach(), reference["column_ei/logits"], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(loss.detach(), reference["column_ei/loss"], rtol=1e-10, atol=1e-10)
            for k, layer in enumerate(layers):
                for name, parameter in layer.named_parameters():
                    expected = reference[f"column_ei/grads/layer{k}/{name}"]
                    torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)
        optimizer.step()
        project_(model)
    for k, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = reference[f"column_ei/params{steps}/layer{k}/{name}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-10)


def test_it_is_a_matrix_with_signed_columns():
    layer = ColumnEILinear(7, 5, ni=2, dtype=torch.float64)
    x = torch.rand(3, 4, 7, dtype=torch.float64)
    D = torch.diag(torch.tensor([1.0] * 5 + [-1.0] * 2, dtype=torch.float64))
    torch.testing.assert_close(layer(x), x @ (layer.W @ D).T + layer.b)


def test_signs_survive_creation_on_the_meta_device():
    layer = ColumnEILinear(7, 5, ni=2, device="meta").to_empty(device="cpu")
    layer.sign.fill_(7)  # to_empty leaves any number
    layer.reset_parameters()
    assert layer.sign.tolist() == [1] * 5 + [-1] * 2


def test_first_weights_have_the_stated_means():
    torch.manual_seed(0)
    layer = ColumnEILinear(550, 1000, ni=50)
    s_e = 1 / math.sqrt((2 * math.pi - 1) / (2 * math.pi) * (500 + 500**2 / 50))
    assert layer.W[:, :500].mean().item() == pytest.approx(s_e, rel=0.01)
    assert layer.W[:, 500:].mean().item() == pytest.approx(10 * s_e, rel=0.03)
    first = ColumnEILinear(784, 1000, ni=0)
    assert first.W.std().item() == pytest.approx(1 / 28, rel=0.01)


def test_drive_of_rectified_unit_normals_has_mean_0_and_variance_1():
    torch.manual_seed(0)
    x = torch.randn(4000, 550, dtype=torch.float64).relu()
    z = ColumnEILinear(550, 550, ni=50, dtype=torch.float64)(x)
    assert abs(z.mean().item()) < 0.1
    assert z.var().item() == pytest.approx(1, rel=0.1)


def test_centring_cancels_the_mean_pixel():
    torch.manual_seed(0)
    layer = ColumnEILinear(784, 2000, ni=0)
    layer.centre_(0.13)
    assert abs(layer(torch.full((1, 784), 0.13)).mean().item()) < 0.05
    with pytest.raises(UsageError, match="bias=True"):
        ColumnEILinear(4, 4, 0, bias=False).centre_(0.1)
    with pytest.raises(UsageError, match="2 inputs of this layer are inhibitory"):
        ColumnEILinear(4, 4, 2).centre_(0.1)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, -1), (0, 4, 0), (4, 0, 1)])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(UsageError):
        ColumnEILinear(*sizes)


def test_wrong_width_is_refused():
    with pytest.raises(UsageError, match="7 features"):
        ColumnEILinear(7, 5, 2)(torch.rand(3, 8))
