"""The command line: LightningCLI over any LightningModule and data module, one folder for each run."""

import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import lightning_danns
from lightning_danns import modules
from lightning_danns.cli.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, monitored
from lightning_danns.cli.parser import COMMAND, Parser, few_lines, refuse_inherited, refuse_option, refuse_unreadable
from lightning_danns.cli.run_folder import (
    LateCSVLogger,
    LateTensorBoardLogger,
    RunRecord,
    folder_of,
    is_rank_zero,
    refuse_used_folder,
    run_name,
)
from lightning_danns.data.files import write_arrays
from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import imported, plain

FROM_DATA = {"input_shape": "image_shape", "num_classes": "num_classes"}
"""Arguments that a model may ask for, and the attributes of a data module that they come from."""


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any LightningModule and data module.

    Each fit has one folder, ``--run_dir`` (``runs/MODEL/DATE_TIME`` if not given), with ``config.yaml``,
    ``metrics.csv``, ``result.yaml``, TensorBoard events and ``checkpoints/``. The other commands write into
    ``run_dir/COMMAND``.

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
            help="folder of this run (default: runs/MODEL/DATE_TIME; with --ckpt_path, that of the --config)",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        for option in ("--optimizer", "--lr_scheduler"):
            parser.add_argument(option, type=refuse_option, help="not available: use --model.optimizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        if isinstance(given, Sequence):
            refuse_unreadable([str(arg) for arg in given])
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        # taken out here, because Lightning would let the checkpoint's arguments override config and command line
        self.ckpt_path, config.ckpt_path = config.ckpt_path, None
        seed = config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UsageError(f"seed_everything={seed}: give a seed from 0 to 2^32 - 1")
        refuse_inherited(config, given)

    def before_instantiate_classes(self) -> None:
        command, config = str(self.subcommand), self.config[self.subcommand]
        if config.run_dir is None:
            config.run_dir = self._folder_of_config(config) or os.path.join(
                "runs", config.model.class_path.rpartition(".")[2], run_name()
            )
        self.folder = folder_of(config.run_dir, command)
        self.run_folder = folder_of(config.run_dir, "fit")
        config.ckpt_path = _checked_ckpt_path(self.ckpt_path, self.run_folder / "checkpoints", command)
        if command != "fit" and self.ckpt_path is None:
            print("warning: no --ckpt_path, so these are the weights that the model starts with", file=sys.stderr)
        for name in ("train", "val", "test", "predict"):  # a whole number comes in as a float
            if config.trainer.get(f"limit_{name}_batches") == 1:
                print(f"warning: limit_{name}_batches=1 means all batches (1.0), not one of them", file=sys.stderr)
        if config.weights_only is None:
            config.weights_only = True  # Lightning would unpickle anything that comes from an http address
        if command == "fit":
            if self.ckpt_path is None:
                refuse_used_folder(self.folder)
            best = config.best_checkpoint
            task = getattr(imported(config.model.class_path), "best", ("val_loss", "min"))
            best.monitor, best.mode = monitored(task, best.monitor, best.mode)
        self._take_from_data(config)
        self.checkpointing = config.trainer.get("enable_checkpointing") is not False
        if not self.checkpointing:  # the Trainer refuses it beside our callbacks, which are taken out below
            config.trainer.enable_checkpointing = None

    def _folder_of_config(self, config: Namespace) -> str | None:
        """The run folder whose config.yaml is the last --config, for commands that go on with its checkpoints."""
        if self.ckpt_path is None:
            return None
        folders = [os.path.dirname(os.path.abspath(str(file))) for file in config.get("config") or []]
        runs = [folder for folder in folders if os.path.isdir(os.path.join(folder, "checkpoints"))]
        if not runs and self.ckpt_path in ("best", "last"):
            raise UsageError(f"--ckpt_path {self.ckpt_path}: of which run? Give its --run_dir or config.yaml")
        return runs[-1] if runs else None

    def _take_from_data(self, config: Namespace) -> None:
        """Give the model the sizes that it asks for and the data have; refuse others that are given."""
        arguments = config.model.get("init_args") or Namespace()
        asked = [name for name in FROM_DATA if name in arguments]
        self.taken: list[str] = []
        if not asked or config.get("data") is None:
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(pl.LightningDataModule, "data")
        parser.add_class_arguments(imported(config.model.class_path), "model", fail_untyped=False, instantiate=False)
        datamodule = parser.instantiate(Namespace(data=config.data.clone())).data
        defaults = parser.get_defaults()
        for name in asked:
            theirs, ours = plain(getattr(datamodule, FROM_DATA[name], None)), plain(arguments[name])
            if theirs is None:
                continue
            if ours not in (plain(defaults.get(f"model.{name}")), theirs, None):
                raise UsageError(
                    f"{name}={ours}, but {type(datamodule).__name__} has {FROM_DATA[name]}={theirs}: leave it out, "
                    "the model takes it from its data"
                )
            arguments[name] = theirs
            self.taken.append(name)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            if mistake_in(error) is None:
                self._refuse_trainer_section()
            raise

    def _refuse_trainer_section(self) -> None:
        """Callbacks, loggers and plugins that refuse their arguments are a user's mistake; faults of a model are not.

        Raises:
            UsageError: what the Trainer's section names cannot be built, whatever the model is.
        """
        trainer = self.config[self.subcommand].trainer.clone()
        section = Namespace(subcommand=self.subcommand, **{str(self.subcommand): Namespace(trainer=trainer)})
        try:
            self.parser.instantiate_classes(section)
        except (ValueError, TypeError) as error:
            raise UsageError(few_lines(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]
        if config.trainer.default_root_dir is None:  # not written into the config, which may start another run
            kwargs["default_root_dir"] = str(self.folder)
        if config.trainer.logger in (None, True):
            csv = LateCSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=1)
            board = LateTensorBoardLogger(str(self.folder), name="", version="", default_hp_metric=False)
            kwargs["logger"] = [csv, board] if self.subcommand == "fit" else [csv]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:  # Lightning refuses its arguments by these too
            raise UsageError(str(error)) from error
        if trainer.accumulate_grad_batches < 1:
            raise UsageError(f"accumulate_grad_batches={trainer.accumulate_grad_batches}: it must be at least 1")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint | LastCheckpoint) and not callback.dirpath:
                callback.dirpath = str(self.run_folder / "checkpoints")  # not where a logger writes
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not (self.checkpointing and self.subcommand == "fit"):
            callbacks[:] = [c for c in callbacks if not isinstance(c, BestCheckpoint | LastCheckpoint)]
        best = self.config[self.subcommand].best_checkpoint
        callbacks[:0] = [RunRecord(self.folder, self._saved_config(), (best.monitor, best.mode)), *self.callbacks]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the default, which is not safe everywhere
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _saved_config(self) -> str:
        config = self.config[self.subcommand].clone()
        for name in ("config", "run_dir", "ckpt_path"):  # of this start alone: the folder may be moved
            config.pop(name, None)
        for name in self.taken:
            config.model.init_args.pop(name, None)
        if not self.checkpointing:
            config.trainer.enable_checkpointing = False
        whole = Namespace(subcommand=self.subcommand, **{str(self.subcommand): config})
        text = self.parser.dump(whole, format="json", skip_unset=False, skip_validation=True)  # which writes enums too
        return yaml.safe_dump(json.loads(text)[self.subcommand], sort_keys=False)

    def fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs)
        except ValueError as error:
            interval, batches = self.trainer.val_check_interval, self.trainer.num_training_batches
            if isinstance(interval, int) and interval > batches and self.trainer.check_val_every_n_epoch:
                raise UsageError(f"val_check_interval={interval}, but an epoch has {batches:.0f} batches") from error
            raise

    def after_fit(self) -> None:
        if is_rank_zero() and not (self.trainer.fast_dev_run or (self.folder / "result.yaml").exists()):  # type: ignore[attr-defined]
            raise UsageError(
                "nothing was trained: max_epochs, max_steps, max_time and limit_train_batches must be above 0"
            )
        checkpoints = self.run_folder / "checkpoints"
        self._print_summary([path for path in (checkpoints / "best.ckpt", checkpoints / "last.ckpt") if path.exists()])

    def before_predict(self) -> None:
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file: run it with --trainer.devices=1")

    def after_predict(self) -> None:
        """Write what the model predicts for every input, in the order of the data set."""
        batches = self.trainer.predict_loop.predictions
        if not batches:
            raise UsageError("there is nothing to write: predict needs at least one batch, and return_predictions")
        if not isinstance(batches[0], torch.Tensor):
            raise UsageError("several predict loaders: predict writes one file, for one loader")
        path = self.folder / "predictions.npz"
        outputs = torch.cat(batches).float().numpy()
        named = {"outputs": outputs}
        if isinstance(self.model, modules.Classification):
            named = {"probabilities": outputs, "predicted": outputs.argmax(-1)}
        write_arrays(path, named)
        print(f"\npredictions for {len(outputs)} inputs: {path}")

    @rank_zero_only
    def _print_summary(self, checkpoints: Sequence[Path] = ()) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        print("\n" + "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()) if "/" not in name))
        print(f"run folder: {_short(self.folder)}")
        for path in checkpoints:
            print(f"{path.stem} weights: {_short(path)}")
        if checkpoints:
            config = ["--config", _short(self.folder / "config.yaml"), "--ckpt_path", checkpoints[0].stem]
            print(f"test them:  {shlex.join([*_program(), 'test', *config])}")

    after_validate = after_test = _print_summary


def _program() -> list[str]:
    """The words that start this command line again, in this environment."""
    program = Path(sys.argv[0])
    if program.name == COMMAND:
        path = _short(program)
        return [COMMAND if shutil.which(COMMAND) == str(program) else path if os.sep in path else f"./{path}"]
    python = "python" if shutil.which("python") == sys.executable else _short(Path(sys.executable))
    own = Path(lightning_danns.__file__).parent in program.absolute().parents  # python -m, also of a study
    if own or program.suffix != ".py":
        return [python, "-m", "lightning_danns"]
    return [python, "-m", program.parent.name] if program.name == "__main__.py" else [python, _short(program)]


def _short(path: Path) -> str:
    """The path from the working directory, if that is shorter."""
    try:
        return min(os.path.relpath(path), str(path), key=len)
    except ValueError:  # on another drive
        return str(path)


def _checked_ckpt_path(path: str | None, checkpoints: Path, command: str) -> str | None:
    """The checkpoint to start from; None for a first start with ``last``.

    Raises:
        UsageError: it does not exist, cannot be read, or is no checkpoint.
    """
    if path in ("best", "last"):
        name, path = path, str(checkpoints / f"{path}.ckpt")
        if name == "best" and not os.path.exists(path) and (checkpoints / "last.ckpt").exists():
            raise UsageError(
                f"checkpoint {path} does not exist: no validation of that fit has ended. Use --ckpt_path last"
            )
        if not os.path.exists(path) and command == "fit" and name == "last":
            return None  # a first start
    if path is None or path in ("hpc", "registry") or "://" in path:
        return path
    path = os.path.expanduser(path)
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
    return path


def main(args: ArgsType = None, callbacks: Sequence[pl.Callback] = ()) -> CLI:
    """Run the command line on ``args`` (default: those of the process), with ``callbacks`` beside the config's.

    Raises:
        SystemExit: with status 2 and a few lines of text, for a user's mistake.
    """
    for name in lightning_danns.__all__:  # imported so that their classes answer to their short names
        getattr(lightning_danns, name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where --model my_file.MyModel is looked for
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")  # earlier logs are kept
            # a module that shards itself if it is asked to
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")
            return CLI(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_class=Parser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # modules keep their arguments themselves
                seed_everything_default=0,
                save_config_callback=None,
                trainer_defaults={"max_epochs": 50},
                args=args,
                callbacks=callbacks,
            )
    except Exception as error:
        mistake = mistake_in(error)
        if mistake is None:
            raise
        text = str(mistake) or type(mistake).__name__
        print(f"error: {text if isinstance(mistake, UsageError) else few_lines(text)}", file=sys.stderr)
        raise SystemExit(2) from error


MISTAKES = (UsageError, MisconfigurationException, OSError, ImportError, UnpicklingError, UnicodeDecodeError)


def mistake_in(error: BaseException | None) -> BaseException | None:
    """The user's mistake that ``error`` is or was raised from, if any; jsonargparse wraps what constructors raise."""
    if error is None or isinstance(error, MISTAKES):
        return error
    return mistake_in(error.__cause__)


def command() -> None:
    """The installed command."""
    main()
