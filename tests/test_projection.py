"""The projection: attached by itself, lost by nobody, and refusing what it cannot repair (see test_dale_always)."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import DANNMLP, DaleProjection, DANNLinear, UsageError
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
        own = DaleProjection()
        for hook in (own.setup, own.setup, own.teardown):  # the first fit broke down where no callback is told
            hook(trainer, model, "fit")
        assert not torch_optimizer._global_optimizer_post_hooks
        assert not torch_optimizer._global_optimizer_pre_hooks
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
