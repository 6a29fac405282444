"""Names that anybody may have chosen, as the parts of a report can hold them."""

import re
import zlib


def cell(name: object) -> str:
    """A name in a line of Markdown, or a cell of a table."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", _short(name))


def label(name: object) -> str:
    """A name in a figure, whose font has Latin and Greek letters, and for which ``$`` begins a formula."""
    return re.sub(r"[^ -~\xa1-\u024f\u0370-\u03ff]", lambda m: ascii(m[0])[1:-1], _short(name)).replace("$", r"\$")


def file_name(name: str) -> str:
    """The name of a file: of differing names, differing ones."""
    plain = re.sub(r"[^a-z0-9.+-]+", "_", name.lower()).strip("_")
    return plain if plain == name and len(name) < 80 else f"{plain[:80]}_{zlib.crc32(name.encode()):08x}"


def _short(name: object) -> str:
    line = " ".join(str(name).split())
    return line if len(line) <= 80 else f"{line[:68]}... {zlib.crc32(line.encode()):08x}"
