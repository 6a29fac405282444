"""Data sets of images, and the base of yours."""

from lightning_danns.data.batches import BatchIndex, EvenBatchSampler, ResumableLoader
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
    "BatchIndex",
    "CIFAR10DataModule",
    "EvenBatchSampler",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "KMNISTDataModule",
    "MNIST5kDataModule",
    "MNISTDataModule",
    "ResumableLoader",
    "crop_and_flip",
]
