"""The command line: LightningCLI over any module and data module, one folder for each run."""

import argparse
import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from statistics import mean, stdev
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# imported so that their classes answer to their short names
from lightning_danns import data, modules
from lightning_danns.checkpoints import AtomicCheckpointIO, LastCheckpoint
from lightning_danns.data.files import write_arrays
from lightning_danns.errors import UsageError
from lightning_danns.run_folder import earlier_kept, environment, folder_of, refuse_used_folder, run_name, undone_if

BEST_CHECKPOINT = {
    "filename": "best",
    "monitor": "val_accuracy",
    "mode": "max",
    "save_on_train_epoch_end": True,  # with the metrics of the whole epoch, so that a resumed run starts with the next
    "enable_version_counter": False,
}


def _from_data(attribute: str) -> Any:
    """A function that reads ``attribute`` off the instantiated data module."""

    def read(datamodule: pl.LightningDataModule) -> Any:
        if not hasattr(datamodule, attribute):
            raise UsageError(
                f"{type(datamodule).__name__} has no attribute {attribute!r}, which the model takes from its data"
            )
        return _plain(getattr(datamodule, attribute))

    return read


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _default(model: type, argument: str) -> Any:
    """The default of a constructor's argument, which may be a base class's and passed on."""
    for cls in model.__mro__:
        parameter = inspect.signature(cls).parameters.get(argument)
        if parameter is not None:
            return _plain(parameter.default)
    return None


FROM_DATA = {"input_shape": "image_shape", "num_classes": "num_classes"}
"""Arguments of the model, and the attributes of the data module that they come from."""

NOISE = re.compile(
    r"\s*(- )?(Does not validate .*|Subtypes: .*|Errors:|Given value type: .*|Given value: (Namespace|NestedArg).*"
    r"|Expected a <class 'NoneType'>.*|Expected a path but .*)?$"
)
"""Lines of jsonargparse that do not say what is wrong."""


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
        lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not NOISE.match(line)]
        print(f"error: {' '.join(lines) or 'an empty config'}", file=sys.stderr)
        for unknown in re.findall(r"(?:ption '|path string: |: --|Key ')([\w.]+)", message):
            name = unknown.rsplit(".", 1)[-1]
            nearest = difflib.get_close_matches(name, known - {name}, n=1)
            if nearest and name not in known:
                print(f"did you mean {nearest[0]!r} instead of {name!r}?", file=sys.stderr)
        print(f"all options: python {sys.argv[0]} fit --help", file=sys.stderr)
        self.exit(2)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of the run, wherever its loggers write."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = folder_of(self.config.run_dir, trainer.state.fn.value)  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / "config.yaml", skip_unset=False, overwrite=True)
        (folder / "environment.yaml").write_text(yaml.safe_dump(environment(str(trainer.strategy.root_device))))


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any LightningModule and data module.

    Each fit has one folder, ``--run_dir`` (``runs/MODEL/DATE_TIME`` if not given), with ``config.yaml``,
    ``metrics.csv``, TensorBoard events and ``checkpoints/``. The other commands write into ``run_dir/COMMAND``.

    Args:
        callbacks: added to those of the config, by a program that runs the command line in its own process.
    """

    def __init__(self, *args: Any, callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> None:
        self.callbacks = callbacks
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of this run (default: runs/MODEL/DATE_TIME)",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.set_defaults({f"best_checkpoint.{option}": value for option, value in BEST_CHECKPOINT.items()})
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        for target, attribute in FROM_DATA.items():
            parser.link_arguments(
                "data", f"model.init_args.{target}", compute_fn=_from_data(attribute), apply_on="instantiate"
            )
        for option in ("--optimizer", "--lr_scheduler"):
            parser.add_argument(option, type=_refuse_option, help="not available: use --model.optimizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UsageError(f"a config file is not text: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint can be read. Lightning would also let its arguments override config and command
        line; here the config rules, and a checkpoint of another network is refused."""
        config = self.config[self.config.subcommand]
        if config.weights_only is None:
            config.weights_only = True  # Lightning would unpickle anything that comes from an http address
        path = config.ckpt_path
        if path in ("best", "last"):
            name, path = path, os.path.join(config.run_dir or "", "checkpoints", f"{path}.ckpt")
            if self.config.subcommand != "fit" or name == "best":
                if config.run_dir is None:
                    raise UsageError(f"--ckpt_path {name}: of which run? Give its --run_dir or config.yaml")
                config.ckpt_path = path
            elif not os.path.exists(path):
                return  # a first start, or Lightning finds another
        if path is None and self.config.subcommand != "fit":
            print("warning: no --ckpt_path, so these are the weights that the model starts with", file=sys.stderr)
        if path is None or path in ("hpc", "registry") or "://" in path:
            return
        if not os.path.exists(path):
            raise UsageError(f"checkpoint {path} does not exist")
        if os.path.isfile(path):  # sharded checkpoints are folders
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise UsageError(
                    f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged, or holds more than "
                    "weights and plain values"
                ) from error
            if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
                raise UsageError(f"{path} is no checkpoint of a Lightning module: it lacks state_dict or version")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run_dir is None:
            model = config.model.class_path.rsplit(".", 1)[-1]
            config.run_dir = os.path.join("runs", model, run_name())
        self.folder = folder_of(config.run_dir, str(self.subcommand))
        if self.subcommand == "fit" and config.ckpt_path is None:
            refuse_used_folder(self.folder)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]
        if config.trainer.default_root_dir is None:  # not written into the config, which may start another run
            kwargs["default_root_dir"] = str(self.folder)
        if config.trainer.logger in (None, True):
            folder = str(self.folder)
            loggers = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="")]
            kwargs["logger"] = loggers if self.subcommand == "fit" else loggers[:1]
        if config.trainer.profiler is None:
            kwargs["profiler"] = _NoProfiler()
        given = config.trainer.callbacks or []
        configured = list(given) if isinstance(given, list) else [given]  # a copy, because Lightning adds its own to it
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # devices that are not a number
            raise UsageError(str(error)) from error
        if trainer.accumulate_grad_batches < 1:
            raise UsageError(f"accumulate_grad_batches={trainer.accumulate_grad_batches}: it must be at least 1")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback.dirpath:
                callback.dirpath = str(self.folder / "checkpoints")  # not where a logger writes
        _redraw_seldom(trainer.callbacks, configured)  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the default, which is not safe everywhere
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _instantiate_trainer(self, config: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
        def possible(callback: pl.Callback) -> bool:
            if not isinstance(callback, ModelCheckpoint):
                return True
            by_validation = (callback.monitor or "").startswith("val_")
            nothing_held_out = getattr(self.datamodule, "val_size", None) == 0
            return config.get("enable_checkpointing") is not False and not (by_validation and nothing_held_out)

        return super()._instantiate_trainer(config, [*filter(possible, callbacks), *self.callbacks])

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        given = self.config[self.subcommand].model.get("init_args", {})
        for argument, attribute in FROM_DATA.items():
            value, theirs = given.get(argument), getattr(self.datamodule, attribute)
            if value is not None and value not in (_default(type(self.model), argument), _plain(theirs)):
                raise UsageError(
                    f"{argument}={value}, but {type(self.datamodule).__name__} has {attribute}={theirs}: leave it out, "
                    "the model takes it from its data"
                )

    def _run_subcommand(self, subcommand: str) -> None:
        with undone_if(_mistake, self.folder), earlier_kept(self.folder / "metrics.csv"):
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        if self.trainer.global_step == 0:
            raise UsageError("nothing was trained: max_epochs, max_steps and limit_train_batches must be above 0")
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        paths = [callback.best_model_path for callback in callbacks]
        self._print_summary([_short(path) for path in paths if os.path.exists(path)])
        if isinstance(self.model, modules.ReplicatedClassifier) and (self.folder / "replicas").exists():
            self._make_run_folders(self.model)

    def after_validate(self) -> None:
        self._print_summary([])

    def after_test(self) -> None:
        self._print_summary([])

    def before_predict(self) -> None:
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file: run it with --trainer.devices=1")

    def after_predict(self) -> None:
        """Write the probabilities of every class for every image, in the order of the data set."""
        batches = self.trainer.predict_loop.predictions
        if not batches:
            raise UsageError("there is nothing to write: predict needs at least one batch, and return_predictions")
        path = self.folder / "predictions.npz"
        probabilities = torch.cat(batches).float().numpy()
        write_arrays(path, {"probabilities": probabilities, "predicted": probabilities.argmax(-1)})
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


class _NoProfiler(PassThroughProfiler):
    """Measures nothing, as Lightning's default does, but enters no generator for it: a step asks sixty times."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING


_NOTHING = nullcontext()


def _redraw_seldom(callbacks: list[pl.Callback], configured: list[pl.Callback]) -> None:
    """Let the Trainer's own progress bar redraw every 20 batches, or as one of Rich, 5 times a second.

    Each time takes as long as a tenth of a step.
    """
    for index, bar in enumerate(callbacks):
        if bar not in configured and isinstance(bar, TQDMProgressBar):
            callbacks[index] = TQDMProgressBar(refresh_rate=20)
        elif bar not in configured and isinstance(bar, RichProgressBar):
            callbacks[index] = RichProgressBar(refresh_rate=5)


def _short(path: str) -> str:
    """The path from the working directory, if that is shorter."""
    return min(os.path.relpath(path), path, key=len)


def main(args: ArgsType = None, callbacks: Sequence[pl.Callback] = ()) -> CLI:
    """Run the command line on ``args`` (default: ``sys.argv``), with ``callbacks`` beside those of the config.

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
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"max_epochs": 50},
            args=args,
            callbacks=callbacks,
        )
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from error


def _mistake(error: BaseException | None) -> BaseException | None:
    """The user's mistake that ``error`` is or was raised from, if any; jsonargparse wraps what constructors raise.

    A mistake is a `UsageError`, a value that Lightning refuses, or a file that cannot be read or written.
    """
    if error is None or isinstance(error, UsageError | OSError | UnpicklingError) or _refused_by_lightning(error):
        return error
    if error.__cause__ is not None:
        return _mistake(error.__cause__)
    context = _mistake(error.__context__)  # which may have been dealt with, unless it was ours
    return context if isinstance(context, UsageError) else None


def _refused_by_lightning(error: BaseException) -> bool:
    """Whether it is a MisconfigurationException, or a ValueError that Lightning raised itself, as it often does."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return isinstance(error, MisconfigurationException) or (
        isinstance(error, ValueError) and raised_in.startswith(("pytorch_lightning.", "lightning_fabric."))
    )
