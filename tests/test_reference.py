"""The whole path (modules, parameter groups, projection, Trainer) against arrays of the authors' release."""

import functools

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import DANNMLP
from lightning_danns.testing import assert_dale

NAMES = {"Wex": "W_ex", "Wix": "W_ix", "Wei": "W_ei", "alpha": "alpha", "g": "g", "b": "b"}


class FixedMLP(DANNMLP):
    """The reference network, 12-9-8-4 with 3, 2 and 1 interneurons, at the reference's start values."""

    def __init__(self, arrays, case, correction):
        lr = float(arrays[f"{case}/lr"])
        super().__init__(
            input_shape=[12], num_classes=4, hidden_sizes=[9, 8], ni=[3, 2], correction=correction, balanced=False,
            optimizer=functools.partial(torch.optim.SGD, lr=lr),
        )  # fmt: skip
        self.double()
        for k, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(arrays[f"{case}/params0/layer{k}/{NAMES[name]}"])

    @property
    def layers(self):
        return [module for module in self.network if not isinstance(module, nn.ReLU | nn.Flatten)]


def assert_parameters(model, arrays, prefix, value=lambda p: p.detach()):
    compared = 0
    for k, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            expected = arrays[f"{prefix}/layer{k}/{NAMES[name]}"]
            torch.testing.assert_close(value(parameter), expected, rtol=1e-10, atol=1e-10)
            compared += 1
    assert compared == 18


@pytest.fixture(params=[("dann_corrected", "fisher"), ("dann_uncorrected", "none")], ids=lambda p: p[1])
def case(request):
    return request.param


def test_forward_loss_and_gradients_equal_the_reference(reference, case):
    name, correction = case
    model = FixedMLP(reference, name, correction)
    logits = model(reference[f"{name}/x"])
    loss = F.cross_entropy(logits, reference[f"{name}/y"])
    loss.backward()
    torch.testing.assert_close(logits.detach(), reference[f"{name}/logits"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss.detach(), reference[f"{name}/loss"], rtol=1e-10, atol=1e-10)
    assert_parameters(model, reference, f"{name}/grads", value=lambda p: p.grad)


@pytest.mark.parametrize("steps", [1, 5])
def test_parameters_after_training_equal_the_reference(reference, case, steps, make_trainer):
    name, correction = case
    model = FixedMLP(reference, name, correction)
    batch = TensorDataset(reference[f"{name}/x"], reference[f"{name}/y"])
    trainer = make_trainer(max_epochs=steps, precision="64-true")
    trainer.fit(model, DataLoader(batch, batch_size=6))
    assert trainer.global_step == steps
    assert_parameters(model, reference, f"{name}/params{steps}")
    assert_dale(model)


def test_projection_matters_for_the_reference(reference, make_trainer):
    """Without it the weights differ, so the test above does test it."""
    name = "dann_uncorrected"
    model = FixedMLP(reference, name, "none")
    x, y = reference[f"{name}/x"], reference[f"{name}/y"]
    optimizer = model.configure_optimizers()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with pytest.raises(AssertionError):
        assert_dale(model)
    assert isinstance(model, pl.LightningModule)
