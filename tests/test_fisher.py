"""The Fisher information as it is measured, and the factors that follow from it."""

import copy
import functools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    DANNLinear,
    FisherMonitor,
    ImageClassifier,
    MNISTDataModule,
    ReplicatedClassifier,
    Sequential,
    UsageError,
    fisher_param_groups,
    fisher_ratios,
    measured_factors,
    project_,
)
from lightning_danns.optim import change_factors_, mean_squared_gradients, require_factors

SGD = functools.partial(torch.optim.SGD, lr=0.05)


@pytest.fixture
def data(data_dir):
    return MNISTDataModule(str(data_dir), val_size=50)


def network():
    torch.manual_seed(0)
    layers = DANNLinear(7, 12, 2, inputs="pixels"), nn.ReLU(), DANNLinear(12, 4, 1)
    return nn.Sequential(*layers).double()


def factors_of(optimizer):
    return {group["name"]: group["lr_scale"] for group in optimizer.param_groups}


def test_ratios_approach_the_exact_expectation_over_labels():
    model, image = network(), torch.rand(1, 7, dtype=torch.float64)
    probabilities = model(image).softmax(-1)[0]
    exact = {p: torch.zeros_like(p) for p in model.parameters()}
    for label in range(4):
        gradients = torch.autograd.grad(F.cross_entropy(model(image), torch.tensor([label])), list(exact))
        for p, gradient in zip(exact, gradients, strict=True):
            exact[p] += probabilities[label].detach() * gradient**2
    ratios = fisher_ratios(model, image.expand(4000, 7), torch.Generator().manual_seed(0))
    for name, layer in (("0", model[0]), ("2", model[2])):
        for kind in ("Wix", "Wei", "alpha", "g", "b"):
            expected = float(exact[getattr(layer, kind)].mean() / exact[layer.Wex].mean())
            assert ratios[name][kind] == pytest.approx(expected, rel=0.1, abs=1e-12)


def test_a_regression_has_the_information_of_its_own_distribution():
    """Of y ~ Normal(W x, s): F of W_ij is E[x_j^2] / s^2, whatever W is."""
    model, x = nn.Linear(3, 2, bias=False).double(), torch.rand(20_000, 3, dtype=torch.float64)
    squares = mean_squared_gradients(
        model, x, torch.Generator().manual_seed(0), lambda outputs: torch.distributions.Normal(outputs, 2.0)
    )
    torch.testing.assert_close(squares[model.weight], x.square().mean(0).expand(2, 3) / 4, rtol=0.05, atol=0)


def test_a_generator_leaves_the_random_numbers_of_training_alone():
    model = nn.Sequential(nn.Dropout(0.5), network())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (
        fisher_ratios(model, torch.ones(8, 7, dtype=torch.float64), torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_ratios_are_relative_to_the_parameter_that_the_layer_names():
    class Relative(DANNLinear):
        relative_to = "Wix"

    torch.manual_seed(0)
    model, x = nn.Sequential(Relative(7, 4, 2)).double(), torch.rand(9, 7, dtype=torch.float64)
    ratios = fisher_ratios(model, x, torch.Generator().manual_seed(0))["0"]
    squares = mean_squared_gradients(model, x, torch.Generator().manual_seed(0))
    assert ratios["Wex"] == pytest.approx(float(squares[model[0].Wex].mean() / squares[model[0].Wix].mean()))
    assert "Wix" not in ratios
    assert set(measured_factors(model, {"0": ratios})) == {"0.Wei", "0.alpha"}
    model[0].relative_to = "weight"
    with pytest.raises(UsageError, match=r"Relative\.relative_to='weight' is no parameter of its own; these are: Wex"):
        fisher_ratios(model, x)


def test_the_scale_of_a_hidden_layer_has_no_effect_at_the_start():
    """The next layer divides it away while biases are 0; the output layer's scale makes logits larger."""
    ratios = fisher_ratios(network(), torch.rand(64, 7, dtype=torch.float64))
    assert ratios["0"]["alpha"] < 1e-10 < ratios["2"]["alpha"]


def test_factors_are_inverse_ratios_but_never_above_one():
    ratios = {"0": {"Wix": 0.1, "Wei": 50.0, "alpha": 0.0, "g": 9.0, "b": 9.0}, "2": {"Wei": 4.0}}
    expected = {"0.Wix": 1, "0.Wei": 0.02, "0.alpha": 1, "2.Wei": 0.25}
    assert measured_factors(network(), ratios) == pytest.approx(expected)


@pytest.mark.parametrize("ratio", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_number_gives_no_factor(ratio):
    with pytest.raises(UsageError, match=r"Fisher information of 0.Wei is (nan|inf) times"):
        measured_factors(network(), {"0": {"Wei": ratio}})


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "Sequential": lambda o: Sequential(
        o,
        [
            functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.5),
            functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_from_changed_factors_as_if_they_had_been_so_from_the_start(name):
    def optimizer(factor):
        groups = fisher_param_groups(network(), {"0.Wei": factor}, lr=0.1)
        optimizer = torch.optim.SGD(groups)
        return optimizer, SCHEDULERS[name](optimizer)

    (changed, changed_scheduler), (expected, expected_scheduler) = optimizer(0.5), optimizer(0.1)
    for step in range(6):
        if step == 2:
            change_factors_(changed, {"0.Wei": 0.1}, [changed_scheduler])
        for one in (changed, expected, changed_scheduler, expected_scheduler):
            one.step()
        require_factors(changed, "this test")
    rates = [[group["lr"] for group in one.param_groups] for one in (changed, expected)]
    assert rates[0] == pytest.approx(rates[1])


def test_named_parameters_are_groups_of_their_own_even_at_factor_one():
    assert [g["name"] for g in fisher_param_groups(network(), {"0.Wix": 1.0})] == ["base", "0.Wix"]


def test_the_first_step_of_a_fit_takes_the_factors_measured_on_its_batch(data, make_trainer):
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[12], balanced=False, correction="measured", optimizer=SGD)
    twin = copy.deepcopy(model.network)
    batches = []
    model.on_train_batch_start = lambda batch, index: batches.append(batch)
    trainer = make_trainer(max_steps=1, num_sanity_val_steps=0)  # so that no layer has met inputs before
    trainer.fit(model, datamodule=data)
    ((images, labels),) = batches
    factors = measured_factors(twin, fisher_ratios(twin, images, torch.Generator().manual_seed(0)))
    assert len(factors) == 6
    assert min(factors.values()) < 0.1 < max(factors.values()) == 1
    optimizer = torch.optim.SGD(fisher_param_groups(twin, factors, lr=0.05))
    F.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    project_(twin)
    torch.testing.assert_close(model.network.state_dict(), twin.state_dict())
    assert factors_of(trainer.optimizers[0]) == {"base": 1, **{f"network.{k}": v for k, v in factors.items()}}


def test_the_monitor_asks_the_module_what_its_outputs_predict(make_trainer):
    class Regression(DANNMLP):
        def likelihood(self, outputs):
            return torch.distributions.Normal(outputs, 0.5)

    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    torch.manual_seed(0)
    model, images = Regression(hidden_sizes=[12], optimizer=SGD), torch.rand(4, 1, 28, 28)
    expected, of_classes = (
        fisher_ratios(model.network, images, torch.Generator().manual_seed(0), *likelihood)["3"]["b"]
        for likelihood in ([model.likelihood], [])
    )
    loader = DataLoader(TensorDataset(images, torch.zeros(4, dtype=torch.long)), batch_size=4)
    make_trainer(max_steps=1, callbacks=[FisherMonitor()], logger=Logger()).fit(model, loader)
    assert logged[0]["network.3/fisher_b"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(of_classes, rel=0.05)


def test_watching_alone_changes_no_weight(data, make_trainer):
    def trained(callbacks):
        torch.manual_seed(0)
        model = DANNMLP(hidden_sizes=[12], optimizer=SGD)
        make_trainer(max_epochs=2, callbacks=callbacks).fit(model, datamodule=data)
        return model.state_dict()

    torch.testing.assert_close(trained([FisherMonitor(every_n_epochs=1)]), trained([]), rtol=0, atol=0)


def test_a_resumed_fit_goes_on_with_its_factors_and_measures_when_due(data, make_trainer, tmp_path):
    def fit(epochs, path=None):
        torch.manual_seed(0)
        model = DANNMLP(hidden_sizes=[12], correction="measured", optimizer=SGD)
        trainer = make_trainer(max_epochs=epochs, callbacks=[FisherMonitor(every_n_epochs=2)])
        trainer.fit(model, datamodule=data, ckpt_path=path)
        return trainer, model

    whole, expected = fit(4)
    factors = []
    for epochs in (1, 3, 4):
        trainer, model = fit(epochs, tmp_path / "last.ckpt" if factors else None)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        factors.append(factors_of(trainer.optimizers[0]))
    assert factors[0] != factors[1] == factors[2] == factors_of(whole.optimizers[0])
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_what_was_measured_is_logged_and_printed_beside_what_is_assumed(run):
    small = ("--model.hidden_sizes=[12]", "--data.val_size=50", "--trainer.max_epochs=1")
    model = ("--model=DANNMLP", "--model.balanced=false", "--model.correction=measured")
    run("fit", *model, "--data=MNISTDataModule", *small, "--run_dir=a")
    header, first = (line.split(",") for line in Path("a/metrics.csv").read_text().splitlines()[:2])
    logged = dict(zip(header, first, strict=True))
    assert float(logged["network.1/fisher_Wei"]) > 1 > float(logged["network.1/fisher_alpha"])
    assert "network.1/fisher_Wex" not in logged


def test_what_cannot_be_measured_is_refused(data, make_trainer):
    class NoNetwork(DANNMLP):
        def __init__(self):
            super().__init__(hidden_sizes=[12])
            self.body, self.network = self.network, None

        def forward(self, images):
            return self.body(images)

    class Normalised(ImageClassifier):
        def __init__(self):
            super().__init__(correction="measured")
            self.network = nn.Sequential(nn.Flatten(), DANNLinear(784, 10, 1, inputs="pixels"), nn.BatchNorm1d(10))

    with pytest.raises(UsageError, match=r"pl_module\.network, which NoNetwork has not"):
        make_trainer(callbacks=[FisherMonitor()]).fit(NoNetwork(), datamodule=data)
    with pytest.raises(UsageError, match="normalises over the batch"):
        make_trainer().fit(Normalised(), datamodule=data)
    negative = TensorDataset(-torch.ones(4, 1, 28, 28), torch.zeros(4, dtype=torch.long))
    with pytest.raises(UsageError, match="received an input of -1"):
        make_trainer().fit(DANNMLP(hidden_sizes=[12], correction="measured"), DataLoader(negative, batch_size=2))
    with pytest.raises(UsageError, match="every_n_epochs=0"):
        FisherMonitor(every_n_epochs=0)
    measured = functools.partial(DANNMLP, hidden_sizes=[12], correction="measured")
    with pytest.raises(UsageError, match="measures one network, not many"):
        make_trainer().fit(ReplicatedClassifier(measured, seeds=[0, 1]), datamodule=data)
