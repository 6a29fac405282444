"""Every script of examples/ runs as its docstring says, learns, and keeps Dale's principle."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_data

from lightning_danns import DANNMLP, ImageDataModule, assert_dale

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The main function of a script, in a folder of its own that holds a small mnist.npz."""
    write_data(tmp_path, n_train=530)
    monkeypatch.setattr(ImageDataModule, "default_val_size", 50)
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_and_says_how_to_run_it(script):
    text = (EXAMPLES / script).read_text()
    docstring = ast.get_docstring(ast.parse(text))
    commands = re.findall(r"python examples/(\S+)", docstring)
    assert commands[0] == script
    assert set(commands) == {script}
    assert len(text.splitlines()) <= 80
    options = set(re.findall(r"--(\w+)", "".join(docstring.partition("lightning-danns")[0])))
    arguments = next(f for f in ast.parse(text).body if getattr(f, "name", "") == "main").args.args
    assert options <= {argument.arg for argument in arguments}


def test_every_example_is_run_here():
    assert {name for name in re.findall(r'main\("(\w+)"\)', Path(__file__).read_text())} | {"plain_torch"} == {
        Path(script).stem for script in SCRIPTS
    }


def test_the_plain_loop_runs_from_any_folder_on_images_that_need_no_download(tmp_path):
    command = [sys.executable, str(EXAMPLES / "plain_torch.py"), "--epochs=2", "--width=20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(float, row)) for row in re.findall(r"loss ([\d.]+), accuracy ([\d.]+)", done.stdout)]
    assert rows[1][0] < rows[0][0] < 2.3
    assert rows[1][1] > 0.8


def test_a_layer_of_ones_own_learns_in_balance(main):
    model, trainer = main("own_layer")(data_dir=".", epochs=3, width=30)
    assert trainer.callback_metrics["val_accuracy"] > 0.5
    hidden = model.network[1]
    totals = hidden.balance()
    assert totals.inhibition.allclose(totals.excitation, rtol=1e-4)
    x = hidden.Wex.new_full((1, 784), 0.7)  # a uniform input leaves the bias
    assert hidden(x)[0].allclose(hidden.b, atol=1e-3)
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["network.1.Wei"] == pytest.approx(0.1 / 784)


def test_an_autoencoder_explains_variance_of_its_images(main):
    model, trainer = main("autoencoder")(data_dir=".", epochs=12)
    assert trainer.callback_metrics["test_r2"] > 0.2
    assert_dale(model)


def test_a_regression_explains_variance_of_a_table(main, tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 3))
    table = np.column_stack([x, x[:, 0] - 2 * x[:, 1]])
    np.savetxt(tmp_path / "my.csv", table, delimiter=",", header="a,b,c,target", comments="")
    model, trainer = main("regression")(table="my.csv", epochs=15)
    assert trainer.callback_metrics["val_r2"] > 0.5
    assert_dale(model)


def test_a_recurrent_network_tells_images_by_their_rows(main):
    model, trainer = main("rows")(data_dir=".", epochs=4, n=30)
    assert trainer.callback_metrics["test_accuracy"] > 0.5
    assert_dale(model)


def test_a_network_becomes_a_dann_without_a_change_of_outputs_and_learns_other_classes(main):
    model, trainer, difference = main("finetuning")(data_dir=".", epochs=4)
    assert difference < 1e-4
    assert trainer.callback_metrics["val_accuracy"] > 0.6
    assert_dale(model)


def test_replicas_of_all_seeds_learn_and_the_best_reloads(main, tmp_path):
    model = main("seeds")(data_dir=".", epochs=2, width=20, seeds=(0, 1), learning_rates=(0.05, 0.1))
    last = [row for row in model.history if row["epoch"] == 1]
    assert sorted((row["seed"], row["learning_rate"]) for row in last) == [(0, 0.05), (0, 0.1), (1, 0.05), (1, 0.1)]
    assert all(row["val_accuracy"] > 0.5 for row in last)
    assert_dale(DANNMLP.load_from_checkpoint(tmp_path / "runs" / "best.ckpt"))
