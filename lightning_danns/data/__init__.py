"""Data sets of images, and the base of yours."""

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
    "CIFAR10DataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "KMNISTDataModule",
    "MNIST5kDataModule",
    "MNISTDataModule",
    "crop_and_flip",
]
