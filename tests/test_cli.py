"""The command line: one folder per run, and commands that follow on each other (refusals: test_wrong_use)."""

import csv
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import QUIET, SMALL

from lightning_danns import DANNMLP
from lightning_danns.cli import run_folder


def fit(run, *args, run_dir="run", **kwargs):
    return run("fit", *SMALL, *QUIET, "--trainer.max_epochs=2", f"--run_dir={run_dir}", *args, **kwargs)


def metrics(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_run_is_one_folder_that_can_be_tested_predicted_and_reloaded(run, data_dir):
    output = fit(run)
    folder = data_dir / "run"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
    assert list(folder.glob("events.out.tfevents*"))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = metrics(folder / "metrics.csv")
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(rows[0])
    assert {row["epoch"] for row in rows} == {"0", "1"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"

    # what the fit printed at its end is a command that works
    assert "val_accuracy" in output
    command = shlex.split(output.split("train.py ")[1].splitlines()[0])
    tested = run(*command, *QUIET)
    assert "test_accuracy" in tested
    (row,) = metrics(folder / "test" / "metrics.csv")
    assert len(metrics(folder / "metrics.csv")) == len(rows)  # the fit's log is untouched

    model = DANNMLP.load_from_checkpoint(folder / "checkpoints" / "best.ckpt").eval()
    run("predict", *command[1:], *QUIET)
    with np.load(data_dir / "data" / "mnist.npz") as file:
        images, labels = torch.from_numpy(file["x_test"])[:, None] / 255, file["y_test"]
    with np.load(folder / "predict" / "predictions.npz") as file:
        np.testing.assert_allclose(file["probabilities"], model(images).softmax(-1).detach(), atol=1e-6)
        assert (file["predicted"] == labels).mean() == pytest.approx(float(row["test_accuracy"]))


def test_a_config_of_one_run_starts_another_without_touching_the_first(run, data_dir):
    fit(run)
    before = (data_dir / "run" / "checkpoints" / "last.ckpt").read_bytes()
    run("fit", "--config=run/config.yaml", "--run_dir=again", "--seed_everything=5", "--trainer.logger=false")
    assert (data_dir / "again" / "checkpoints" / "last.ckpt").exists()
    assert (data_dir / "again" / "config.yaml").exists()
    assert (data_dir / "run" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert "run_dir" not in yaml.safe_load((data_dir / "run" / "config.yaml").read_text())  # it may be moved


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"]])
def test_best_and_last_name_checkpoints_of_the_run_whatever_its_logger(run, data_dir, logger):
    fit(run, *logger)
    assert "test_accuracy" in run("test", "--config=run/config.yaml", "--ckpt_path=best", *QUIET)
    assert "test_accuracy" in run("test", "--config=run/config.yaml", "--ckpt_path=last", *QUIET)
    for name, epochs in (("best", 3), ("last", 4)):
        fit(run, *logger, f"--ckpt_path={name}", f"--trainer.max_epochs={epochs}")
        assert torch.load(data_dir / "run" / "checkpoints" / "last.ckpt")["global_step"] == 5 * epochs


def test_runs_started_at_the_same_second_have_two_names(monkeypatch):
    moments = (datetime(2026, 1, 1, 12, 0, 0, microsecond) for microsecond in (1, 20))
    monkeypatch.setenv(run_folder.RUN_NAME, "")  # restored afterwards
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(now=lambda: next(moments)))
    assert run_folder.run_name() != run_folder.run_name()


def test_equal_seeds_give_equal_runs_and_other_seeds_others(run, data_dir):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(run, f"--seed_everything={seed}", run_dir=name)
    logs = [(data_dir / name / "metrics.csv").read_text() for name in "abc"]
    assert logs[0] == logs[1] != logs[2]


def test_a_fit_continues_in_its_folder_and_loses_nothing(run, data_dir):
    fit(run)
    fit(run, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert {row["epoch"] for row in metrics(data_dir / "run" / "metrics-1.csv")} == {"0", "1"}
    assert {row["epoch"] for row in metrics(data_dir / "run" / "metrics.csv")} == {"2"}


def test_continuing_where_nothing_is_yet_starts_anew(run, data_dir):
    fit(run, "--ckpt_path=last")  # what a job script asks for on its first start
    assert {row["epoch"] for row in metrics(data_dir / "run" / "metrics.csv")} == {"0", "1"}


def test_sizes_come_from_the_data(run, tmp_path):
    (tmp_path / "mydata.py").write_text(
        "from lightning_danns import ImageDataModule\n"
        "class Small(ImageDataModule):\n"
        "    dataset, image_shape, num_classes = 'small', (1, 4, 4), 3\n"
        "import pytorch_lightning as pl\n"
        "class Shapeless(pl.LightningDataModule):\n"
        "    pass\n"
    )
    generator = np.random.default_rng(0)
    arrays = {f"x_{part}": generator.integers(0, 256, (30, 4, 4), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "data" / "small.npz", y_train=np.arange(30) % 3, y_test=np.arange(30) % 3, **arrays)
    sys.path.insert(0, str(tmp_path))
    try:
        args = [*SMALL[:3], *QUIET, "--trainer.max_epochs=1", "--run_dir=run"]
        run("fit", *args, "--data=mydata.Small", "--data.val_size=9")
    finally:
        sys.path.remove(str(tmp_path))
    model = DANNMLP.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (model.network[1].d, model.network[-1].ne) == (16, 3)


def test_debug_runs_leave_no_checkpoint_behind(run, data_dir):
    output = fit(run, "--trainer.fast_dev_run=true")
    assert not list(data_dir.glob("run/**/*.ckpt"))
    assert "weights" not in output


def test_the_published_protocol_trains_on_all_images_and_selects_nothing(run, data_dir):
    output = fit(run, "--data.val_size=0", "--data.test_each_epoch=true")
    assert [path.name for path in (data_dir / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    errors = [float(row["test_accuracy"]) for row in metrics(data_dir / "run" / "metrics.csv") if row["test_accuracy"]]
    tested = run(*shlex.split(output.split("train.py ")[1].splitlines()[0]), *QUIET)
    assert f"test_accuracy {errors[-1]:.4f}" in tested
    assert len(errors) == 2


def test_a_run_records_what_it_was_made_with(run, data_dir):
    fit(run, "--trainer.limit_train_batches=1")
    environment = yaml.safe_load((data_dir / "run" / "environment.yaml").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["device"].startswith("cpu")
    git = ["git", "-C", str(Path(run_folder.__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (environment["commit"] or "")[:40] == commit  # both empty outside a repository


def test_a_moved_run_goes_on_where_it_is_and_remembers_its_best(run, data_dir):
    fit(run)
    shutil.move(data_dir / "run", data_dir / "my runs")
    folder = data_dir / "my runs"
    best = torch.load(folder / "checkpoints" / "best.ckpt")["epoch"]
    output = run("fit", "--config=my runs/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=3")
    assert not (data_dir / "run").exists()
    assert "test --config 'my runs/config.yaml' --ckpt_path best" in output
    saved = torch.load(folder / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 15
    (state,) = [value for name, value in saved["callbacks"].items() if name.startswith("BestCheckpoint")]
    assert state["best_model_path"] == str(folder / "checkpoints" / "best.ckpt")
    rows = [row for path in folder.glob("metrics*.csv") for row in metrics(path)]
    scores = [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]
    assert float(state["best_model_score"]) == pytest.approx(max(scores))
    assert torch.load(folder / "checkpoints" / "best.ckpt")["epoch"] >= best


class Spoil(pl.Callback):
    """Makes an epoch of chance."""

    def on_train_epoch_start(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.data.zero_()


@pytest.mark.parametrize("spelling", ["run", "./run", "{cwd}/run", "../{name}/run"])
def test_a_worse_epoch_never_replaces_the_best_under_any_spelling_of_the_folder(run, data_dir, spelling):
    fit(run)
    before = (data_dir / "run" / "checkpoints" / "best.ckpt").read_bytes()
    spelling = spelling.format(cwd=data_dir, name=data_dir.name)
    spoil = "--trainer.callbacks=test_cli.Spoil"
    fit(run, "--ckpt_path=last", "--trainer.max_epochs=3", spoil, "--trainer.limit_train_batches=1", run_dir=spelling)
    assert (data_dir / "run" / "checkpoints" / "best.ckpt").read_bytes() == before


@pytest.mark.parametrize(("options", "lowest_loss"), [([], False), (["--best_checkpoint.monitor=val_loss"], True)])
def test_the_best_epoch_is_that_of_the_metric_asked_for(run, data_dir, options, lowest_loss):
    fit(run, *options, "--trainer.max_epochs=4", "--model.optimizer=SGD", "--model.optimizer.lr=0.5")
    rows = [row for row in metrics(data_dir / "run" / "metrics.csv") if row["val_loss"]]
    kept = torch.load(data_dir / "run" / "checkpoints" / "best.ckpt")["epoch"]
    if lowest_loss:
        assert kept == min(range(4), key=lambda k: float(rows[k]["val_loss"]))
    else:
        assert kept == max(range(4), key=lambda k: float(rows[k]["val_accuracy"]))
    result = yaml.safe_load((data_dir / "run" / "result.yaml").read_text())
    assert (result["ended_by"], result["epochs"]) == ("max_epochs", 4)
    assert result["best"] == pytest.approx(float(rows[kept][result["monitor"]]))


def test_several_best_epochs_are_kept_under_names_of_their_own(run, data_dir):
    fit(run, "--best_checkpoint.save_top_k=2", "--trainer.max_epochs=3")
    names = {path.name for path in (data_dir / "run" / "checkpoints").iterdir()}
    assert len(names) == 3
    assert all(name == "last.ckpt" or name.startswith("best-epoch=") for name in names)


ENDS = {
    "max_steps": ["--trainer.max_steps=3"],
    "max_time": ["--trainer.max_time=00:00:00:01", "--trainer.max_epochs=100000"],
    "early_stopping": [
        "--trainer.max_epochs=9", "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss",
        "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=99",
    ],
}  # fmt: skip


@pytest.mark.parametrize("ended_by", ENDS)
def test_a_result_says_why_the_fit_ended(run, data_dir, ended_by):
    fit(run, *ENDS[ended_by])
    assert yaml.safe_load((data_dir / "run" / "result.yaml").read_text())["ended_by"] == ended_by


OWN = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_danns import DANNLinear, Regression

class Line(Regression):
    def __init__(self, width: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.network = torch.nn.Sequential(DANNLinear(3, width, 1), torch.nn.ReLU(), torch.nn.Linear(width, 1))

class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Points(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.rand(40, 3)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    val_dataloader = train_dataloader
"""


def test_any_module_and_any_data_of_ones_own_run(run, data_dir):
    (data_dir / "mine.py").write_text(OWN)
    run("fit", "--model=mine.Line", "--data=mine.Points", "--run_dir=run", "--trainer.max_epochs=2", *QUIET)
    result = yaml.safe_load((data_dir / "run" / "result.yaml").read_text())
    assert (result["monitor"], result["mode"]) == ("val_loss", "min")
    run("fit", "--model=mine.Plain", "--data=mine.Points", "--run_dir=plain", "--trainer.max_epochs=1", *QUIET)
    assert (data_dir / "plain" / "checkpoints" / "last.ckpt").exists()
