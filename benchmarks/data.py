"""Images a second of `ImageFolderDataModule` against torchvision's ImageFolder and DataLoader, on the same JPEG files.

    python benchmarks/data.py [--images 600] [--rounds 5] [--workers 0 1]

The transforms are the same: RandomResizedCrop(224), RandomHorizontalFlip, to float32 in [0, 1]. Both are timed in turn,
each over all images in every round. A ratio is that of one round's rates; its median must be at least 0.95.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_danns import ImageFolderDataModule

BATCH_SIZE = 32


def write_jpegs(folder: Path, n: int, classes: int = 10) -> None:
    """Smooth random photographs of ImageNet's usual size, 500 x 375, about 60 kB each."""
    rng = np.random.default_rng(0)
    for k in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 34, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (375, 500, 3))
        path = folder / f"{k % classes:03d}" / f"{k:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def torchvision_loader(folder: Path, workers: int) -> DataLoader:
    transform = v2.Compose(
        [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    return DataLoader(
        ImageFolder(folder, transform), BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def our_loader(folder: Path, workers: int) -> DataLoader:
    data = ImageFolderDataModule(str(folder), val_size=0, batch_size=BATCH_SIZE, num_workers=workers)
    data.prepare_data()
    data.setup()
    return data.train_dataloader()


def rate(loader: DataLoader) -> float:
    """Images a second over one pass."""
    start = time.perf_counter()
    n = sum(len(labels) for _, labels in loader)
    return n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Path, int], DataLoader]] = {"torchvision": torchvision_loader, "ours": our_loader}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder, arguments.images)
        for workers in arguments.workers:
            loaders = {key: make(folder, workers) for key, make in makers.items()}
            for loader in loaders.values():
                rate(loader)  # starts workers, warms the page cache
            rounds = []
            for turn in range(arguments.rounds):
                order = list(loaders) if turn % 2 else list(loaders)[::-1]
                rounds.append({key: rate(loaders[key]) for key in order})
            theirs, ours = (max(one[key] for one in rounds) for key in makers)
            ratios = statistics.quantiles([one["ours"] / one["torchvision"] for one in rounds], n=4)
            print(
                f"workers {workers}: best of torchvision {theirs:.0f}, ours {ours:.0f} images/s; ratio "
                f"{ratios[1]:.2f} (quartiles {ratios[0]:.2f}, {ratios[2]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
