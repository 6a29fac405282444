"""Files that are whole or not there, and files that can be read or are refused."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lightning_danns.errors import UsageError


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; a `UsageError` if there is none that can be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # a UnicodeDecodeError is a ValueError
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings")
    return content
