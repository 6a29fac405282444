"""The command line: one folder per run, and commands that follow on each other (refusals: test_wrong_use)."""

import csv
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import QUIET, SMALL

import lightning_danns.cli as cli
from lightning_danns import DANNMLP, run_folder


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
    command = output.split("python train.py ")[1].split()
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
    assert yaml.safe_load((data_dir / "run" / "config.yaml").read_text())["run_dir"] == "run"


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"]])
def test_best_and_last_name_checkpoints_of_the_run_whatever_its_logger(run, data_dir, logger):
    fit(run, *logger)
    assert "test_accuracy" in run("test", "--config=run/config.yaml", "--ckpt_path=best", *QUIET)
    assert "test_accuracy" in run("test", "--config=run/config.yaml", "--ckpt_path=last", *QUIET)
    for name, epochs in (("best", 3), ("last", 4)):
        output = fit(run, *logger, f"--ckpt_path={name}", f"--trainer.max_epochs={epochs}")
        assert f"run/checkpoints/{name}.ckpt" in output  # restored
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
        output = run("fit", *args, "--data=mydata.Shapeless", "--run_dir=other", status=2)
        assert "Shapeless has no attribute 'image_shape'" in output
    finally:
        sys.path.remove(str(tmp_path))
    model = DANNMLP.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (model.network[1].d, model.network[-1].ne) == (16, 3)


def test_debug_runs_leave_no_checkpoint_behind(run, data_dir):
    output = fit(run, "--trainer.fast_dev_run=true")
    assert not list(data_dir.glob("run/**/*.ckpt"))
    assert "weights" not in output


def test_only_the_trainers_own_progress_bar_is_redrawn_seldom(run):
    bars = []
    for options in ([], ["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks.refresh_rate=3"]):
        fit = cli.main(["fit", *SMALL, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", *options])
        bars.append(fit.trainer.progress_bar_callback.refresh_rate)
    assert bars == [20, 3]


def test_a_profiler_that_is_asked_for_measures(run):
    for option, measures in (([], False), (["--trainer.profiler=simple"], True)):
        trainer = cli.main(["fit", *SMALL, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", *option]).trainer
        assert ("run_training_batch" in trainer.profiler.summary()) == measures


def test_the_published_protocol_trains_on_all_images_and_selects_nothing(run, data_dir):
    output = fit(run, "--data.val_size=0", "--data.test_each_epoch=true")
    assert [path.name for path in (data_dir / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    errors = [float(row["test_accuracy"]) for row in metrics(data_dir / "run" / "metrics.csv") if row["test_accuracy"]]
    tested = run(*output.split("python train.py ")[1].split(), *QUIET)
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
