"""Fixtures shared by the tests: reference arrays, tiny data sets, a quiet Trainer."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

SMALL = ["--model", "DANNMLP", "--model.hidden_sizes=[12]", "--data", "MNISTDataModule", "--data.val_size=50"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="session")
def reference():
    """Arrays by key, computed in float64 by the authors' own release (see tests/README.md)."""
    with np.load(Path(__file__).with_name("dann_reference.npz")) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def images_and_labels(n, shape=(28, 28), seed=0):
    """``n`` uint8 images, each the pattern of its label in noise, so that there is something to learn."""
    patterns = 200 * (np.random.default_rng(1234).random((10, *shape)) < 0.15)
    labels = np.arange(n) % 10
    noise = np.random.default_rng(seed).integers(0, 30, (n, *shape))
    return (patterns[labels] + noise).astype(np.uint8), labels.astype(np.uint8)


def write_data(folder, name="mnist", n_train=200, n_test=60, shape=(28, 28)):
    """A small data file in the real layout."""
    x_train, y_train = images_and_labels(n_train, shape)
    x_test, y_test = images_and_labels(n_test, shape, seed=1)
    np.savez(folder / f"{name}.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


@pytest.fixture
def data_dir(tmp_path):
    """A folder with a small ``mnist.npz`` of random images."""
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer that writes nothing and runs on the CPU, unless told otherwise."""
    import pytorch_lightning as pl

    def make(**kwargs):
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**quiet, **kwargs})

    return make


@pytest.fixture
def run(data_dir, monkeypatch, capsys):
    """Runs the command line in this process, in a folder that holds a small data/mnist.npz."""
    import lightning_danns.cli as cli

    monkeypatch.chdir(data_dir)
    os.makedirs("data")
    shutil.copy("mnist.npz", "data")

    def run(*args, status=0):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        capsys.readouterr()
        if status == 0:
            cli.main()
        else:
            with pytest.raises(SystemExit) as exit_info:
                cli.main()
            assert exit_info.value.code == status
        out, err = capsys.readouterr()
        return out + err

    return run
