"""Every config in the repository runs through the real command line, on small files."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_data
from torch import nn

import lightning_danns.cli as cli

CONFIGS = Path(__file__).parents[1] / "configs"
ARMS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("trainer", "recipes"))
KMNIST = [path for path in ARMS if path.parent.name == "kmnist"]
SMALL = [path for path in ARMS if path.parent.name != "imagenet" and path not in KMNIST[1:]]
OVERLAYS = sorted((CONFIGS / "trainer").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
EIGHT = {"mlp", "layernorm", "batchnorm", "dann_mlp", "dann_uncorrected", "dann_subtractive", "column_ei", "dann_ngd"}


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("mnist", "fashion_mnist", "kmnist"):
        write_data(folder, name)
    write_data(folder, "cifar10", shape=(32, 32, 3))
    return folder


def name_of(path):
    return str(path.relative_to(CONFIGS))


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    return cli.main()


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_a_config_runs(path, small_files, tmp_path, monkeypatch):
    options = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    data = [f"--data.data_dir={small_files}", "--data.val_size=20", "--data.batch_size=4"]
    finished = run(monkeypatch, "fit", f"--config={path}", *options, *data, f"--run_dir={tmp_path / 'run'}")
    assert finished.trainer.global_step == 1
    assert finished.trainer.callback_metrics["train_loss"].isfinite()


@pytest.mark.parametrize("path", KMNIST, ids=name_of)
def test_an_arm_of_kmnist_is_that_of_fashion_mnist_on_other_data(path):
    twin = (CONFIGS / "fashion_mnist" / path.name).read_text()
    twin = twin.replace("FashionMNISTDataModule", "KMNISTDataModule")
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(twin)


@pytest.mark.parametrize("path", [path for path in ARMS if path.stem in EIGHT and "dann" in path.stem], ids=name_of)
def test_the_arms_of_the_paper_are_not_balanced(path):
    assert yaml.safe_load(path.read_text())["model"]["init_args"]["balanced"] is False


def test_all_recipes_together_run(small_files, tmp_path, monkeypatch):
    def in_place(network, backend, **options):
        assert backend == "inductor"  # which needs a compiler of C++
        compiled.append(options)

    compiled = []
    monkeypatch.setattr(nn.Module, "compile", in_place)
    configs = [f"--config={path}" for path in (CONFIGS / "cifar10" / "dann_convnet.yaml", *RECIPES)]
    data = [f"--data.data_dir={small_files}", "--data.val_size=20", "--data.batch_size=16"]
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    finished = run(monkeypatch, "fit", *configs, *data, *options, f"--run_dir={tmp_path / 'run'}")
    assert finished.trainer.callback_metrics["val_loss"].isfinite()
    assert compiled == [{"dynamic": False}]


def settings(monkeypatch, capsys, *configs):
    args = [argument for path in configs for argument in ("--config", path)]
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", *args, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", [path for path in ARMS if path.parent.name == "imagenet"], ids=name_of)
def test_a_config_of_large_data_is_understood(path, monkeypatch, capsys):
    assert settings(monkeypatch, capsys, path)["model"]["init_args"]["depth"] == 18


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name_of)
def test_an_overlay_changes_the_trainer_and_nothing_else(overlay, monkeypatch, capsys):
    base = CONFIGS / "mnist" / "dann_mlp.yaml"
    plain, laid_over = settings(monkeypatch, capsys, base), settings(monkeypatch, capsys, base, overlay)
    wanted = yaml.safe_load(overlay.read_text())["trainer"]
    for key, value in wanted.items():
        got = laid_over["trainer"][key]
        assert got["class_path"] == value["class_path"] if isinstance(value, dict) else got == value
    assert {**laid_over, "trainer": None} == {**plain, "trainer": None}


@pytest.mark.parametrize("path", [*ARMS, *OVERLAYS, *RECIPES, CONFIGS / "quickstart.yaml"], ids=name_of)
def test_a_config_opens_with_what_how_and_expectation(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("#   python train.py fit --config configs/")
    assert name_of(path) in lines[1]
    if path in ARMS:
        assert lines[2].startswith("# Expect: ")


def test_every_data_set_of_digits_has_every_arm():
    for folder in ("mnist", "fashion_mnist", "kmnist"):
        assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} >= EIGHT
