"""The command line: LightningCLI over any module and data module, one folder for each run."""

import argparse
import difflib
import inspect
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# imported so that their classes answer to their short names
from lightning_danns import data, modules
from lightning_danns.errors import UsageError

# Two, because Lightning's save_last only copies what the best checkpoint saves. Both save after the epoch's metrics, so
# that a resumed run starts with the next epoch.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "best_checkpoint": {
        "filename": "best", "monitor": "val_accuracy", "mode": "max", "save_on_train_epoch_end": True
    },
    "last_checkpoint": {"filename": "last", "save_on_train_epoch_end": True, "enable_version_counter": False},
}  # fmt: skip


def _from_data(attribute: str) -> Any:
    """A function that reads ``attribute`` off the instantiated data module."""

    def read(datamodule: pl.LightningDataModule) -> Any:
        if not hasattr(datamodule, attribute):
            raise UsageError(
                f"{type(datamodule).__name__} has no attribute {attribute!r}, which the model takes from its data"
            )
        value = getattr(datamodule, attribute)
        return list(value) if isinstance(value, tuple) else value

    return read


def _refuse_option(value: Any) -> Any:
    raise argparse.ArgumentTypeError(
        "it would replace the parameter groups that hold the learning-rate factors. Use --model.optimizer and "
        "--model.lr_scheduler, e.g. --model.optimizer=torch.optim.SGD --model.optimizer.lr=0.1"
    )


class Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, with the nearest known name, instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # no abbreviations: a misspelt option must not pass for another
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        known = {*inspect.signature(pl.Trainer).parameters}
        for room in (modules, data):
            for name, value in vars(room).items():
                if inspect.isclass(value) and issubclass(value, pl.LightningModule | pl.LightningDataModule):
                    known |= {name, *inspect.signature(value).parameters}
        print(f"error: {message}", file=sys.stderr)
        for unknown in re.findall(r"(?:ption '|path string: |: --|Key ')([\w.]+)", message):
            name = unknown.rsplit(".", 1)[-1]
            nearest = difflib.get_close_matches(name, known - {name}, n=1)
            if nearest and name not in known:
                print(f"did you mean {nearest[0]!r} instead of {name!r}?", file=sys.stderr)
        print(f"all options: python {sys.argv[0]} fit --help", file=sys.stderr)
        self.exit(2)


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any LightningModule and data module.

    Each fit has one folder, ``--run_dir`` (``runs/MODEL/DATE_TIME`` if not given), with ``config.yaml``,
    ``metrics.csv``, TensorBoard events and ``checkpoints/``. The other commands write into ``run_dir/COMMAND``.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of this run (default: runs/MODEL/DATE_TIME)",
        )
        for name, defaults in CHECKPOINTS.items():
            parser.add_lightning_class_args(ModelCheckpoint, name)
            parser.set_defaults({f"{name}.{option}": value for option, value in defaults.items()})
        for target, attribute in (("input_shape", "image_shape"), ("num_classes", "num_classes")):
            parser.link_arguments(
                "data", f"model.init_args.{target}", compute_fn=_from_data(attribute), apply_on="instantiate"
            )
        for option in ("--optimizer", "--lr_scheduler"):
            parser.add_argument(option, type=_refuse_option, help="not available: use --model.optimizer")

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint can be read. Lightning would also let its arguments override config and command
        line; here the config rules, and a checkpoint of another network is refused."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand != "fit" and config.ckpt_path in ("best", "last"):
            config.ckpt_path = os.path.join(config.run_dir or "", "checkpoints", f"{config.ckpt_path}.ckpt")
        path = config.ckpt_path
        if path is None or path in ("best", "last", "hpc", "registry") or "://" in path:
            return
        if not os.path.exists(path):
            raise UsageError(f"checkpoint {path} does not exist")
        if os.path.isfile(path):  # sharded checkpoints are folders
            try:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise UsageError(
                    f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged, or holds more than "
                    "weights and plain values"
                ) from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run_dir is None:
            model = config.model.class_path.rsplit(".", 1)[-1]
            config.run_dir = os.path.join("runs", model, f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
        folder = Path(config.run_dir)
        self.folder = folder if self.subcommand == "fit" else folder / str(self.subcommand)
        if self.subcommand == "fit" and config.ckpt_path is None:
            refuse_used_folder(folder)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]
        if config.trainer.default_root_dir is None:  # not written into the config, which may start another run
            kwargs["default_root_dir"] = str(self.folder)
        if config.trainer.logger in (None, True):
            keep_earlier(self.folder / "metrics.csv")
            folder = str(self.folder)
            loggers = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="")]
            kwargs["logger"] = loggers if self.subcommand == "fit" else loggers[:1]
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an unknown accelerator or strategy
            raise UsageError(str(error)) from error

    def after_fit(self) -> None:
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        paths = [callback.best_model_path for callback in callbacks]
        self._print_summary([_short(path) for path in paths if os.path.exists(path)])
        if isinstance(self.model, modules.ReplicatedClassifier) and (self.folder / "replicas").exists():
            self._make_run_folders(self.model)

    def after_validate(self) -> None:
        self._print_summary([])

    def after_test(self) -> None:
        self._print_summary([])

    def after_predict(self) -> None:
        """Write the probabilities of every class for every image, in the order of the data set."""
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file: run it with --trainer.devices=1")
        batches = self.trainer.predict_loop.predictions
        if not batches:
            raise UsageError("there is nothing to write: predict needs at least one batch, and return_predictions")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "predictions.npz"
        probabilities = torch.cat(batches).float().numpy()
        np.savez(path, probabilities=probabilities, predicted=probabilities.argmax(-1))
        print(f"\npredictions of {len(probabilities)} images: {path}")

    @rank_zero_only
    def _print_summary(self, checkpoints: list[str]) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        # of one replica (val_accuracy/3) below and in replicas.csv
        print("\n" + "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()) if "/" not in name))
        if isinstance(self.model, modules.ReplicatedClassifier):
            print("\n".join(_by_learning_rate(self.model.table(metrics))))
        print(f"run folder: {self.folder}")
        for path in checkpoints:
            print(f"{Path(path).stem} weights: {path}")
        if checkpoints:
            config = self.folder / "config.yaml"
            print(f"test them:  python {sys.argv[0]} test --config {config} --ckpt_path {checkpoints[0]}")

    @rank_zero_only
    def _make_run_folders(self, model: modules.ReplicatedClassifier) -> None:
        """Give each replica the config of its single run, so that its folder is a run folder like any other."""
        text = (self.folder / "config.yaml").read_text()
        for index, replica in enumerate(model.replicas):
            config: dict[str, Any] = yaml.safe_load(text)
            folder = self.folder / "replicas" / str(index)
            config |= {"seed_everything": model.settings(index)["seed"], "run_dir": str(folder), "ckpt_path": None}
            single = dict(replica.hparams)
            if "_class_path" not in single:
                return  # made by somebody's function, which no config can name
            config["model"] = {"class_path": single.pop("_class_path"), "init_args": single}
            for name in ("_instantiator", "input_shape", "num_classes"):  # the sizes come from the data
                single.pop(name, None)
            orders = config["data"].get("init_args", {}).get("order_seed")
            if isinstance(orders, list):
                config["data"]["init_args"]["order_seed"] = orders[index % len(orders)]
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        example = self.folder / "replicas" / "0" / "config.yaml"
        print(f"test replica 0:  python {sys.argv[0]} test --config {example} --ckpt_path best")


def _by_learning_rate(table: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds of each accuracy, a line for each learning rate."""
    lines = []
    for rate in dict.fromkeys(row.get("learning_rate") for row in table):
        rows = [row for row in table if row.get("learning_rate") == rate]
        line = f"{len(rows)} seeds:" if rate is None else f"learning rate {rate:g}, {len(rows)} seeds:"
        for name in rows[0]:
            if name.endswith("_accuracy"):
                values = [row[name] for row in rows]
                line += f"  {name} {mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
        lines.append(line)
    return lines


def _short(path: str) -> str:
    """The path from the working directory, if that is shorter."""
    return min(os.path.relpath(path), path, key=len)


def refuse_used_folder(folder: Path) -> None:
    """A fresh fit must not overwrite the checkpoints of an earlier one. (SLURM requeues find theirs by themselves.)"""
    if not _is_rank_zero() or any(folder.glob("hpc_ckpt_*")):
        return
    if (folder / "checkpoints").exists():
        raise UsageError(
            f"run folder {folder} holds the checkpoints of an earlier fit: continue that one with --ckpt_path last, "
            "or choose another --run_dir"
        )


def keep_earlier(path: Path) -> None:
    """Rename a log of an earlier start in the same folder, because the logger would wipe it."""
    if path.exists() and _is_rank_zero():
        number = 1
        while (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(earlier)


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def main(args: ArgsType = None) -> CLI:
    """Run the command line on ``args`` (default: ``sys.argv``).

    Raises:
        SystemExit: with status 2 and one line of text, for a user's mistake.
    """
    try:
        return CLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"max_epochs": 50},
            args=args,
        )
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from error


def _mistake(error: BaseException | None) -> BaseException | None:
    """The user's mistake that ``error`` is or was raised from, if any; jsonargparse wraps what constructors raise."""
    while error is not None and not isinstance(error, UsageError | MisconfigurationException):
        error = error.__cause__ or error.__context__
    return error
