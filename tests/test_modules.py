"""The LightningModules: metrics, checkpoints, subclassing and sizes."""

import functools
import math
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_danns import DANNMLP, MLP, DANNLinear, ImageClassifier, MNISTDataModule, UsageError
from lightning_danns.testing import assert_dale

SGD = functools.partial(torch.optim.SGD, lr=0.05)


@pytest.fixture
def data(data_dir):
    return MNISTDataModule(str(data_dir), val_size=50)


def fit_and_save(model, data, make_trainer, tmp_path, **kwargs):
    trainer = make_trainer(**kwargs)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return trainer, tmp_path / "model.ckpt"


def test_layers_have_the_stated_sizes():
    model = DANNMLP(hidden_sizes=[500, 300], ni=[50, 20])
    layers = [m for m in model.network if isinstance(m, DANNLinear)]
    assert [(m.d, m.ne, m.ni) for m in layers] == [(784, 500, 50), (500, 300, 20), (300, 10, 1)]
    assert [m.inputs for m in layers] == ["pixels", "rectified", "rectified"]
    default = [m.ni for m in DANNMLP(hidden_sizes=[500, 8]).network if isinstance(m, DANNLinear)]
    assert default == [50, 1, 1]


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_the_control_has_he_normal_weights_and_the_norm_asked_for(norm):
    torch.manual_seed(0)
    model = MLP(hidden_sizes=[400, 400], norm=norm)
    linears = [m for m in model.network if isinstance(m, nn.Linear)]
    for linear, k in zip(linears, (1, 2, 2), strict=True):
        assert linear.weight.std().item() == pytest.approx((k / linear.in_features) ** 0.5, rel=0.05)
        assert not linear.bias.any()
    kinds = {"none": (), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    assert sum(isinstance(m, kinds[norm]) for m in model.network) == (0 if norm == "none" else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ni": [5]}, r"ni=\[5\] has 1 entries for the 2 hidden layers"),
        ({"ni": 0}, "ni=0"),
        ({"ni": 99}, "ni=99"),
        ({"hidden_sizes": [8, 0]}, r"hidden_sizes=\[8, 0\]"),
    ],
)
def test_wrong_sizes_are_refused_by_value(arguments, message):
    with pytest.raises(UsageError, match=message):
        DANNMLP(**{"hidden_sizes": [8, 8], **arguments})
    with pytest.raises(UsageError, match="norm='instance'"):
        MLP(norm="instance")


def test_logged_metrics_equal_those_of_a_loop(data, make_trainer):
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[12], optimizer=SGD)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, datamodule=data)
    (logged,) = trainer.validate(model, datamodule=data, verbose=False)
    model.eval()
    with torch.no_grad():
        logits = model(data.val_set[:][0])
    labels = data.val_set.labels
    assert logged["val_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert logged["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert set(trainer.logged_metrics) == {"val_accuracy", "val_loss"}


def test_train_metrics_cover_each_epoch_alone(data, make_trainer):
    seen = []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(pl_module.metrics_of("train")["loss"].weight))

    make_trainer(max_epochs=2, callbacks=[Record()]).fit(DANNMLP(hidden_sizes=[12], optimizer=SGD), datamodule=data)
    assert seen == [150, 150]


def test_training_learns_and_obeys_dale(data, make_trainer):
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[50], optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = make_trainer(max_epochs=20)
    trainer.fit(model, datamodule=data)
    assert trainer.logged_metrics["val_accuracy"] > 0.7  # chance is 0.1
    assert_dale(model)


def test_batch_normalisation_never_meets_a_batch_of_one(data, make_trainer):
    data.batch_size = 149  # of 150 images
    make_trainer().fit(MLP(hidden_sizes=[12], norm="batch", optimizer=SGD), datamodule=data)


def test_predict_gives_probabilities_in_the_order_of_the_data(data, make_trainer):
    model = DANNMLP(hidden_sizes=[12])
    probabilities = torch.cat(make_trainer().predict(model, datamodule=data))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(60))
    torch.testing.assert_close(probabilities[7:8], model(data.test_set[7:8][0]).softmax(-1).detach())


def test_checkpoints_reload_from_the_path_alone(data, make_trainer, tmp_path):
    model = DANNMLP(hidden_sizes=[12, 9], ni=[3, 2], divisive=False, correction="none", optimizer=SGD)
    _, path = fit_and_save(model, data, make_trainer, tmp_path)
    again = DANNMLP.load_from_checkpoint(path)
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(again(x), model(x))
    assert again.hparams == model.hparams
    assert again.hparams.correction == "none"
    assert again.optimizer_factory([nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.05
    hyper_parameters = torch.load(path, weights_only=True)["hyper_parameters"]
    assert not any(callable(value) for value in hyper_parameters.values())


class Narrow(DANNMLP):
    """A researcher's subclass: its own arguments, an eager second save_hyperparameters, another network."""

    def __init__(self, width: int = 5, scheduler=None, **kwargs):
        super().__init__(hidden_sizes=[width], **kwargs)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Flatten(), DANNLinear(784, width, 1), nn.ReLU(), nn.Linear(width, 10))


def test_a_subclass_inherits_everything(data, make_trainer, tmp_path):
    model = Narrow(width=7, optimizer=SGD, scheduler=functools.partial(int))
    trainer, path = fit_and_save(model, data, make_trainer, tmp_path)
    again = Narrow.load_from_checkpoint(path)
    assert again.hparams.width == 7
    assert "hidden_sizes" not in again.hparams  # the subclass passes it by itself
    assert torch.equal(again.network[1].Wix, model.network[1].Wix)
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    assert names == ["base", "network.1.Wix", "network.1.Wei", "network.1.alpha"]
    assert_dale(model)


def test_resuming_continues_exactly(data, make_trainer, tmp_path):
    def fresh():
        pl.seed_everything(0, verbose=False)
        return DANNMLP(hidden_sizes=[12], optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9))

    straight, half, resumed = fresh(), fresh(), fresh()
    pl.seed_everything(0, verbose=False)
    make_trainer(max_epochs=3).fit(straight, datamodule=data)
    pl.seed_everything(0, verbose=False)
    _, path = fit_and_save(half, data, make_trainer, tmp_path, max_epochs=1)
    pl.seed_everything(0, verbose=False)
    make_trainer(max_epochs=3).fit(resumed, datamodule=data, ckpt_path=path)
    assert not torch.equal(half.network[1].Wex, straight.network[1].Wex)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_arguments_are_kept_as_plain_values_and_what_cannot_is_named(data, make_trainer, tmp_path):
    model = DANNMLP(
        hidden_sizes=np.array([12, 9]), ni=range(1, 3),
        optimizer=functools.partial(torch.optim.SGD, lr=np.float64(0.3)),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), correction=slow_inhibition,
    )  # fmt: skip
    _, path = fit_and_save(model, data, make_trainer, tmp_path)
    kept = torch.load(path, weights_only=True)["hyper_parameters"]
    assert kept["hidden_sizes"] == [12, 9]
    assert kept["ni"] == [1, 2]
    assert kept["optimizer"] == {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.3}}
    with pytest.warns(UserWarning, match="could not keep lr_scheduler=<function"):
        again = DANNMLP.load_from_checkpoint(path)
    assert again.correction is slow_inhibition
    with pytest.raises(UsageError, match=r"load_from_checkpoint\(path, lr_scheduler=...\)"):
        make_trainer().fit(again, datamodule=data)
    pickle.loads(pickle.dumps(DANNMLP.load_from_checkpoint(path, lr_scheduler=None)))


def slow_inhibition(model):
    return {name: 0.1 for name, _ in model.named_parameters() if name.endswith("Wix")}


class Seven(DANNMLP):
    """Passes an argument of its base by itself."""

    def __init__(self, **kwargs):
        super().__init__(num_classes=7, **kwargs)


def test_an_argument_that_a_subclass_fixes_does_not_stand_in_the_way(data_dir, make_trainer, tmp_path):
    trainer = make_trainer()
    model = Seven(hidden_sizes=[3])
    assert "num_classes" not in model.hparams
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "seven.ckpt", weights_only=True)
    assert Seven.load_from_checkpoint(tmp_path / "seven.ckpt").network[-1].ne == 7


def test_a_checkpoint_of_another_network_is_refused(data, make_trainer, tmp_path):
    _, path = fit_and_save(DANNMLP(hidden_sizes=[12], ni=3, optimizer=SGD), data, make_trainer, tmp_path)
    message = r"network\.1\.Wex is \(20, 784\) here and \(12, 784\) there.*hidden_sizes=\[12\]"
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(DANNMLP(hidden_sizes=[20], ni=3), datamodule=data, ckpt_path=path)
    with pytest.raises(UsageError, match="another network than this Narrow"):
        make_trainer().fit(Narrow(), datamodule=data, ckpt_path=path)


def test_a_checkpoint_of_a_network_that_computes_otherwise_is_refused(data, make_trainer, tmp_path):
    small = {"hidden_sizes": [12], "ni": 3, "optimizer": SGD}
    model = DANNMLP(**small)
    trainer, path = fit_and_save(model, data, make_trainer, tmp_path)
    with pytest.raises(UsageError, match=r"'network\.1' has balanced=True, here it has balanced=False"):
        trainer.test(DANNMLP(**small, balanced=False), datamodule=data, ckpt_path=path)
    trainer.test(DANNMLP(**small, eps=0.3), datamodule=data, ckpt_path=path)  # which is that of balanced layers
    trainer.test(DANNMLP(**small), datamodule=data, ckpt_path=path)
    x = torch.rand(5, 1, 28, 28)
    other = DANNMLP.load_from_checkpoint(path, eps=1.0)  # who says so in so many words
    assert not torch.allclose(other(x), model(x))


def test_a_module_without_its_network_is_told_to_set_it(data, make_trainer):
    class Misnamed(ImageClassifier):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), DANNLinear(784, 10, 1))

    with pytest.raises(UsageError, match=r"Misnamed has no self\.network"):
        make_trainer().fit(Misnamed(), datamodule=data)


def test_loading_with_strict_false_allows_what_torch_allows(data, make_trainer, tmp_path):
    class Grown(DANNMLP):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_buffer("extra", torch.zeros(1))

    _, path = fit_and_save(DANNMLP(hidden_sizes=[12], optimizer=SGD), data, make_trainer, tmp_path)
    assert Grown.load_from_checkpoint(path, strict=False).extra == 0
    with pytest.raises(RuntimeError, match="extra"):
        Grown.load_from_checkpoint(path)


def test_wrong_arguments_are_refused_by_value():
    with pytest.raises(UsageError, match="correction='fishr'"):
        DANNMLP(correction="fishr")
    with pytest.raises(UsageError, match="optimizer='SGD'"):
        DANNMLP(optimizer="SGD")


def test_schedulers_step_once_an_epoch_and_scale_every_group(data, make_trainer):
    model = DANNMLP(
        hidden_sizes=[12], optimizer=SGD, lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    )
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, datamodule=data)
    for group in trainer.optimizers[0].param_groups:
        assert group["lr"] == pytest.approx(0.05 * 0.1**2 * group["lr_scale"])


def test_reduce_on_plateau_follows_the_validation_loss(data, make_trainer):
    losses, rates = [], []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                losses.append(float(trainer.callback_metrics["val_loss"]))

    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, eps=0, threshold=0.5
    )
    model = DANNMLP(hidden_sizes=[12], optimizer=functools.partial(torch.optim.SGD, lr=0.3), lr_scheduler=plateau)
    make_trainer(max_epochs=9, callbacks=[Look()]).fit(model, datamodule=data)
    lowest, expected = math.inf, [0.3]
    for loss in losses[:-1]:  # the rule of the scheduler, by hand
        better = loss < lowest * (1 - 0.5)
        lowest = loss if better else lowest
        expected.append(expected[-1] * (1 if better else 0.5))
    assert rates == pytest.approx(expected)
    assert min(rates) < 0.3


def test_a_scheduler_with_absolute_rates_is_refused_at_the_start(data, make_trainer):
    one_cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=99)
    with pytest.raises(UsageError, match="OneCycleLR"):
        make_trainer().fit(DANNMLP(hidden_sizes=[12], lr_scheduler=one_cycle), datamodule=data)
    make_trainer().fit(MLP(hidden_sizes=[12], lr_scheduler=one_cycle), datamodule=data)


def test_images_of_another_size_are_refused(make_trainer):
    with pytest.raises(UsageError, match=r"\(2, 1024\).*784 features"):
        DANNMLP()(torch.rand(2, 1, 32, 32))


def test_the_base_class_needs_only_a_network():
    class Tiny(ImageClassifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(784, self.num_classes))

    assert Tiny(num_classes=3)(torch.rand(2, 1, 28, 28)).shape == (2, 3)


@pytest.mark.parametrize("val_size", [0, 50])
def test_the_test_images_are_evaluated_each_epoch_if_asked_for(val_size, data_dir, make_trainer):
    data = MNISTDataModule(str(data_dir), val_size=val_size, test_each_epoch=True)
    model = DANNMLP(hidden_sizes=[12], optimizer=SGD)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, datamodule=data)
    logged = dict(trainer.callback_metrics)
    for stage in ("val", "test") if val_size else ("test",):
        images, labels = getattr(data, f"{stage}_set")[:]
        with torch.no_grad():
            logits = model.eval()(images)
        assert logged[f"{stage}_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
        assert logged[f"{stage}_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ("val_loss" in logged) == bool(val_size)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    assert tested["test_accuracy"] == logged["test_accuracy"]


def test_several_loaders_are_counted_each_for_itself(data, make_trainer):
    class TwoLoaders(MNISTDataModule):
        def val_dataloader(self):
            return [super().val_dataloader(), self.test_dataloader()]

        def test_dataloader(self):
            return (
                [super().test_dataloader(), super().val_dataloader()]
                if self.trainer.testing
                else super().test_dataloader()
            )

    data = TwoLoaders(data.data_dir, val_size=50)
    model = DANNMLP(hidden_sizes=[12], optimizer=SGD)
    trainer = make_trainer()
    trainer.fit(model, datamodule=data)
    logged = dict(trainer.callback_metrics)
    for name, part in (("val", data.val_set), ("val_1", data.test_set)):
        images, labels = part[:]
        with torch.no_grad():
            accuracy = (model.eval()(images).argmax(-1) == labels).double().mean().item()
        assert logged[f"{name}_accuracy"] == pytest.approx(accuracy)
    tested = trainer.test(model, datamodule=data, verbose=False)
    assert tested[0]["test_accuracy"] == logged["val_1_accuracy"]
    assert tested[1]["test_1_accuracy"] == logged["val_accuracy"]
