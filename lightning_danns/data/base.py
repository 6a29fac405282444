"""The base of data modules: exact resume, shares of processes, and loaders, for any `BatchDataset`."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_danns.data.batches import BatchDataset, BatchLoader, EvenBatchSampler, ResumableLoader
from lightning_danns.errors import UsageError


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of ``size`` held-out samples, in which each class has its share to within one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[(torch.arange(size, dtype=torch.float64) * len(labels) / max(size, 1)).long()] = True
    return order[~held_out].sort().values, order[held_out].sort().values


def place(trainer: pl.Trainer) -> tuple[int, int]:
    """Rank of this process among those that have batches of their own, and how many there are."""
    mesh = getattr(trainer.lightning_module, "device_mesh", None)
    if mesh is None:
        return trainer.global_rank, trainer.world_size
    data_parallel = mesh["data_parallel"]  # the processes that share the parts of one tensor share batches, too
    return data_parallel.get_local_rank(), data_parallel.size()


class ResumableDataModule(pl.LightningDataModule):
    """Serves three data sets to any Trainer; a run that is resumed sees what an uninterrupted one would have seen.

    A subclass says `load`, which fills ``train_set`` and, as far as they exist, ``val_set`` and ``test_set``.

    Args:
        batch_size: samples per batch and process, at most: an epoch is cut into batches equal in size to within one.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        order_seed: seed of the order of training samples, independent of the seed of training, which sets it if this
            is not given. A list serves a batch of its own for each seed, inputs (seeds, batch_size, ...), to
            `ReplicatedClassifier`.
        test_each_epoch: whether each validation also evaluates the test set, logged as ``test_loss`` and
            ``test_accuracy``. For reports of the last epochs' mean; select nothing by it.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        order_seed: int | list[int] | None = None,
        test_each_epoch: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: it must be at least 1")
        if num_workers < 0:
            raise UsageError(f"num_workers={num_workers}: it must be 0 (no extra process) or more")
        if order_seed is not None and (order_seed == [] or min(np.atleast_1d(order_seed)) < 0):
            raise UsageError(f"order_seed={order_seed}: give a seed that is not negative, or a list of such")
        self.batch_size, self.num_workers, self.order_seed = batch_size, num_workers, order_seed
        self.test_each_epoch = test_each_epoch
        self.train_set: BatchDataset | None = None
        self.val_set: BatchDataset | None = None
        self.test_set: BatchDataset | None = None
        self._seed: int | None = None
        self._train_loader: ResumableLoader | None = None
        self._resume_at: dict[str, Any] | None = None

    def load(self) -> None:
        """Fill ``train_set``, ``val_set`` and ``test_set``; called once in each process."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:  # training steps seed the generators, and loaders may be made anew between them
            self._seed = torch.initial_seed()
        if self.train_set is None:
            self.load()

    def teardown(self, stage: str | None = None) -> None:
        for dataset in (self.train_set, self.val_set, self.test_set):
            if dataset is not None:
                dataset.end_pass()  # the last may have been left early

    # Lightning restores a data module before configure_optimizers, which may ask for the loader, and its loaders after
    def state_dict(self) -> dict[str, Any]:
        """Where the training data are."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there when the next fit starts."""
        if self.trainer is not None and not self.trainer.training:
            return  # a checkpoint is evaluated, not continued
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state)
        self._resume_at = state

    def train_dataloader(self) -> DataLoader:
        # under overfit_batches, Lightning takes the first batches of an order that must stay
        fixed = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = ResumableLoader(**self._loader_arguments(self.train_set, not fixed, self.order_seed))
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
        self._train_loader, self._resume_at = loader, None
        return loader

    def val_dataloader(self) -> DataLoader | list[DataLoader] | dict[str, DataLoader]:
        _loaded(self.train_set)
        loaders = {"val": BatchLoader(**self._loader_arguments(self.val_set))} if self.val_set else {}
        if self.test_each_epoch:
            return {**loaders, "test": self.test_dataloader()}  # these names are known to the classifier
        return loaders.get("val", [])

    def test_dataloader(self) -> DataLoader:
        if self.test_set is None and self.train_set is not None:
            raise UsageError(f"{type(self).__name__} finds no test data: use `validate`, and test_each_epoch=False")
        return BatchLoader(**self._loader_arguments(self.test_set))

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _loader_arguments(
        self, dataset: BatchDataset | None, shuffle: bool = False, order_seed: int | list[int] | None = None
    ) -> dict[str, Any]:
        dataset = _loaded(dataset)
        own_seed = torch.initial_seed() if self._seed is None else self._seed
        seed, process = own_seed if order_seed is None else order_seed, None
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # one order for all processes
            process = place(self.trainer)
        return {
            "dataset": dataset,
            "sampler": EvenBatchSampler(len(dataset), self.batch_size, shuffle, seed, process),
            "batch_size": None,  # the sampler makes the batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _loaded(dataset: BatchDataset | None) -> BatchDataset:
    if dataset is None:
        raise UsageError("the data are not loaded yet: call prepare_data() and setup() first, as the Trainer does")
    return dataset
