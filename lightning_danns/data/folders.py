"""Images in class folders as DataModules: decoded when needed, pixels in [0, 1], any number of them."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from lightning_danns.data.base import ResumableDataModule, stratified_split
from lightning_danns.data.batches import BatchDataset, drawing
from lightning_danns.data.file_list import FileList, class_names, image_names, list_files
from lightning_danns.data.pixels import UnreadableImageError, fault, read_image, to_pixels
from lightning_danns.errors import UsageError

Transform = Callable[[Any], Any]
BatchTransform = Callable[[Tensor, Tensor], Any]


def readable(path: Path, channels: int, on_error: str) -> Image.Image | None:
    """The image in a file; None if it cannot be read and is to be skipped."""
    try:
        return read_image(path, channels)
    except UnreadableImageError as error:
        if on_error == "skip":
            return None
        raise UsageError(
            f"cannot read the image {error}. Mend or delete it, or leave such files out by on_error='skip'"
        ) from error


class ImageFolderDataset(BatchDataset):
    """Batches of the images ``samples`` (n,) of a `FileList`: pixels (N, C, H, W) in [0, 1] as float32, labels (N,).

    ``unreadable`` (n,) says which could not be read so far. For the other arguments see `ImageFolderDataModule`.
    """

    def __init__(
        self,
        files: FileList,
        samples: Tensor,
        labels: Tensor,
        transform: Transform,
        channels: int = 3,
        on_error: Literal["raise", "skip"] = "raise",
        batch_transform: BatchTransform | None = None,
    ) -> None:
        self.files, self.samples, self.labels = files, samples, labels
        self.transform, self.batch_transform = transform, batch_transform
        self.channels, self.on_error = channels, on_error
        self.unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # with worker processes
        self._reported = 0

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, k: int) -> Path:
        """The file of sample k."""
        return self.files.path(int(self.samples[k]))

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with drawing(seed):
            pixels, kept = [], []
            for k in samples.tolist():
                image = readable(self.path(k), self.channels, self.on_error)
                if image is None:
                    self.unreadable[k] = True
                    continue
                pixels.append(to_pixels(self.transform, image, self.path(k)))
                kept.append(k)
                if pixels[-1].shape != pixels[0].shape:
                    raise UsageError(
                        f"{self.path(k)} becomes {tuple(pixels[-1].shape)}, but {self.path(kept[0])} "
                        f"{tuple(pixels[0].shape)}: end the transform with a crop or resize to a fixed height and width"
                    )
            if not kept:
                raise UsageError(f"no image of a batch can be read: {', '.join(str(self.path(k)) for k in samples)}")
            images, labels = default_collate(pixels), self.labels[kept]  # in a worker, stacked in shared memory
            if self.batch_transform is not None:
                images, labels = self.batch_transform(images, labels)
                if wrong := fault(images):
                    raise UsageError(f"batch_transform {self.batch_transform} {wrong}")
                if labels.ndim == 2 and labels.shape[1] != len(self.files.classes):
                    raise UsageError(
                        f"batch_transform {self.batch_transform} makes labels of {labels.shape[1]} classes, but there "
                        f"are {len(self.files.classes)}"
                    )
            return images, labels

    def end_pass(self) -> None:
        """Warn of the files that were skipped, if there are more than before."""
        count = int(self.unreadable.sum())
        if count > self._reported:
            names = [str(self.path(k)) for k in self.unreadable.nonzero()[:10].flatten().tolist()]
            more = "" if count <= 10 else f" and {count - 10} more"
            warnings.warn(
                f"{count} of {len(self)} images cannot be read and are skipped: {', '.join(names)}{more}", stacklevel=2
            )
        self._reported = count


class ImageFolderDataModule(ResumableDataModule):
    """Images of any number in ``data_dir/train/CLASS/``, ``data_dir/val/CLASS/`` and, if it is there, ``test``.

    Without ``val``, some of each class are held out for it. Without ``train``, the class folders lie in ``data_dir``
    itself. Folders in class folders count. A list of the files is kept in a hidden file of each folder, where that can
    be written, and made anew when a folder changes. Images of any mode are read (`read_image`).

    Attributes:
        classes: names of the classes in the order of their labels: sorted.
        num_classes: how many there are.
        image_shape: (channels, height, width) that ``eval_transform`` makes of the first image.

    Args:
        data_dir: the folder.
        image_size: height and width of what the default transforms make.
        image_channels: 3 for RGB, 1 for grey.
        batch_size: images per batch and process, at most.
        val_size: without a folder ``val``, how many training images to hold out, as many of each class as its share;
            a tenth if not given, 0 for none.
        split_seed: seed of that choice, independent of the seed of training.
        train_transform: maps a training image (Pillow's) to an image or tensor in [0, 1] of a fixed shape, drawing
            from torch's generator. If not given, v2.RandomResizedCrop, then v2.RandomHorizontalFlip.
        eval_transform: the same for other images. If not given, v2.Resize of the shorter side to 8/7 of
            ``image_size``, then v2.CenterCrop.
        batch_transform: maps images and labels of a training batch to others, for example v2.MixUp(num_classes=10),
            whose labels are probabilities (N, num_classes).
        on_error: what an unreadable file does: "raise" ends the run; "skip" leaves it out of its batch and warns with
            the names at the end of an epoch. Both name it.
        num_workers, order_seed, test_each_epoch: see `ResumableDataModule`.

    Raises:
        UsageError: a folder is missing or empty, or has other classes than ``train``; a transform leaves [0, 1]; an
            argument is out of range.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int = 224,
        image_channels: int = 3,
        batch_size: int = 32,
        val_size: int | None = None,
        split_seed: int = 0,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        batch_transform: BatchTransform | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
        order_seed: int | list[int] | None = None,
        test_each_epoch: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, order_seed, test_each_epoch)
        data_dir = str(data_dir)  # a checkpoint with a Path does not load
        if image_size < 1:
            raise UsageError(f"image_size={image_size}: it must be at least 1")
        if image_channels not in (1, 3):
            raise UsageError(f"image_channels={image_channels}: it must be 3 (RGB) or 1 (grey)")
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error={on_error!r}: it must be 'raise' or 'skip'")
        if on_error == "skip" and isinstance(order_seed, list):
            raise UsageError("on_error='skip' with a list of order seeds: batches of unequal size cannot be stacked")
        if val_size is not None and val_size < 0:
            raise UsageError(f"val_size={val_size}: give the number of images to hold out, 0 to hold out none")
        transforms = ["train_transform", "eval_transform", "batch_transform"]
        self.save_hyperparameters(ignore=transforms, frame=inspect.currentframe())  # as in modules.py
        self.folder = Path(data_dir).expanduser().absolute()
        self.channels, self.val_size, self.split_seed, self.on_error = image_channels, val_size, split_seed, on_error
        self.train_transform = train_transform or v2.Compose(
            [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
        )
        self.eval_transform = eval_transform or v2.Compose(
            [v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size)]
        )
        self.batch_transform = batch_transform

    def _part(self, name: str) -> Path | None:
        folder = self.folder / name
        if not (self.folder / "train").is_dir():  # one folder for all
            return self.folder if name == "train" else None
        return folder if folder.is_dir() else None

    @property
    def train_folder(self) -> Path:
        """Where the class folders of the training images are."""
        return self._part("train") or self.folder

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of their labels."""
        return class_names(self.train_folder)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image that was transformed for evaluation."""
        return self._shape_by(self.eval_transform)

    def _shape_by(self, transform: Transform) -> tuple[int, int, int]:
        for name in image_names(self.train_folder):
            image = readable(Path(name), self.channels, self.on_error)
            if image is not None:
                with drawing(0):
                    channels, height, width = to_pixels(transform, image, Path(name)).shape
                return channels, height, width
        raise UsageError(f"no image in {self.train_folder} can be read")

    def prepare_data(self) -> None:
        """List the files; Lightning calls this in one process only, and others find the lists."""
        for name in ("train", "val", "test"):
            if (folder := self._part(name)) is not None:
                list_files(folder)

    def load(self) -> None:
        train = list_files(self.train_folder)
        labels = torch.from_numpy(train.labels)
        val_size = len(labels) // 10 if self.val_size is None else self.val_size
        if self._part("val") is not None:
            if self.val_size:
                raise UsageError(f"val_size={self.val_size}, but {self._part('val')} exists: leave val_size out")
            val_size = 0
        if val_size >= len(labels):
            raise UsageError(f"val_size={val_size} leaves nothing to train on: {train.folder} has {len(labels)} images")
        shapes = [self._shape_by(transform) for transform in (self.train_transform, self.eval_transform)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"train_transform makes images of shape {shapes[0]}, but eval_transform {shapes[1]}")
        rest, held_out = stratified_split(labels, val_size, self.split_seed)
        how = self.train_transform, self.channels, self.on_error, self.batch_transform
        self.train_set = ImageFolderDataset(train, rest, labels[rest], *how)
        self.val_set, self.test_set = self._part_set("val"), self._part_set("test")
        if val_size:
            self.val_set = self._evaluated(train, held_out, labels[held_out])

    def _evaluated(self, files: FileList, samples: Tensor, labels: Tensor) -> ImageFolderDataset:
        return ImageFolderDataset(files, samples, labels, self.eval_transform, self.channels, self.on_error)

    def _part_set(self, part: str) -> ImageFolderDataset | None:
        folder = self._part(part)
        if folder is None:
            return None
        files, classes = list_files(folder), self.classes
        if unknown := set(files.classes) - set(classes):
            raise UsageError(f"{folder} has classes that {self.train_folder} lacks: {', '.join(sorted(unknown)[:10])}")
        labels = torch.tensor([classes.index(name) for name in files.classes])[torch.from_numpy(files.labels)]
        return self._evaluated(files, torch.arange(len(labels)), labels)


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet-1k, 1.28 million photographs of 1 000 classes (Russakovsky et al. 2015), in class folders.

    Arguments as in `ImageFolderDataModule`; ``val`` needs class folders, too.
    """

    @property
    def classes(self) -> list[str]:
        """Names of the classes (WordNet's, as n01440764) in the order of their labels."""
        names = super().classes
        if len(names) != 1000:
            raise UsageError(
                f"{self.train_folder} has {len(names)} class folders, ImageNet-1k has 1000: use ImageFolderDataModule "
                "for a part of it"
            )
        return names

    def load(self) -> None:
        _ = self.classes  # counted first, since listing the files takes minutes
        super().load()
