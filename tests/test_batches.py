"""The order of batches, and where it goes on."""

import gc
import multiprocessing
import weakref
from itertools import chain, islice

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_danns import CIFAR10DataModule, MNISTDataModule, UsageError
from lightning_danns.data.batches import BatchDataset, EvenBatchSampler, ResumableLoader

SIZES = {"n": st.integers(1, 70), "batch_size": st.integers(1, 9), "world_size": st.integers(1, 4)}


def epoch(n, batch_size, world_size=1, **kwargs):
    """Samples of each batch of each process."""
    samplers = [EvenBatchSampler(n, batch_size, process=(rank, world_size), **kwargs) for rank in range(world_size)]
    return [[index.samples.tolist() for index in sampler] for sampler in samplers]


@settings(deadline=None)
@given(**SIZES, shuffle=st.booleans())
def test_every_sample_is_in_one_batch_of_one_process(n, batch_size, world_size, shuffle):
    if n < world_size:
        with pytest.raises(UsageError, match=f"{n} images are too few for {world_size} processes"):
            epoch(n, batch_size, world_size)
        return
    batches = epoch(n, batch_size, world_size, shuffle=shuffle)
    assert sorted(k for one in batches for batch in one for k in batch) == list(range(n))
    assert len({len(one) for one in batches}) == 1  # as many batches in each process
    sizes = {len(batch) for one in batches for batch in one}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size or (batch_size == 1 and max(sizes) == 2)


@settings(deadline=None)
@given(**SIZES)
def test_batches_of_several_processes_are_together_those_of_one(n, batch_size, world_size):
    n += world_size
    together = [[*chain(*parts)] for parts in zip(*epoch(n, batch_size, world_size, shuffle=True), strict=True)]
    if len(together) == -(-n // (batch_size * world_size)):  # all but batches of 1 that do not come out even
        assert together == epoch(n, batch_size * world_size, shuffle=True)[0]


def test_processes_that_started_later_are_found(monkeypatch):
    sampler = EvenBatchSampler(20, 5)  # made before there are two
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert [index.samples.tolist() for index in sampler] == epoch(20, 5, world_size=2)[1]


def test_orders_follow_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = EvenBatchSampler(50, 10, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return torch.cat([index.samples for index in sampler]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_step_of_every_process_draws_numbers_of_its_own():
    class Seeds(BatchDataset):
        def batch(self, samples, seed):
            return seed

    drawn = []
    for process in ((0, 2), (1, 2)):
        loader = ResumableLoader(Seeds(), sampler=EvenBatchSampler(8, 2, process=process), batch_size=None)
        drawn += [(seed, torch.rand(()).item()) for _ in range(2) for seed in loader]
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [8, 8]


@pytest.fixture(scope="module")
def make_loader(tmp_path_factory):
    """Loads CIFAR10DataModules over one small file of random images."""
    from conftest import write_data

    folder = tmp_path_factory.mktemp("data")
    write_data(folder, "cifar10", n_train=60, shape=(32, 32, 3))

    def make(**kwargs):
        torch.manual_seed(3)
        module = CIFAR10DataModule(str(folder), val_size=20, augment=True, **{"batch_size": 10, **kwargs})
        module.setup()
        return module.train_dataloader()

    return make


def served(loader, epochs):
    """Sum of the pixels of each batch, and the random number that a training step would draw next."""
    return [(images.sum().item(), torch.rand(()).item()) for _ in range(epochs) for images, _ in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_after_any_batch(make_loader, num_workers):
    everything = served(make_loader(), 2)  # 2 epochs of 4 batches
    assert len(set(everything)) == 8
    assert served(make_loader(num_workers=num_workers), 2) == everything  # workers change nothing
    for done in range(0, 8, 3 if num_workers else 1):
        first = make_loader()
        for _ in range(done // 4):
            served(first, 1)
        for _ in islice(first, done % 4):
            pass
        second = make_loader(num_workers=num_workers)
        torch.manual_seed(8)  # another seed: the state holds the first
        second.load_state_dict(first.state_dict())
        rest = everything[done:]
        assert served(second, 1) == rest[: len(rest) % 4 or 4]


def test_a_loader_that_is_let_go_ends_its_workers_at_once(make_loader):
    gc.collect()
    gc.disable()  # what collects cycles ends workers late, and in 5 seconds each
    try:
        loader, others = make_loader(num_workers=1), {*multiprocessing.active_children()}
        served(loader, 1)
        alive, workers = weakref.ref(loader), {*multiprocessing.active_children()} - others
        assert workers
        del loader
        assert alive() is None
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_an_epoch_that_was_left_early_is_followed_by_a_whole_one(make_loader):
    loader = make_loader()
    next(iter(loader))
    assert len(served(loader, 1)) == 4


def test_other_batches_are_refused_within_an_epoch_only(make_loader):
    loader, finer = make_loader(), make_loader(batch_size=5)
    next(iter(loader))
    with pytest.raises(UsageError, match="after batch 1 of 4, but an epoch has 8 batches here"):
        finer.load_state_dict(loader.state_dict())
    served(loader, 1)
    finer.load_state_dict(loader.state_dict())
    assert finer.state_dict() == {**loader.state_dict(), "epoch": 2, "done": 0, "batches": 8}


def test_limited_epochs_start_at_their_own_beginning(data_dir, make_trainer):
    seen = []

    class Record(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item())

        def configure_optimizers(self):
            return None

    def fit(**kwargs):
        pl.seed_everything(0)
        seen.clear()
        make_trainer(max_epochs=2, **kwargs).fit(Record(), datamodule=MNISTDataModule(str(data_dir), 10, 50))
        return list(seen)

    whole, limited, overfit = fit(), fit(limit_train_batches=2), fit(overfit_batches=2, limit_val_batches=0)
    assert limited == [*whole[:2], *whole[15:17]]
    data = MNISTDataModule(str(data_dir), 10, 50)
    data.setup()
    assert overfit == 2 * [data.train_set[k : k + 10][0].sum().item() for k in (0, 10)]


class WarmUp(pl.LightningModule):
    """Any network whose schedule asks how long it will train, with dropout; dies in step ``dies``."""

    def __init__(self, dies=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.Dropout())
        self.dies = dies

    def training_step(self, batch, batch_idx):
        if self.global_step == self.dies:
            raise InterruptedError
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("dies", [1, 14, 15, 19])  # 15 steps an epoch
def test_a_killed_run_with_a_schedule_over_all_steps_resumes_to_the_bit(data_dir, make_trainer, tmp_path, dies):
    def fit(model, seed, **kwargs):
        pl.seed_everything(seed)
        each_step = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_on_train_epoch_end=True)
        trainer = make_trainer(max_epochs=2, callbacks=each_step, enable_checkpointing=True)
        trainer.fit(model, datamodule=MNISTDataModule(str(data_dir), 10, 50), **kwargs)
        return model.net[1].weight

    with pytest.raises(InterruptedError):
        fit(WarmUp(dies), 0)
    (saved,) = (tmp_path / "saved").iterdir()
    resumed = fit(WarmUp(), 1, ckpt_path=saved, weights_only=True)
    assert torch.equal(resumed, fit(WarmUp(), 0))


def test_evaluating_a_checkpoint_does_not_move_the_training_data(data_dir, make_trainer, tmp_path):
    trainer, model = make_trainer(max_steps=4), WarmUp()
    trainer.fit(model, datamodule=MNISTDataModule(str(data_dir), 10, 50))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    data = MNISTDataModule(str(data_dir), 10, 50)
    model.validation_step = model.training_step
    make_trainer().validate(model, data, ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    make_trainer(limit_train_batches=3, limit_val_batches=0).fit(model, datamodule=data)
    assert data.state_dict()["done"] == 3
