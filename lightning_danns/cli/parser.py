"""Options of the command line: what is wrong with them, in a few lines."""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from lightning_danns import data, modules
from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import imported

COMMAND = "lightning-danns"
LONGEST = 6, 300
"""Lines of an error, and characters of a line: what a union of types complains about fills pages."""

CHATTER = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path",
    "Given value",
)
"""How lines begin that say nothing which another line does not say better."""

OF_ARGPARSE = {"argument", "choice", "choose", "from", "invalid", "subcommand"}
"""Words of its messages, which no user has misspelt."""


def few_lines(message: str) -> str:
    """The lines of a message that tell something, the longest cut in their middle."""
    width = LONGEST[1]
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")] or ["an empty config"]
    telling = list(dict.fromkeys(line for line in lines if not line.startswith(CHATTER)))
    values = [line for line in lines if line.startswith("Given value:") and not line.endswith(")")]  # no namespaces
    values = [line for line in values[:1] if not any(line[13:] in other for other in telling)]
    room = LONGEST[0] - len(values)
    telling = [*telling[:room], *(["..."] if len(telling) > room else []), *values]
    cut = [line if len(line) <= width else f"{line[: width // 2]} ... {line[-width // 2 :]}" for line in telling]
    return "\n  ".join(cut)


class Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, with the nearest known name, instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # no abbreviations: a misspelt option must not pass for another
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        print("error: " + few_lines(message), file=sys.stderr)
        known = _known()
        words = {
            word.strip("'\"`,:;()[]{}<>-=").rpartition(".")[2].partition("=")[0] for word in few_lines(message).split()
        }
        unknown = [word for word in words - OF_ARGPARSE if len(word) > 3 and not {word, word.lower()} & known]
        pairs = [(word, near) for word in unknown for near in difflib.get_close_matches(word, known, 1, 0.75)]
        if pairs:
            word, near = max(pairs, key=lambda pair: difflib.SequenceMatcher(None, *pair).ratio())
            print(f"did you mean {near!r} instead of {word!r}?", file=sys.stderr)
        print(f"all options: {COMMAND} fit --help", file=sys.stderr)
        self.exit(2)


def _known() -> set[str]:
    known = {"LightningModule", "LightningDataModule", *inspect.signature(pl.Trainer).parameters}
    for room in (modules, data):
        for name, value in vars(room).items():
            if inspect.isclass(value) and issubclass(value, pl.LightningModule | pl.LightningDataModule):
                known |= {name, *(p for cls in value.__mro__[:-1] for p in inspect.signature(cls).parameters)}
    return known


def refuse_unreadable(args: Sequence[str]) -> None:
    """Name the file of ``--config`` that is no YAML, or the command that is none of this command line.

    Raises:
        UsageError: one of both; the parser would name neither.
    """
    if args and args[0] in ("sweep", "compare", "report"):
        raise UsageError(f"{args[0]} is a command of its own: python -m lightning_danns.{args[0]}")
    configs = [value for option, value in pairwise(args) if option == "--config"]
    configs += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    for path in filter(os.path.isfile, configs):
        try:
            with open(path) as file:
                yaml.safe_load(file)
        except UnicodeDecodeError:
            return  # the parser says so
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            raise UsageError(f"config {path}: {few_lines(str(error))}") from error


def refuse_inherited(config: Namespace, args: Any) -> None:
    """An optimizer or a scheduler must not take over settings that a config file gave for another class.

    The parser keeps the arguments that both classes know: a rate meant for SGD would be AdamW's.

    Raises:
        UsageError: names class, setting and file, and the option that says what is meant.
    """
    given = [str(arg) for arg in args] if isinstance(args, Sequence) else []
    for name in ("optimizer", "lr_scheduler"):
        now = (config.model.get("init_args") or {}).get(name)
        if not isinstance(now, Namespace) or not isinstance(now.get("init_args"), Namespace):
            continue
        inherited: dict[str, str | None] = {}
        for path in map(str, config.get("config") or []):
            meant = _part(Path(path), name)
            if meant is None:
                continue
            known = str(meant.get("class_path", now.class_path))
            same = known.rpartition(".")[2] == now.class_path.rpartition(".")[2]
            inherited |= dict.fromkeys(meant.get("init_args") or {}, None if same else f"{known} in {path}")
        parameters = inspect.signature(imported(now.class_path)).parameters
        for key, source in inherited.items():
            value = now.init_args.get(key)
            default = parameters[key].default if key in parameters else None
            said = any(f".{name}" in arg and key in arg.partition(name)[2] for arg in given)
            if source and value not in (None, default) and not said:
                raise UsageError(
                    f"{now.class_path} would take {key}={value} over from {source}: give --model.{name}.{key} "
                    "(the same value, if it is meant)"
                )


def _part(path: Path, name: str) -> dict[str, Any] | None:
    """What a config file says of the model's optimizer or scheduler, if it names settings."""
    try:
        content = yaml.safe_load(path.read_text())
        part = content["model"]["init_args"][name]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return part if isinstance(part, dict) else None


def refuse_option(value: Any) -> Any:
    """Options of Lightning's command line that would replace the parameter groups."""
    raise argparse.ArgumentTypeError(
        "it would replace the parameter groups that hold the learning-rate factors. Use --model.optimizer and "
        "--model.lr_scheduler, e.g. --model.optimizer=torch.optim.SGD --model.optimizer.lr=0.1"
    )
