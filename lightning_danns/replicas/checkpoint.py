"""What replicas need of a Trainer: diverged ones end alone, each is saved as a run of its own, all in one table."""

import csv
import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Checkpoint

from lightning_danns.callbacks import DaleProjection

Rows = list[dict[str, Any]]


class ReplicaProjection(DaleProjection):
    """Projects the replicas of a `ReplicatedClassifier`, and lets them go on when some have diverged, but not all."""

    def violations(self, pl_module: Any) -> dict[str, float]:
        violations = super().violations(pl_module)
        if not hasattr(pl_module, "replicas"):  # another module that the same Trainer fits
            return violations
        diverged = {name.split(".")[1] for name, lowest in violations.items() if math.isnan(lowest)}  # replicas.K.layer
        if len(diverged) == len(pl_module.replicas):
            return violations
        return {name: lowest for name, lowest in violations.items() if name.split(".")[1] not in diverged}


class ReplicaCheckpoint(Checkpoint):
    """Makes a run folder for every replica of a `ReplicatedClassifier`, and one table of the metrics of all.

    `ReplicatedClassifier` attaches it where the Trainer saves checkpoints. It writes into the folder of the log where
    that lies within the Trainer's ``default_root_dir``, and into ``default_root_dir`` otherwise:

        replicas.csv                        a row for each replica and epoch: its seed, learning rate and metrics
        replicas_test.csv                   after a test, a row for each replica
        replicas/3/checkpoints/best.ckpt    replica 3 at its best epoch
        replicas/3/checkpoints/last.ckpt    replica 3 after the last epoch, or before it diverged
        replicas/3/metrics.csv              its own metrics
        replicas/3/{config,result}.yaml     as its single run would leave them, where all replicas have them together

    What another run has left there stays: a second run writes ``replicas-v1``, one that resumes goes on in its own.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "replicas"):
            self._place = _unused(_folder(trainer), "replicas", pl_module.history)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not hasattr(pl_module, "replicas") or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for index, replica in enumerate(pl_module.replicas):
            folder, rows = self._place / str(index), _own(pl_module, index)
            _write(rows, folder / "metrics")
            _write_config(self._place.parent / "config.yaml", folder, pl_module, index)
            if not all(bool(parameter.isfinite().all()) for parameter in replica.parameters()):
                continue  # it has diverged: keep what it was before
            pl_module.save_replica(index, folder / "checkpoints" / "last.ckpt")
            if rows[-1].get(replica.best[0], math.nan) == _best(rows, *replica.best) != _best(rows[:-1], *replica.best):
                pl_module.save_replica(index, folder / "checkpoints" / "best.ckpt")
        _write(pl_module.history, self._place)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not hasattr(pl_module, "replicas") or not pl_module.history or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        print(_by_learning_rate(pl_module.history[-len(pl_module.replicas) :], *pl_module.best))
        of_all = self._place.parent / "result.yaml"
        for index, replica in enumerate(pl_module.replicas if of_all.exists() else ()):
            rows = _own(pl_module, index)
            metrics = {name: value for name, value in sorted(rows[-1].items()) if name != "epoch"}
            result = {**yaml.safe_load(of_all.read_text()), "best": _best(rows, *replica.best), "metrics": metrics}
            (self._place / str(index) / "result.yaml").write_text(yaml.safe_dump(result, sort_keys=False))
        config = self._place / "0" / "config.yaml"
        if config.exists():
            command = ["python", "-m", "lightning_danns", "test", "--config", str(config), "--ckpt_path", "best"]
            print(f"test replica 0:  {shlex.join(command)}")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "replicas"):
            print(_by_learning_rate(pl_module.table(), *pl_module.best))
            _write(pl_module.table(), _unused(_folder(trainer), "replicas_test"))


def _own(model: Any, index: int) -> Rows:
    """The history of one replica."""
    rows = model.history[index :: len(model.replicas)]
    shared = ("replica", *model.settings(index))
    return [{name: value for name, value in row.items() if name not in shared} for row in rows]


def _best(rows: Rows, name: str, mode: str) -> float | None:
    values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
    return (max if mode == "max" else min)(values, default=None)


def _folder(trainer: pl.Trainer) -> Path:
    root = Path(trainer.default_root_dir).resolve()
    log = Path(trainer.log_dir or root).resolve()  # a logger of the user may write anywhere
    return log if log.is_relative_to(root) else root


def _unused(folder: Path, stem: str, rows: Rows | None = None) -> Path:
    """The first of STEM, STEM-v1, ... that is free, or whose table begins with ``rows``, from which a run goes on."""
    for version in itertools.count():
        place = folder / (f"{stem}-v{version}" if version else stem)
        table = place.with_name(f"{place.name}.csv")
        if not place.exists() and not table.exists():
            break
        if rows and table.exists():
            with open(table, newline="") as file:
                begun = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
            if begun[: len(rows)] == [{name: str(value) for name, value in row.items()} for row in rows]:
                break
    return place


def _write(rows: Rows, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f"{place.name}.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _write_config(of_all: Path, folder: Path, model: Any, index: int) -> None:
    """Give a replica the config of its single run, so that its folder is a run folder like any other."""
    if not of_all.exists() or (folder / "config.yaml").exists():
        return
    config: dict[str, Any] = yaml.safe_load(of_all.read_text())
    classifier = config.get("model", {}).get("init_args", {}).get("classifier")
    if classifier is None:
        return  # made by somebody's function, which no config can name
    single: dict[str, Any] = {"class_path": classifier} if isinstance(classifier, str) else classifier
    settings, replica = model.settings(index), model.replicas[index]
    if "learning_rate" in settings:
        single.setdefault("init_args", {})["optimizer"] = replica.hparams["optimizer"]
    orders = config.get("data", {}).get("init_args", {}).get("order_seed")
    if isinstance(orders, list):
        config["data"]["init_args"]["order_seed"] = orders[index % len(orders)]
    config |= {"seed_everything": settings["seed"], "model": single}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def _by_learning_rate(table: Sequence[dict[str, Any]], best: str, mode: str) -> str:
    """Mean and standard deviation over seeds of the metric that counts, a line for each learning rate."""
    lines = []
    for rate in dict.fromkeys(row.get("learning_rate") for row in table):
        rows = [row for row in table if row.get("learning_rate") == rate]
        line = f"{len(rows)} seeds:" if rate is None else f"learning rate {rate:g}, {len(rows)} seeds:"
        for name in rows[0]:
            if name.endswith(best.removeprefix("val")):
                values = [row[name] for row in rows]
                line += f"  {name} {mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
        lines.append(line)
    return "\n".join(lines)
