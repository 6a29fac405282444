"""Data sets as files: ``data_dir/NAME.npz`` in Keras's layout.

A file holds ``x_train, y_train, x_test, y_test``: uint8 images N x H x W or N x H x W x 3, and integer labels. It is
made once, from torchvision's download or from an installed package; one put there by hand serves a machine without
internet. Reading a file executes nothing.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_danns.atomic import replacing
from lightning_danns.errors import UsageError

Arrays = dict[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")


def torchvision_arrays(name: str, path: Path) -> Arrays:
    """Download the torchvision data set ``name``; a `UsageError` says what to put at ``path`` instead."""
    import torchvision.datasets  # here, because it is slow to import and needed once

    try:
        with tempfile.TemporaryDirectory() as folder:
            arrays: Arrays = {}
            for part in ("train", "test"):
                found = getattr(torchvision.datasets, name)(folder, train=part == "train", download=True)
                arrays |= {f"x_{part}": np.asarray(found.data), f"y_{part}": np.asarray(found.targets)}
            return arrays
    except (OSError, RuntimeError) as error:  # URLError is an OSError; torchvision raises RuntimeError
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{name} could not be downloaded ({reason}). On a machine without internet, put the file {path} there "
            f"by hand: uint8 images and labels as {', '.join(KEYS)} (the layout of Keras's mnist.npz)"
        ) from error


def make_folder(path: Path) -> None:
    """Make the folder ``path`` if it does not exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error}. Choose another one") from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz file; an interrupted write leaves no file behind."""
    make_folder(path.parent)
    try:
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}. Choose another folder") from error


def read_arrays(path: Path, image_shape: tuple[int, int, int], num_classes: int) -> dict[str, Tensor]:
    """A data file, checked: images as uint8 (N, C, H, W), labels as int64 (N,). A `UsageError` names what is wrong."""
    if not path.exists():
        raise UsageError(f"data file {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            arrays = {key: file[key] for key in KEYS if key in names}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
        raise UsageError(
            f"data file {path} is not a readable .npz file ({error}): it may be cut off. Delete it and try again"
        ) from error
    if missing := [key for key in KEYS if key not in names]:
        raise UsageError(f"data file {path} lacks {', '.join(missing)}; it has {', '.join(names)}")
    channels, height, width = image_shape
    layout = (height, width) if channels == 1 else (height, width, channels)
    tensors = {}
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8:
            raise UsageError(f"x_{part} in {path} holds {images.dtype}: images must be uint8 with values from 0 to 255")
        if images.shape[1:] != layout or len(images) == 0:
            expected = "N x " + " x ".join(map(str, layout))
            raise UsageError(f"x_{part} in {path} has shape {images.shape}, but must be {expected} with N > 0")
        if labels.dtype.kind not in "iu":
            raise UsageError(f"y_{part} in {path} holds {labels.dtype}: labels must be integers")
        if labels.shape == (len(images), num_classes) and num_classes > 1:
            raise UsageError(
                f"y_{part} in {path} has shape {labels.shape} for {len(images)} images, as one-hot labels have: store "
                f"their argmax, one integer from 0 to {num_classes - 1} each"
            )
        if labels.shape not in ((len(images),), (len(images), 1)):
            raise UsageError(f"y_{part} in {path} has shape {labels.shape} for {len(images)} images: one label each")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(
                f"y_{part} in {path} has labels from {labels.min()} to {labels.max()}; they must lie from 0 to "
                f"{num_classes - 1}" + (": subtract 1" if (labels.min(), labels.max()) == (1, num_classes) else "")
            )
        pixels = torch.from_numpy(images)
        tensors[f"x_{part}"] = (pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)).contiguous()
        tensors[f"y_{part}"] = torch.from_numpy(labels).long().flatten()
    return tensors
