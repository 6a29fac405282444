"""The projection: attached by itself, lost by nobody, and refusing what it cannot repair (see test_dale_always)."""

import functools

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import DANNMLP, DaleProjection, DANNLinear, UsageError, project_
from lightning_danns.layers import imbalances
from lightning_danns.testing import assert_dale


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 4, 4, generator=generator), torch.randint(4, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def small_dann(**kwargs):
    torch.manual_seed(0)
    return DANNMLP(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8, 8], ni=2, **kwargs)


def projections(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, DaleProjection)]


def test_the_module_attaches_the_projection_itself(batches, make_trainer):
    trainer = make_trainer()
    trainer.fit(small_dann(), batches)
    assert len(projections(trainer)) == 1


def test_a_users_own_projection_wins(batches, make_trainer):
    class Counting(DaleProjection):
        calls = 0

        def project(self, pl_module):
            self.calls += 1
            super().project(pl_module)

    own = Counting()
    trainer = make_trainer(callbacks=[own])
    trainer.fit(small_dann(), batches)
    assert projections(trainer) == [own]
    assert own.calls == trainer.global_step == 6


def test_a_subclass_that_loses_the_projection_is_refused(batches, make_trainer):
    class Mine(DANNMLP):
        def configure_callbacks(self):  # no super()
            return pl.callbacks.Timer()

    with pytest.raises(UsageError, match=r"Mine: its configure_callbacks must return those of super\(\) too"):
        make_trainer().fit(Mine(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2), batches)


def test_a_probe_that_a_callback_trains_beside_is_not_touched(batches, make_trainer):
    probe = DANNLinear(4, 3, 1)

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            optimizer = torch.optim.SGD(probe.parameters(), lr=100.0)
            probe.Wex.grad = torch.ones_like(probe.Wex)
            optimizer.step()

    make_trainer(callbacks=[Probe()]).fit(small_dann(), batches)
    assert bool((probe.Wex < 0).any())


def test_each_stage_refuses_its_own_negative_inputs(batches, make_trainer):
    x, y = batches.dataset.tensors
    negative = DataLoader(TensorDataset((x - 0.1307) / 0.3081, y), batch_size=4)
    message = r"'network\.1'.*pixels in \[0, 1\]"
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(small_dann(), negative, batches)  # after a sanity check of valid images
    with pytest.raises(UsageError, match=message):
        make_trainer(num_sanity_val_steps=0).fit(small_dann(), batches, negative)
    model = small_dann()
    for stage in ("validate", "test", "predict"):
        with pytest.raises(UsageError, match=message):
            getattr(make_trainer(), stage)(model, negative)
        getattr(make_trainer(), stage)(model, batches)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_balanced_layers_are_in_balance_at_every_step_and_after_averaging(precision, batches, make_trainer):
    lost = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            lost.append(imbalances(pl_module))

        on_validation_batch_end = on_train_batch_end

    average = EMAWeightAveraging(decay=0.5)
    model = small_dann(balanced=True, optimizer=functools.partial(torch.optim.SGD, lr=10.0))
    make_trainer(callbacks=[Look(), average], max_epochs=2, precision=precision).fit(model, batches, batches)
    assert len(lost) == 2 * 12 + 2
    assert not any(lost)
    assert_dale(model)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_weights_out_of_balance_are_refused_and_left_as_they_are(stage, batches, make_trainer):
    model = small_dann(balanced=True)
    model.network[1].Wei.data *= 2
    before = model.network[1].Wei.clone()
    with pytest.raises(UsageError, match=r"network\.1 \(up to 1 of a unit's excitation\).*balanced=False"):
        getattr(make_trainer(), stage)(model, batches)
    assert torch.equal(model.network[1].Wei, before)


def test_it_serves_any_lightning_module(batches, make_trainer):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = DANNLinear(16, 4, 2, inputs="pixels")

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    model = Plain()
    make_trainer(callbacks=[DaleProjection()]).fit(model, batches)
    assert_dale(model)


def test_hooks_are_gone_after_the_fit_and_after_an_exception(batches, make_trainer):
    class Failing(DANNMLP):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    for model_class, context in ((DANNMLP, None), (Failing, RuntimeError)):
        model = model_class(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2)
        trainer = make_trainer()
        if context is None:
            trainer.fit(model, batches)
        else:
            with pytest.raises(context, match="stop"):
                trainer.fit(model, batches)
        model.network[1].b.data.fill_(1.0)
        model.network[1].Wex.data.fill_(-1.0)  # which a hook that is left would clamp
        model.network[1](-torch.ones(1, 16))  # and another would refuse
        for optimizer in trainer.optimizers:
            optimizer.step()
        assert bool((model.network[1].Wex < 0).any())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_averages_of_a_checkpoint_are_balanced_when_a_stage_starts(stage, batches, make_trainer, tmp_path):
    fast = functools.partial(torch.optim.SGD, lr=30.0)
    trainer = make_trainer(callbacks=[EMAWeightAveraging(decay=0.9)], max_epochs=2)
    trainer.fit(small_dann(balanced=True, optimizer=fast), batches)  # nothing has validated, and balanced, the averages
    trainer.save_checkpoint(tmp_path / "averages.ckpt")
    averages = torch.load(tmp_path / "averages.ckpt")["state_dict"]
    model = small_dann(balanced=True, optimizer=fast)
    model.load_state_dict(averages)
    assert max(imbalances(model).values()) > 0.03
    with pytest.raises(UsageError, match="if they are averages, apply"):
        getattr(make_trainer(), stage)(model, batches)
    project_(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    getattr(make_trainer(max_epochs=2), stage)(model, batches, ckpt_path=tmp_path / "averages.ckpt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_a_published_network_is_not_taken_for_a_balanced_one(batches, make_trainer):
    published = DANNMLP(balanced=False)
    model = DANNMLP()
    model.load_state_dict(published.state_dict())
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    with pytest.raises(UsageError, match="balanced=False"):
        make_trainer().test(model, DataLoader(TensorDataset(x, y), 4))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_negative_starting_weights_are_refused_by_name_and_value(stage, batches, make_trainer):
    model = small_dann()
    model.network[1].Wix.data[0, 0] = -0.125
    with pytest.raises(UsageError, match=r"network\.1\.Wix \(lowest value -0\.125\).*project_"):
        getattr(make_trainer(), stage)(model, batches)


@pytest.mark.parametrize("validate_first", [True, False])
def test_negative_inputs_are_refused_at_the_start(validate_first, make_trainer):
    negative = DataLoader(TensorDataset(torch.rand(8, 1, 4, 4) - 0.5, torch.zeros(8).long()), batch_size=4)
    with pytest.raises(UsageError, match=r"'network\.1'.*pixels in \[0, 1\]"):
        make_trainer().fit(small_dann(), negative, negative if validate_first else None)


def test_rates_changed_by_a_callback_are_refused_before_the_step(batches, make_trainer):
    class Logging(DANNMLP):
        def on_before_optimizer_step(self, optimizer):
            """A hook that many override, without super(): the guard does not live there."""

    class SetsRates(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.1

    with pytest.raises(UsageError, match="callback or the Tuner"):
        make_trainer(max_epochs=4, callbacks=[SetsRates()]).fit(
            Logging(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2), batches
        )
