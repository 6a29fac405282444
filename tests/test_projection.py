"""No other callback, checkpoint or validation ever sees a weight of the wrong sign."""

import functools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import DANNMLP, DaleProjection, DANNLinear, UsageError
from lightning_danns.layers import sign_violations
from lightning_danns.testing import assert_dale

OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e4),
    "momentum": functools.partial(torch.optim.SGD, lr=1e3, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=10.0),
    "AdamW": functools.partial(torch.optim.AdamW, lr=10.0, weight_decay=0.5),
}


class Witness(pl.Callback):
    """Looks at the weights at every hook where another callback could, and counts."""

    def __init__(self):
        self.looks = 0
        self.violations = {}

    def look(self, trainer, pl_module, *args, **kwargs):
        self.looks += 1
        # a NaN has no sign; absurd rates may diverge
        self.violations |= {name: low for name, low in sign_violations(pl_module).items() if low < 0}

    on_train_batch_start = on_train_batch_end = on_before_zero_grad = look
    on_validation_start = on_validation_batch_end = on_save_checkpoint = on_train_epoch_end = look


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 4, 4, generator=generator), torch.randint(4, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def small_dann(optimizer=OPTIMIZERS["SGD"], **kwargs):
    torch.manual_seed(0)
    return DANNMLP(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8, 8], ni=2, optimizer=optimizer, **kwargs)


def steps_go_negative(model, batches):
    """Whether the same training without projection leaves the signs."""
    optimizer = model.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        model.shared_step(batch, "train").backward()
        optimizer.step()
        if any(low < 0 for low in sign_violations(model).values()):
            return True
    return False


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stay_nonnegative_under_large_steps(name, accumulate, batches, make_trainer, tmp_path):
    assert steps_go_negative(small_dann(OPTIMIZERS[name]), batches)
    model, witness = small_dann(OPTIMIZERS[name]), Witness()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        callbacks=[witness, checkpoint], accumulate_grad_batches=accumulate, enable_checkpointing=True, max_epochs=2,
        val_check_interval=1,
    )  # fmt: skip
    trainer.fit(model, batches, batches)
    assert witness.looks > 30
    assert witness.violations == {}
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 6 // accumulate
    for path in paths:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert not any((value < 0).any() for key, value in weights.items() if key.endswith(("Wex", "Wix", "Wei", "g")))


def test_manual_optimization_with_two_optimizers(batches, make_trainer):
    class Manual(DANNMLP):
        automatic_optimization = False

        def configure_optimizers(self):
            first, last = self.network[1], self.network[-1]
            return [torch.optim.SGD(layer.parameters(), lr=1e4) for layer in (first, last)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.shared_step(batch, "train"))
                optimizer.step()
                assert not any(low < 0 for low in sign_violations(self).values())

    torch.manual_seed(0)
    model = Manual(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2)
    before = model.network[1].Wex.clone()
    make_trainer().fit(model, batches)
    assert not torch.equal(before, model.network[1].Wex)


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


def test_a_subclass_that_overrides_configure_callbacks_keeps_the_projection(batches, make_trainer):
    class Mine(DANNMLP):
        def configure_callbacks(self):  # no super()
            return pl.callbacks.Timer()

    trainer = make_trainer()
    trainer.fit(Mine(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2), batches)
    assert len(projections(trainer)) == 1
    assert any(isinstance(callback, pl.callbacks.Timer) for callback in trainer.callbacks)


def test_a_mixin_that_overrides_configure_callbacks_keeps_the_projection(batches, make_trainer):
    class Mixin:
        def configure_callbacks(self):
            return [pl.callbacks.Timer()]

    class Mine(Mixin, DANNMLP):
        pass

    class Deeper(Mine):
        pass

    trainer = make_trainer()
    trainer.fit(Deeper(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2), batches)
    assert len(projections(trainer)) == 1
    assert any(isinstance(callback, pl.callbacks.Timer) for callback in trainer.callbacks)


def test_it_serves_any_lightning_module(batches, make_trainer):
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
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
        (optimizer,) = trainer.optimizers
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_negative_starting_weights_are_refused_by_name_and_value(batches, make_trainer):
    model = small_dann()
    model.network[1].Wix.data[0, 0] = -0.125
    with pytest.raises(UsageError, match=r"network\.1\.Wix \(lowest value -0\.125\).*project_"):
        make_trainer().fit(model, batches)


@pytest.mark.parametrize("validate_first", [True, False])
def test_negative_inputs_are_refused_at_the_start(validate_first, make_trainer):
    negative = DataLoader(TensorDataset(torch.rand(8, 1, 4, 4) - 0.5, torch.zeros(8).long()), batch_size=4)
    with pytest.raises(UsageError, match=r"'network\.1'.*pixels in \[0, 1\]"):
        make_trainer().fit(small_dann(), negative, negative if validate_first else None)


def test_rates_changed_by_a_callback_are_refused_before_the_step(batches, make_trainer):
    class Logging(DANNMLP):
        def on_before_optimizer_step(self, optimizer):
            """A hook that many override, without super(): the guard does not live there."""

    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
    with pytest.raises(UsageError, match="callback or the Tuner"):
        make_trainer(max_epochs=4, callbacks=[averaging]).fit(
            Logging(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2), batches
        )
