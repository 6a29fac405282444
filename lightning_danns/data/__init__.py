"""Data sets of images, and the base of yours."""

from lightning_danns.data.base import ResumableDataModule
from lightning_danns.data.batches import BatchDataset, BatchIndex, EvenBatchSampler, ResumableLoader
from lightning_danns.data.folders import ImageFolderDataModule, ImageNetDataModule
from lightning_danns.data.modules import (
    CIFAR10DataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    ImageDataset,
    KMNISTDataModule,
    MNIST5kDataModule,
    MNISTDataModule,
    crop_and_flip,
)

__all__ = [
    "BatchDataset",
    "BatchIndex",
    "CIFAR10DataModule",
    "EvenBatchSampler",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "KMNISTDataModule",
    "MNIST5kDataModule",
    "MNISTDataModule",
    "ResumableDataModule",
    "ResumableLoader",
    "crop_and_flip",
]
