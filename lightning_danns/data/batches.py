"""Training that can stop after any batch: order and random numbers are functions of (seed, epoch, batch, process)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from lightning_danns.errors import UsageError


class BatchIndex(NamedTuple):
    """Which samples make a batch, and the seed of what is drawn to make it."""

    samples: Tensor
    seed: int


# Lightning replaces other samplers: DistributedSamplers it leaves alone in several processes, SequentialSamplers under
# overfit_batches
class EvenBatchSampler(DistributedSampler, SequentialSampler):
    """The batches of one process in an epoch, as `BatchIndex`es: its share of an order of all samples.

    The samples are cut into as few batches of at most ``batch_size`` as possible, equal in size to within one. So every
    process has the same number of batches, none is much smaller than the others, and no sample is left out or repeated.
    What ``world_size`` processes see in step k is together batch k of one process with ``world_size * batch_size``.

    Args:
        n: number of samples.
        batch_size: samples per batch and process.
        shuffle: whether each epoch has a new order; otherwise it is that of the data set.
        seed: of all orders and of everything that is drawn for a batch. With a list of seeds, each step serves a list
            of batches: for each seed its own, as a sampler with that seed alone would.
        process: rank of this process, and how many there are; those of `torch.distributed` if not given.

    Attributes:
        epoch: whose batches come next; `set_epoch` changes it.
        done: how many batches of that epoch were handed out (`ResumableLoader` counts them).

    Raises:
        UsageError: there are fewer samples than processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int | list[int] = 0,
        process: tuple[int, int] | None = None,
    ) -> None:
        self.n, self.batch_size, self.shuffle = n, batch_size, shuffle
        self.seed: int | list[int] = seed  # type: ignore[assignment]
        self._process = process
        self.epoch = self.done = 0
        len(self)  # refuses too few

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        if self._process is not None:
            return self._process
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        _, world_size = self.process
        if self.n < world_size:
            raise UsageError(f"{self.n} images are too few for {world_size} processes: each needs one")
        # n // world_size is less with batches of 1, which then may be 2 in some processes
        return min(-(-self.n // (self.batch_size * world_size)), self.n // world_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, or stay within it if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __iter__(self) -> Iterator[BatchIndex | list[BatchIndex]]:  # type: ignore[override]
        if isinstance(self.seed, int):
            yield from self._batches(self.seed)
        else:
            yield from map(list, zip(*(self._batches(seed) for seed in self.seed), strict=True))

    def _batches(self, seed: int) -> Iterator[BatchIndex]:
        order = torch.arange(self.n)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", self.epoch))
            order = torch.randperm(self.n, generator=generator)
        rank, world_size = self.process
        parts = len(self) * world_size
        for k in range(self.done, len(self)):
            part = k * world_size + rank
            samples = order[part * self.n // parts : (part + 1) * self.n // parts]
            yield BatchIndex(samples, seed_of(seed, "images", self.epoch, k, rank))


def seed_of(seed: int | list[int], purpose: str, *position: int) -> int:
    """A seed for what is drawn for one purpose at one position, unrelated to those of others."""
    name = repr((seed, purpose, *position)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())  # fits a seed of 63 bits


def seed_generators_(seed: int) -> None:
    """Seed the default generators of the CPU and, where one is in use, of this process's GPU."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 20 times as long without a GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """The CPU's default generator starts from ``seed`` within, and goes on after as if nothing was drawn."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


class BatchDataset(Dataset):
    """A data set that makes a whole batch at once, from a `BatchIndex`. A subclass says `batch` and its length."""

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs (N, ...) and labels (N, ...) of ``samples`` (N,); random numbers follow from ``seed`` (`drawing`)."""
        raise NotImplementedError

    def end_pass(self) -> None:
        """Called in the main process with the last batch of a pass, and at the end of a fit, test or other run."""

    def __getitem__(self, index: BatchIndex | list[BatchIndex]) -> Any:
        """The batch of an index; of a list of them the stacked batches."""
        try:
            if not isinstance(index, list):
                return self.batch(*index)
            batches = [self.batch(*one) for one in index]
            return torch.stack([inputs for inputs, _ in batches]), torch.stack([labels for _, labels in batches])
        except UsageError as error:
            if get_worker_info() is None:
                raise
            return error  # BatchLoader raises it; raised here, its text would become a traceback


class BatchLoader(DataLoader):
    """Serves the batches of an `EvenBatchSampler`, made by a `BatchDataset`.

    Make it with ``sampler=EvenBatchSampler(...)`` and ``batch_size=None``.
    """

    dataset: BatchDataset
    sampler: EvenBatchSampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        left = len(self.sampler) - self.sampler.done
        for batch in super().__iter__():
            if isinstance(batch, UsageError):
                try:
                    raise batch
                finally:
                    del batch  # in a cycle with this frame, the workers would be ended late and in 5 seconds
            left -= 1
            if left == 0:  # here, because Lightning does not ask for more after the last batch
                self.dataset.end_pass()
            yield batch


class ResumableLoader(BatchLoader):
    """A `BatchLoader` that can go on, in a new process, after any batch.

    Before it hands out a batch, it seeds torch's default generators from (seed, epoch, batch, process). Dropout masks,
    labels drawn by `DiagonalNGD` and whatever else a training step draws from them are therefore the same whether or
    not the run was interrupted before. torchdata's ``StatefulDataLoader`` restores the order alone: draws of
    augmentation and of training steps differ after it, and Lightning keeps the state of one process only.

    Lightning saves and restores ``state_dict`` with its checkpoints, unless something asked for the loader before the
    checkpoint was read (``trainer.estimated_stepping_batches`` does): `ResumableDataModule` is exact then too.
    """

    _resumed = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator, so that nothing happens before the first batch: Lightning calls iter() before set_epoch()
        sampler = self.sampler
        if sampler.done and not self._resumed:
            sampler.set_epoch(sampler.epoch + 1)
        self._resumed = False
        rank, _ = sampler.process
        for batch in super().__iter__():
            seed_generators_(seed_of(sampler.seed, "step", sampler.epoch, sampler.done, rank))
            sampler.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and the seed that all follows from."""
        sampler = self.sampler
        return {"seed": sampler.seed, "epoch": sampler.epoch, "done": sampler.done, "batches": len(sampler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there; the next iteration starts with the batch after, or with the next epoch.

        Raises:
            UsageError: within an epoch that is cut into other batches.
        """
        sampler = self.sampler
        sampler.seed, sampler.epoch, sampler.done = state["seed"], state["epoch"], state["done"]
        if sampler.done >= state["batches"]:
            sampler.set_epoch(sampler.epoch + 1)
        elif sampler.done and state["batches"] != len(sampler):
            raise UsageError(
                f"the checkpoint was made after batch {sampler.done} of {state['batches']}, but an epoch has "
                f"{len(sampler)} batches here: go on with the same data, batch size and number of processes, or from "
                "the end of an epoch"
            )
        self._resumed = True
