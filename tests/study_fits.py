"""Fits for tests of studies: real ones that say how they ended, and others that are over in a millisecond."""

import csv
import sqlite3
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_danns.cli as cli

REAL = cli.main
CONNECT = sqlite3.connect


def hasty_connect(*args, **kwargs):
    """A connection that does not wait for the disk."""
    connection = CONNECT(*args, **kwargs)
    connection.execute("PRAGMA synchronous=OFF")
    return connection


class WriteResult(pl.Callback):
    """``result.yaml`` of a fit of a classifier."""

    def __init__(self, folder):
        self.path = Path(folder) / "result.yaml"

    def on_fit_end(self, trainer, pl_module):
        best = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        ended_by = "max_epochs" if trainer.current_epoch == trainer.max_epochs else "other"
        said = {"ended_by": ended_by, "epochs": trainer.current_epoch, "monitor": best.monitor, "mode": best.mode}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.path.write_text(yaml.safe_dump(said | {"best": float(best.best_model_score), "metrics": metrics}))


def real_main(args, callbacks=()):
    """The command line, which also writes ``result.yaml``."""
    folder = next((a.removeprefix("--run_dir=") for a in args if a.startswith("--run_dir=")), None)
    return REAL(args, callbacks=[*callbacks, *([WriteResult(folder)] if folder else [])])


def options_of(args):
    """``--key=value`` and ``--key value`` as a dictionary."""
    options = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
    return options | {a[2:]: b for a, b in pairwise(args) if a.startswith("--") and not b.startswith("--")}


def fake_main(args, callbacks=(), before_epoch=lambda folder, epoch: None):
    """What the command line does to the run folder, without a network: ``val_accuracy`` is best at lr=0.1.

    ``--lr=nan`` diverges, ``--note=fishy`` is refused; ``--mode=min`` monitors ``val_loss``, ``--val=false`` nothing.
    """
    options = options_of(args)
    config = yaml.safe_load(Path(options["config"]).read_text()) if "config" in options else {"model": {}, "data": {}}
    lr = float(options.get("lr", 0.1))
    max_epochs = int(options.get("trainer.max_epochs", 2))
    config["trainer"] = {"max_epochs": max_epochs, "devices": 1, "num_nodes": 1}
    config["model"] |= {"init_args": {"lr": lr, "note": options.get("note"), "mode": options.get("mode", "max")}}
    config["seed_everything"] = int(options.get("seed_everything", 0))
    if "--print_config" in args:
        print(yaml.safe_dump(config))
        raise SystemExit(0)
    if options.get("note") == "fishy":
        print("error: note=fishy is none", file=sys.stderr)
        raise SystemExit(2)
    if options.get("note") == "broken":
        raise RuntimeError("out of memory")
    folder = Path(options["run_dir"])
    (folder / "result.yaml").unlink(missing_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path, best, mode = folder / "metrics.csv", None, options.get("mode", "max")
    done = len(epochs_of(folder))
    trainer = SimpleNamespace(should_stop=False, sanity_checking=False, callback_metrics={})
    while done < max_epochs and not trainer.should_stop:
        before_epoch(folder, done)
        value = 1 / (1 + abs(lr - 0.1)) - 0.5 / (done + 1) if mode == "max" else abs(lr - 0.1) + 1 / (done + 1)
        metrics = {"train_loss": 1.0, "val_accuracy" if mode == "max" else "val_loss": value}
        if options.get("test") == "true":
            metrics["test_accuracy"] = value
        trainer.callback_metrics, trainer.current_epoch = metrics, done
        with open(path, "a") as file:
            file.write(("" if done else f"epoch,step,{','.join(metrics)}\n") + f"{done},{done},1.0,{value}\n")
        done += 1
        for callback in callbacks:
            callback.on_train_batch_end(trainer)
            if options.get("val") != "false":
                callback.on_validation_end(trainer, None)
        best = value if best is None else max(best, value) if mode == "max" else min(best, value)
    ended_by = "max_epochs" if done == max_epochs else "other"
    monitor = "val_accuracy" if mode == "max" else "val_loss"
    said = {"ended_by": ended_by, "monitor": monitor, "mode": mode, "epochs": done, "best": best, "metrics": {}}
    (folder / "result.yaml").write_text(yaml.safe_dump(said))


def epochs_of(folder):
    """The epochs in the log of a run."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]
