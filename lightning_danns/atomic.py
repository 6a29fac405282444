"""Files that are whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, partial: str | None = None) -> Iterator[BinaryIO]:
    """A file to write beside ``path``, which it replaces once it is complete and on the disk.

    Its name meanwhile is ``partial``; if that is not given, one that no other process has.
    """
    beside = path.with_name(partial or f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
