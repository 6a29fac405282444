"""Options of the command line: what is wrong with them, in a few lines."""

import argparse
import difflib
import inspect
import sys
from typing import Any, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser

from lightning_danns import data, modules

COMMAND = "lightning-danns"
LONGEST = 6
"""Lines of an error; what a union of types complains about fills pages."""


class Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, with the nearest known name, instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # no abbreviations: a misspelt option must not pass for another
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        lines = [line.strip() for line in message.splitlines() if line.strip()] or ["an empty config"]
        shown = lines if len(lines) <= LONGEST else [*lines[:LONGEST], "..."]
        print("error: " + "\n  ".join(shown), file=sys.stderr)
        known = _known()
        words = [word.strip("'\"`,:;()[]{}<>-").rpartition(".")[2] for word in message.split()]
        for word in dict.fromkeys(word for word in words if len(word) > 3 and word not in known):
            nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
            if nearest:
                print(f"did you mean {nearest[0]!r} instead of {word!r}?", file=sys.stderr)
                break
        print(f"all options: {COMMAND} fit --help", file=sys.stderr)
        self.exit(2)


def _known() -> set[str]:
    known = {"LightningModule", "LightningDataModule", *inspect.signature(pl.Trainer).parameters}
    for room in (modules, data):
        for name, value in vars(room).items():
            if inspect.isclass(value) and issubclass(value, pl.LightningModule | pl.LightningDataModule):
                known |= {name, *(p for cls in value.__mro__[:-1] for p in inspect.signature(cls).parameters)}
    return known


def refuse_option(value: Any) -> Any:
    """Options of Lightning's command line that would replace the parameter groups."""
    raise argparse.ArgumentTypeError(
        "it would replace the parameter groups that hold the learning-rate factors. Use --model.optimizer and "
        "--model.lr_scheduler, e.g. --model.optimizer=torch.optim.SGD --model.optimizer.lr=0.1"
    )
