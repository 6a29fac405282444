"""The package's docstrings, whose roles and sections are those of Sphinx and torch, as the Markdown that mkdocs reads."""

import re

import griffe

import lightning_danns

NAMES = "|".join(lightning_danns.__all__)


def markdown(text: str) -> str:
    """One docstring.

    >>> markdown("See `DANNLinear`, :math:`x`.")
    'See [`DANNLinear`][lightning_danns.DANNLinear], $x$.'
    """
    text = re.sub(r"^( *)\.\. math:: *(\S.*)$", r"\1$$\n\1\2\n\1$$", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math:: *\n((?:\1 +.*\n?|\n)+)", _display, text, flags=re.MULTILINE)
    text = re.sub(r":math:`(.+?)`", r"$\1$", text, flags=re.DOTALL)
    text = re.sub(rf"(?<![`\w])`({NAMES})`(?!`)", r"[`\1`][lightning_danns.\1]", text)
    text = re.sub(r"^( *)>(?!>>)", r"\1\>", text, flags=re.MULTILINE)  # a line that begins with ">= 0" is no quotation
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"^Shape:\n +", "**Shape:** ", text, flags=re.MULTILINE)


def _display(found: re.Match) -> str:
    body = " ".join(line.strip() for line in found[2].splitlines() if line.strip())
    return f"{found[1]}$$\n{found[1]}{body}\n{found[1]}$$\n\n"


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
