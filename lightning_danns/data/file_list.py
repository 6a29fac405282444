"""Which files a folder of class folders holds: a few numpy arrays, whatever the number of files."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_danns.atomic import replacing
from lightning_danns.errors import UsageError

CACHE = ".lightning_danns.npz"


@dataclass(frozen=True)
class FileList:
    """Files and their classes. Python objects for each would be copied into each worker, at 100 to 200 bytes a file."""

    folder: Path  # what the names start from
    classes: list[str]  # names of the class folders, sorted
    names: np.ndarray  # all names, one after the other, as bytes (uint8)
    ends: np.ndarray  # where each name ends (n,)
    labels: np.ndarray  # index of each file's class (n,)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, k: int) -> Path:
        """The file of sample k."""
        start = self.ends[k - 1] if k else 0
        return self.folder / os.fsdecode(self.names[start : self.ends[k]].tobytes())


def class_names(folder: Path) -> list[str]:
    """Names of the class folders in ``folder``, sorted; hidden ones are none. A `UsageError` if there is none."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error}. It must hold a folder for each class") from error
    if not names:
        raise UsageError(f"the folder {folder} has no class folders: images must lie in {folder}/CLASS/")
    return names


def image_names(folder: Path, stamps: dict[str, np.ndarray] | None = None) -> Iterator[str]:
    """Names of the images in a folder and its folders, sorted in each; fills ``stamps`` with the state of each."""
    for directory, below, names in os.walk(folder, followlinks=True):
        if stamps is not None:
            stamps[directory] = _stamp(directory)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(directory, name)


def pack(folder: Path, classes: list[str], names: Iterable[Iterable[str]]) -> FileList:
    """A list of the ``names`` (relative to ``folder``) of each class."""
    parts, lengths, counts = [], [], []
    for of_class in names:
        encoded = [os.fsencode(name) for name in of_class]
        parts.append(np.frombuffer(b"".join(encoded), np.uint8))
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        counts.append(len(encoded))
    labels = np.repeat(np.arange(len(classes)), counts)
    return FileList(folder, classes, np.concatenate(parts), np.concatenate(lengths).cumsum(), labels)


def list_files(folder: Path) -> FileList:
    """The images ``folder/CLASS/**``, from the cache file if no folder has changed; refuses classes without any.

    The cache file is replaced as a whole, and left out where the folder cannot be written.
    """
    classes = class_names(folder)
    if (cached := _from_cache(folder, classes)) is not None:
        return cached
    started = time.time_ns()
    stamps: dict[str, np.ndarray] = {}
    files = pack(
        folder,
        classes,
        ([os.path.relpath(name, folder) for name in image_names(folder / label, stamps)] for label in classes),
    )
    for label, count in zip(classes, np.bincount(files.labels, minlength=len(classes)), strict=True):
        if count == 0:
            raise UsageError(f"the class folder {folder / label} has no images ({', '.join(IMG_EXTENSIONS)})")
    times = np.stack(list(stamps.values()))
    times[times[:, 0] > started - 2 * 10**9] = 0  # a change in the same tick of the clock would not show
    arrays = {
        "classes": _joined(classes),
        "directories": _joined(os.path.relpath(directory, folder) for directory in stamps),
        "times": times,
        **{key: getattr(files, key) for key in ("names", "ends", "labels")},
    }
    with suppress(OSError), replacing(folder / CACHE) as file:  # read-only or full
        np.savez(file, **arrays)
    return files


def _from_cache(folder: Path, classes: list[str]) -> FileList | None:
    try:
        with np.load(folder / CACHE, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file}
        directories = os.fsdecode(arrays["directories"].tobytes()).split("\0")
        unchanged = np.array_equal(arrays["times"], [_stamp(folder / directory) for directory in directories])
        if unchanged and np.array_equal(arrays["classes"], _joined(classes)):
            return FileList(folder, classes, arrays["names"], arrays["ends"], arrays["labels"])
    except Exception:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
        return None  # none there, damaged, or of a folder that is gone
    return None


def _stamp(directory: str | Path) -> np.ndarray:
    state = os.stat(directory)
    return np.array([state.st_mtime_ns, state.st_size])


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(map(os.fsencode, names)), np.uint8)
