"""What a fit is trained with, and what its folder says of it."""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from lightning_danns.atomic import read_yaml
from lightning_danns.errors import UsageError

# defaults of a study's runs; on several GPUs, Lightning would otherwise start the study's command once for each
DEFAULTS = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.devices=1")

NO_MATTER = (  # settings that do not change what is trained
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.enable_checkpointing"),
    *("trainer.default_root_dir", "trainer.logger", "trainer.log_every_n_steps", "trainer.profiler"),
    *("data.data_dir", "data.num_workers"),
)


def user_path(text: str) -> Path:
    """A path, in which ``~`` is the home folder also behind an equals sign."""
    return Path(text).expanduser()


def parse(parser: ArgumentParser, args: Sequence[str], given: Sequence[str] = ()) -> tuple[Namespace, list[str]]:
    """The command's options, and all others, for ``fit``; those that the command gives itself are refused."""
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine (default: 1)")
    several = "Optuna's, for several machines, as postgresql://HOST/NAME (default: FOLDER/study.db, for one machine)"
    parser.add_argument("--storage", metavar="URL", help=several)
    options, rest = parser.parse_known_args(args)
    for option in rest:
        if option.partition("=")[0] in ("--run_dir", "--ckpt_path", *given):
            raise UsageError(f"{option}: leave it out, {parser.prog} gives it to each run")
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"{rest[0]!r} belongs to no option")
    for number in ("jobs", "trials"):
        if getattr(options, number, 1) < 1:
            raise UsageError(f"--{number} {getattr(options, number)}: it must be at least 1")
    return options, rest


def settings_of(args: Sequence[str]) -> dict[str, Any]:
    """All settings, defaults too, of ``fit`` with these arguments, whatever way they are spelt; one process only."""
    from lightning_danns.cli import main

    text = io.StringIO()
    try:
        with redirect_stdout(text):
            main(["fit", *DEFAULTS, *args, "--print_config"])
    except SystemExit as end:
        if end.code:
            raise
    settings = yaml.safe_load(text.getvalue())
    for option in ("devices", "num_nodes"):
        if settings["trainer"].get(option) not in (1, "1", [0]):
            raise UsageError(f"--trainer.{option}={settings['trainer'].get(option)}: a study's run has one process")
    return settings


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, without ``init_args``, that change what is trained; the seed is not among them."""

    def pairs(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from pairs(inner, name if key == "init_args" else f"{name}.{key}")
        elif name not in NO_MATTER:
            yield name, value

    return dict(pair for section in ("model", "data", "trainer") for pair in pairs(config.get(section), section))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of the settings in which two configs differ."""
    from lightning_danns.cli.main import FROM_DATA

    others = ("search", "pruning", "seed_everything")  # the first two are those of a sweep
    was, now = ({name: config.get(name) for name in others} | flat(config) for config in (old, new))
    for name in [f"model.{name}" for name in FROM_DATA]:
        if name not in was:  # a fit leaves out of its config what its data said
            now.pop(name, None)
    return [(name, was.get(name), now.get(name)) for name in was | now if was.get(name) != now.get(name)]


def result_of(folder: Path) -> dict[str, Any]:
    """How the fit in ``folder`` ended; empty if it has not ended."""
    return read_yaml(folder / "result.yaml") if (folder / "result.yaml").exists() else {}


def finished(result: dict[str, Any], max_epochs: int | None = None) -> bool:
    """Whether nothing is left to train, also if ``max_epochs`` is more than the fit was asked for."""
    more = max_epochs is not None and not 0 <= max_epochs <= result.get("epochs", 0)
    return result.get("ended_by") in ("max_steps", "max_time", "early_stopping", *(() if more else ("max_epochs",)))
