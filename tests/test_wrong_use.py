"""Wrong use, row by row: what is said, exit status 2, no traceback, and nothing left behind."""

import functools
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET, SMALL, write_data

import lightning_danns.cli as cli
from lightning_danns import (
    DANNMLP,
    DANNVGG,
    MLP,
    CIFAR10DataModule,
    ColumnEILinear,
    ColumnEIMLP,
    ConvNet,
    CosineStepControl,
    DaleModule,
    DANNConv2d,
    DANNLinear,
    DiagonalNGD,
    LayerGradientClipping,
    MNISTDataModule,
    UsageError,
    daleify,
    fisher_param_groups,
    project_,
)
from lightning_danns.data.files import read_arrays, write_arrays
from lightning_danns.layers import refuse_negative_inputs
from lightning_danns.optim import fisher_optimizer

FIT = ["fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir=run"]
TEST = ["test", *SMALL, *QUIET, "--run_dir=run"]
RESUME = ["fit", "--config=done/config.yaml", "--ckpt_path=last"]

OWN = """
import pytorch_lightning as pl
import torch
from lightning_danns import MNISTDataModule, UsageError
from lightning_danns.data import ImageDataset

class ThreeClasses(MNISTDataModule):
    num_classes = 3

class Normalised(MNISTDataModule):
    def setup(self, stage=None):
        super().setup(stage)
        for part in (self.train_set, self.val_set):
            part.__class__ = Centred

class Centred(ImageDataset):
    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        return (images - 0.1307) / 0.3081, labels

class Holes(MNISTDataModule):
    def setup(self, stage=None):
        super().setup(stage)
        self.train_set.__class__ = Punched

class Punched(ImageDataset):
    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        return images.masked_fill(images == images.max(), float("nan")), labels

class Late(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise UsageError("late")

class NoRate(torch.optim.Optimizer):
    def __init__(self, params, speed: float = 1.0):
        super().__init__(params, {"speed": speed})
"""


class Payload:
    """Unpickling it creates the file ``executed`` in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A folder with a small data set, a finished run, and files that are wrong in every way."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "data").mkdir()
    write_data(folder / "data")
    (folder / "own.py").write_text(OWN)
    (folder / "syntax.yaml").write_text("model: [DANNMLP\ntrainer: {")
    (folder / "typo.yaml").write_text("model: {class_path: DANNMLP, init_args: {hiden_sizes: [9]}}\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "date.yaml").write_text("data: {class_path: MNISTDataModule, init_args: {data_dir: 2026-02-30}}\n")
    (folder / "last_alone" / "checkpoints").mkdir(parents=True)
    (folder / "last_alone" / "checkpoints" / "last.ckpt").touch()
    (folder / "python.yaml").write_text("trainer: !!python/object/apply:os.mkdir [executed]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py"])
        for run in ("done", "uncorrected"):
            correction = [] if run == "done" else ["--model.correction=none"]
            cli.main([*FIT, f"--run_dir={run}", *correction])
    content = (folder / "done" / "checkpoints" / "last.ckpt").read_bytes()
    shutil.move(folder / "uncorrected" / "checkpoints" / "last.ckpt", folder / "uncorrected.ckpt")
    shutil.rmtree(folder / "uncorrected")
    (folder / "good.ckpt").write_bytes(content)
    (folder / "half.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "empty.ckpt").write_bytes(b"")
    shutil.copytree(folder / "done", folder / "halved")
    shutil.copy(folder / "half.ckpt", folder / "halved" / "checkpoints" / "last.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Payload()))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "callbacks": Payload()}, folder / "payload.ckpt")
    torch.save(DANNMLP(hidden_sizes=[12]).state_dict(), folder / "weights.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    return folder


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def workplace(materials, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(materials, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return folder


def options(*args):
    return [*FIT, *args]


COMMANDS = {
    # words
    "no subcommand": ([], 'expected "subcommand" to be one of {fit,validate,test,predict}'),
    "unknown subcommand": (["fitt"], "invalid choice: 'fitt'"),
    "command of its own": (["compare", "a.yaml"], "python -m lightning_danns.compare"),
    "no model": (["fit", "--data=MNISTDataModule"], "required: fit.model"),
    "no data": (["fit", "--model=DANNMLP"], "required: fit.data"),
    "misspelt group": (options("--tariner.max_epochs=3"), "unrecognized arguments: --tariner.max_epochs=3"),
    "misspelt trainer option": (options("--trainer.max_epoch=3"), "did you mean 'max_epochs' instead of 'max_epoch'"),
    "misspelt model argument": (options("--model.hidden_size=[9]"), "did you mean 'hidden_sizes' instead of"),
    "misspelt class": (options("--model=DANMLP"), "did you mean 'DANNMLP' instead of 'DANMLP'"),
    "misspelt data class": (options("--data=MNISTDatamodule"), "did you mean 'MNISTDataModule'"),
    "abbreviated option": (options("--trainer.max_ep=3"), "unrecognized arguments: --trainer.max_ep=3"),
    "a model that is none": (options("--model=torch.nn.Linear"), "not correspond to a subclass of LightningModule"),
    # config files
    "missing config": (options("--config=nosuch.yaml"), "nosuch.yaml"),
    "config of wrong syntax": (options("--config=syntax.yaml"), "config syntax.yaml: while parsing"),
    "config is a folder": (options("--config=data"), "not a file"),
    "config is not text": (options("--config=data/mnist.npz"), "can't decode byte"),
    "config is a list": (options("--config=list.yaml"), "Unexpected config: - 1"),
    "config with a typo": (["fit", "--config=typo.yaml"], "did you mean 'hidden_sizes' instead of 'hiden_sizes'"),
    "config that would execute": (options("--config=python.yaml"), "could not determine a constructor"),
    # sizes
    "too many interneurons": (options("--model.ni=13"), "ni=13"),
    "no interneuron": (options("--model.ni=0"), "ni=0"),
    "negative size": (options("--model.hidden_sizes=[-5]"), "hidden_sizes=[-5]"),
    "a date that is none": (options("--config=date.yaml"), "config date.yaml: day is out of range"),
    "best of a fit without validation": (
        ["test", *SMALL, *QUIET, "--ckpt_path=best", "--run_dir=last_alone"], "Use --ckpt_path last"
    ),
    "one size for a list": (options("--model.hidden_sizes=12"), "abc.Sequence'>. Got value: 12"),
    "image too small": (options("--model=DANNVGG"), "at least 32 x 32 pixels"),
    "image shape of other data": (options("--model.input_shape=[1,9,9]"), "input_shape=[1, 9, 9], but MNISTDataModule"),
    "classes of other data": (options("--model.num_classes=3"), "num_classes=3, but MNISTDataModule has"),
    "batch_size 0": (options("--data.batch_size=0"), "batch_size=0"),
    "half a batch": (options("--data.batch_size=1.5"), "Got value: 1.5"),
    "val_size is no number": (options("--data.val_size=many"), "Given value: many"),
    "val_size of all": (options("--data.val_size=200"), "val_size=200 leaves nothing"),
    "seed is no number": (options("--seed_everything=x"), "Expected a <class 'int'>"),
    "negative seed": (options("--seed_everything=-1"), "seed_everything=-1: give a seed from 0"),
    # optimizers
    "unknown correction": (options("--model.correction=fischer"), "correction='fischer'"),
    "unknown optimizer": (options("--model.optimizer=SDG"), "SDG"),
    "unknown scheduler": (options("--model.lr_scheduler=StepLRR"), "StepLRR"),
    "scheduler lacks an argument": (options("--model.lr_scheduler=StepLR"), "required: step_size"),
    "misspelt optimizer option": (options("--model.optimizer=SGD", "--model.optimizer.lrr=1"), "'lrr' is not accepted"),
    "optimizer without rate": (options("--model.optimizer=own.NoRate"), "NoRate has learning rate lr=None"),
    "negative rate": (options("--model.optimizer=SGD", "--model.optimizer.lr=-1"), "Invalid learning rate: -1"),
    "rate that is a word": (options("--model.optimizer=SGD", "--model.optimizer.lr=fast"), "fast"),
    "rate that is no number": (options("--model.optimizer=SGD", "--model.optimizer.lr=.nan"), "learning rate lr=nan"),
    "diverging rate": (options("--model.optimizer=SGD", "--model.optimizer.lr=1e30"), "lower the learning rate"),
    "optimizer without groups": (options("--model.optimizer=LBFGS"), "LBFGS doesn't support per-parameter options"),
    "factors twice": (options("--model.optimizer=lightning_danns.DiagonalNGD"), "use correction='none'"),
    "absolute scheduler": (
        options("--model.lr_scheduler=CyclicLR", "--model.lr_scheduler.base_lr=1", "--model.lr_scheduler.max_lr=2"),
        "CyclicLR set learning rates that destroy",
    ),
    "optimizer past the groups": (options("--optimizer=Adam"), "--model.optimizer"),
    "scheduler past the groups": (options("--lr_scheduler=StepLR"), "--model.lr_scheduler"),
    # Trainer
    "unknown accelerator": (options("--trainer.accelerator=quantum"), "quantum"),
    "absent GPUs": (options("--trainer.accelerator=gpu", "--trainer.devices=4"), "gpu"),
    "no device": (options("--trainer.devices=0"), "devices='0'"),
    "device is no number": (options("--trainer.devices=two"), "`devices` selected with `CPUAccelerator`"),
    "unknown strategy": (options("--trainer.strategy=dpp"), "strategy='dpp'"),
    "unknown precision": (options("--trainer.precision=12"), "trainer.precision"),
    "accumulation of nothing": (options("--trainer.accumulate_grad_batches=0"), "accumulate_grad_batches=0"),
    "no batches": (options("--trainer.limit_train_batches=0"), "nothing was trained"),
    "no epochs": (options("--trainer.max_epochs=0"), "nothing was trained"),
    "half a batch more": (options("--trainer.limit_train_batches=1.5"), "1.5 for limit_train_batches"),
    "validation too rare": (options("--trainer.val_check_interval=1000"), "but an epoch has 5 batches"),
    "unknown monitor": (options("--best_checkpoint.monitor=val_acuracy"), "Give --best_checkpoint.mode"),
    "unknown monitor and its mode": (
        options("--best_checkpoint.monitor=val_acuracy", "--best_checkpoint.mode=max"), "monitor='val_acuracy' was not"
    ),
    "unknown callback": (options("--trainer.callbacks=NoSuch"), "NoSuch"),
    "wrong callback argument": (
        options("--trainer.callbacks+=LayerGradientClipping", "--trainer.callbacks.max_norm=0"), "max_norm=0"
    ),
    # data
    "data below a file": (options("--data.data_dir=good.ckpt/x"), "cannot make the folder good.ckpt/x"),
    "labels beyond the classes": (options("--data=own.ThreeClasses"), "labels from 0 to 9"),
    "normalised images": (options("--data=own.Normalised"), "an input of -0.4242"),
    "images with nan": (options("--data=own.Holes"), "or the data hold nan"),
    "orders for replicas": (options("--data.order_seed=[0,1]"), "list of order_seed"),
    # checkpoints
    "missing checkpoint": (options("--ckpt_path=nosuch.ckpt"), "nosuch.ckpt does not exist"),
    "empty checkpoint": (options("--ckpt_path=empty.ckpt"), "empty.ckpt cannot be read"),
    "half a checkpoint": (options("--ckpt_path=half.ckpt"), "half.ckpt cannot be read"),
    "no checkpoint at all": (options("--ckpt_path=data/mnist.npz"), "mnist.npz cannot be read"),
    "checkpoint that would execute": (options("--ckpt_path=payload.ckpt"), "holds more than weights and plain values"),
    "pickle that would execute": (options("--ckpt_path=pickle.ckpt"), "pickle.ckpt cannot be read"),
    "tested payload": ([*TEST, "--ckpt_path=payload.ckpt"], "holds more than weights and plain values"),
    "checkpoint is a folder": (options("--ckpt_path=data"), "Is a directory"),
    "weights alone": (options("--ckpt_path=weights.ckpt"), "no checkpoint of a Lightning module"),
    "a list": ([*TEST, "--ckpt_path=list.ckpt"], "no checkpoint of a Lightning module"),
    "checkpoint of nothing": ([*TEST, "--ckpt_path=best"], "best.ckpt does not exist"),
    "best of no run": (["test", *SMALL, *QUIET, "--ckpt_path=best"], "Give its --run_dir"),
    "fit of nothing": (options("--ckpt_path=best"), "best.ckpt does not exist"),
    "checkpoint of another class": ([*TEST, "--model=MLP", "--ckpt_path=good.ckpt"], "another network than this MLP"),
    "checkpoint of another network": (options("--ckpt_path=good.ckpt", "--model.hidden_sizes=[13]"), "(13, 784) here"),
    "resumed otherwise": ([*RESUME, "--model.hidden_sizes=[13]"], "(13, 784) here and (12, 784) there"),
    "resumed without balance": ([*RESUME, "--model.balanced=false"], "has balanced=True, here it has balanced=False"),
    "resumed with another eps": ([*RESUME, "--model.eps=1"], "has eps=0.3, here it has eps=1.0"),
    "resumed without factors": ([*RESUME, "--model.correction=none"], "7 groups there, 1 here"),
    "resumed with factors": (options("--ckpt_path=uncorrected.ckpt"), "1 groups there, 7 here"),
    "resumed with Adam": ([*RESUME, "--model.optimizer=Adam", "--model.optimizer.lr=0.1"], "no amsgrad, betas"),
    "resumed from half": (["fit", "--config=halved/config.yaml", "--ckpt_path=last"], "last.ckpt cannot be read"),
    "resumed on nothing": ([*RESUME, "--trainer.accelerator=quantum"], "quantum"),
    # output
    "used folder": (["fit", "--config=done/config.yaml", "--run_dir=done"], "holds the checkpoints of an earlier fit"),
    # classes of other libraries that the config names
    "logger that is not installed": (options("--trainer.logger=WandbLogger"), "wandb"),
    "callback that lacks a package": (options("--trainer.callbacks=RichModelSummary"), "requires `rich`"),
    "early stopping on nothing": (
        options("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_acuracy"),
        "EarlyStopping: monitor='val_acuracy' was not logged; these were: val_accuracy, val_loss",
    ),
    "early stopping on no training metric": (
        options("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=train_lss"), "monitor='train_lss' was"
    ),
    "early stopping without validation": (
        options("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss", "--data.val_size=0"),
        "EarlyStopping: monitor='val_loss' was not logged",
    ),
    "checkpoint of no metric": (
        options("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_acuracy"), "ModelCheckpoint"
    ),
    "timer": (options("--trainer.callbacks=Timer", "--trainer.callbacks.duration=x"), "not a valid duration"),
    "rate finder": (options("--trainer.callbacks=LearningRateFinder"), "python -m lightning_danns.sweep"),
    "pruning": (
        options(
            "--trainer.callbacks=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured",
            "--trainer.callbacks.amount=0.5",
        ),
        "ModelPruning computes weights anew",
    ),
    "weight averaging of one rate": (
        options("--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"), "EMAWeight"
    ),
    "finetuning without backbone": (options("--trainer.callbacks=BackboneFinetuning"), "lightning_danns.Unfreeze"),
    "schedule with a floor": (
        options(
            "--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=5", "--model.lr_scheduler.eta_min=0.1"
        ),
        "lightning_danns.WarmupCosine (with a floor",
    ),
    "optimizer with another's rate": (
        ["fit", "--config=done/config.yaml", "--run_dir=run", "--model.optimizer=AdamW"],
        "AdamW would take lr=0.1 over from torch.optim.SGD in done/config.yaml: give --model.optimizer.lr",
    ),
    "unknown profiler": (options("--trainer.profiler=nosuch"), "profiler"),
    "run below a file": (options("--run_dir=good.ckpt/run"), "good.ckpt"),
    "run is a file": (options("--run_dir=good.ckpt"), "good.ckpt"),
    "run where nothing can be written": (options("--run_dir=/proc/run"), "/proc/run"),
    "predictions of two processes": (["predict", *TEST[1:], "--trainer.devices=2"], "--trainer.devices=1"),
    "nothing to predict": (
        ["predict", *TEST[1:], "--ckpt_path=good.ckpt", "--trainer.limit_predict_batches=0"], "nothing to write"
    ),
}  # fmt: skip


FOUND_IN_TRAINING = {
    "diverging rate",
    "images with nan",
    "orders for replicas",
    "early stopping on no training metric",
    "early stopping without validation",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_refused_in_a_few_lines_and_leaves_nothing_behind(name, workplace, capsys):
    if name == "absent GPUs" and torch.cuda.is_available():
        pytest.skip("they are there")
    args, message = COMMANDS[name]
    before = tree(workplace)
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert name != "unknown subcommand" or "did you mean" not in error
    assert "Traceback" not in error
    assert len(error[error.index("error: ") :].splitlines()) <= 8
    after = tree(workplace)
    if name in FOUND_IN_TRAINING:  # nothing that a run wrote is deleted
        assert {path.parts[0] for path in after.keys() - before.keys()} == {"run"}
        after = {path: content for path, content in after.items() if path.parts[0] != "run"}
    assert after == before


def test_a_fit_that_is_refused_after_its_first_checkpoint_keeps_what_it_has(workplace):
    with pytest.raises(SystemExit, match="2"):
        cli.main(options("--trainer.max_epochs=3", "--trainer.callbacks+=own.Late"))
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in Path("run").iterdir()}
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 0


def test_what_others_write_meanwhile_stays(workplace):
    (workplace / "meanwhile.py").write_text(
        "import pathlib\n"
        "from lightning_danns import MNISTDataModule, UsageError\n"
        "class Meanwhile(MNISTDataModule):\n"
        "    def setup(self, stage=None):\n"
        "        pathlib.Path('run/other').mkdir(parents=True)\n"
        "        pathlib.Path('run/results.csv').write_text('1')\n"
        "        pathlib.Path('run/events.out.tfevents.1.machine.0.0').write_text('those of another process')\n"
        "        raise UsageError('refused')\n"
    )
    with pytest.raises(SystemExit, match="2"):
        cli.main(options("--data=meanwhile.Meanwhile"))
    assert {path.name for path in Path("run").iterdir()} == {
        *("other", "results.csv", "events.out.tfevents.1.machine.0.0")
    }


def assert_whole(folder, before):
    """Checkpoints and predictions are those of before: no other, none changed, none partly written."""

    def heavy(files):
        return {path: content for path, content in files.items() if path.suffix in (".ckpt", ".npz", ".partial")}

    assert heavy(tree(folder)) == heavy(before)
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("command", ["fit", "resume", "predict"])
def test_a_full_disk_leaves_no_checkpoint_half_written_and_costs_none(command, workplace, capsys):
    args = {"fit": FIT, "resume": [*RESUME, "--trainer.max_epochs=2"], "predict": ["predict", *TEST[1:]]}[command]
    before, limits = tree(workplace), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if command == "predict" else 20_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 2
    assert "error: [Errno 27] File too large" in capsys.readouterr().err
    assert_whole(workplace, before)


def test_a_real_process_ends_with_status_2_and_no_traceback(workplace):
    before = tree(workplace)
    script = Path(__file__).parents[1] / "train.py"
    command = ["bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", sys.executable, script, *FIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert_whole(workplace, before)


@pytest.mark.parametrize("fault", ["raise ValueError('a fault')", "try: open('none')\n        except OSError: 1 / 0"])
def test_a_programming_error_keeps_its_traceback(fault, workplace):
    (workplace / f"faulty{len(fault)}.py").write_text(
        "from lightning_danns import MNISTDataModule\n"
        "class Faulty(MNISTDataModule):\n"
        "    def prepare_data(self):\n"
        f"        {fault}\n"
    )
    with pytest.raises((ValueError, ZeroDivisionError), match=r"a fault|division"):
        cli.main(options(f"--data=faulty{len(fault)}.Faulty"))


def test_testing_without_a_checkpoint_says_so(workplace, capsys):
    cli.main(TEST)
    assert "warning: no --ckpt_path" in capsys.readouterr().err


def test_a_payload_from_the_network_is_not_executed(workplace, capsys):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=workplace)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = tree(workplace)
        with pytest.raises(SystemExit, match="2"):
            cli.main(options(f"--ckpt_path=http://127.0.0.1:{server.server_port}/payload.ckpt"))
        server.shutdown()
    assert "error: Weights only load failed" in capsys.readouterr().err
    assert tree(workplace) == before


def test_payloads_are_real_and_safe_loading_runs_none(workplace):
    with pytest.raises(pickle.UnpicklingError):
        DANNMLP.load_from_checkpoint("payload.ckpt")
    assert not Path("executed").exists()
    torch.load("payload.ckpt", weights_only=False)
    assert Path("executed").exists()


ARRAYS = {
    "x_train": np.zeros((20, 28, 28), np.uint8), "y_train": np.arange(20) % 10,
    "x_test": np.zeros((10, 28, 28), np.uint8), "y_test": np.arange(10),
}  # fmt: skip
FILES = {  # arrays that differ (None: missing) or the damage done to the file's bytes
    "keys missing": ({"y_test": None}, "lacks y_test"),
    "other keys": ({"x_test": None, "y_test": None, "images": np.zeros(3)}, "lacks x_test, y_test; it has"),
    "float images": ({"x_train": np.zeros((20, 28, 28))}, "x_train.*float64.*uint8"),
    "negative images": ({"x_train": np.full((20, 28, 28), -1, np.int8)}, "x_train.*int8.*from 0 to 255"),
    "images with nan": ({"x_test": np.full((10, 28, 28), np.nan)}, "x_test.*float64.*uint8"),
    "images of another size": ({"x_train": np.zeros((20, 32, 32), np.uint8)}, r"x_train.*\(20, 32, 32\).*N x 28 x 28"),
    "flat images": ({"x_train": np.zeros((20, 784), np.uint8)}, r"x_train.*\(20, 784\).*N x 28 x 28"),
    "colour images": ({"x_train": np.zeros((20, 28, 28, 3), np.uint8)}, r"x_train.*\(20, 28, 28, 3\)"),
    "no images": ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, int)}, "x_test.*N > 0"),
    "one array for all": ({"x_train": np.uint8(3)}, r"x_train.*shape \(\)"),
    "labels missing": ({"y_train": np.zeros(19, np.uint8)}, r"y_train.*\(19,\) for 20 images"),
    "one-hot labels": ({"y_train": np.zeros((20, 10), np.uint8)}, r"y_train.*\(20, 10\) for 20 images"),
    "float labels": ({"y_train": np.zeros(20)}, "y_train.*float64.*integers"),
    "labels too large": ({"y_train": np.full(20, 10)}, "y_train.*from 10 to 10.*from 0 to 9"),
    "negative labels": ({"y_test": np.full(10, -1)}, "y_test.*from -1"),
    "objects": ({"x_train": np.array([{}] * 20, dtype=object)}, "not a readable"),
    "payload": ({"y_train": np.array([Payload()] * 20, dtype=object)}, "not a readable"),
    "empty file": (lambda content: b"", "not a readable"),
    "text": (lambda content: b"not a zip file", "not a readable"),
    "a pickle": (lambda content: pickle.dumps(Payload()), "not a readable"),
    "half a file": (lambda content: content[: len(content) // 2], "not a readable"),
    "cut at its end": (lambda content: content[:-100], "not a readable"),
    "one bit flipped": (lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:], "not a readable"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_data_file_is_refused_by_path_array_and_value(name, tmp_path, monkeypatch):
    change, message = FILES[name]
    monkeypatch.chdir(tmp_path)
    arrays = ARRAYS | (change if isinstance(change, dict) else {})
    np.savez("mnist.npz", **{key: value for key, value in arrays.items() if value is not None})
    path = tmp_path / "mnist.npz"
    if not isinstance(change, dict):
        path.write_bytes(change(path.read_bytes()))
    before = tree(tmp_path)
    module = MNISTDataModule(".", val_size=5)
    module.prepare_data()
    with pytest.raises(UsageError, match=rf"mnist\.npz.*{message}|{message}"):
        module.setup()
    assert tree(tmp_path) == before


def relu_network():
    return torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU())


class Unknown(DaleModule):
    def lr_factors(self):
        return {"W": 1.0}


LAYER = DANNLinear(9, 6, 2)
CALLS = {
    "DANNLinear without inputs": (lambda: DANNLinear(0, 5, 1), "in_features=0"),
    "DANNLinear without units": (lambda: DANNLinear(6, 0, 1), "ne=0"),
    "DANNLinear, negative": (lambda: DANNLinear(6, -4, 1), "ne=-4"),
    "DANNLinear, ni > ne": (lambda: DANNLinear(6, 5, 6), "ni=6.*ne=5"),
    "DANNLinear, inputs": (lambda: DANNLinear(6, 5, 1, inputs="pixel"), "inputs='pixel'"),
    "DANNLinear, inhibition": (lambda: DANNLinear(6, 5, 1, inhibition="median"), "inhibition='median'"),
    "DANNLinear, images": (lambda: LAYER(torch.rand(2, 1, 28, 28)), r"\(2, 1, 28, 28\).*9 features"),
    "DANNLinear, bytes": (lambda: LAYER(torch.zeros(2, 9, dtype=torch.uint8)), "uint8.*floating-point"),
    "DANNConv2d, channels": (lambda: DANNConv2d(3, 8, 2, 3)(torch.rand(2, 1, 8, 8)), r"\(2, 1, 8, 8\).*\(N, 3, H, W\)"),
    "DANNConv2d, small image": (lambda: DANNConv2d(3, 8, 2, 5)(torch.rand(2, 3, 4, 4)), "extends over 5 pixels"),
    "DANNConv2d, groups": (lambda: DANNConv2d(3, 8, 2, 3, groups=2), "groups=2"),
    "DANNConv2d, stride": (lambda: DANNConv2d(3, 8, 2, 3, stride=0), "stride=0"),
    "ColumnEILinear, ni": (lambda: ColumnEILinear(6, 5, 6), "ni=6"),
    "ColumnEILinear, centre": (lambda: ColumnEILinear(6, 5, 0, bias=False).centre_(0.1), "bias=True"),
    "negative inputs": (lambda: (refuse_negative_inputs(LAYER), LAYER(-torch.rand(2, 9))), "must be >= 0"),
    "DANNMLP, ni": (lambda: DANNMLP(hidden_sizes=[8, 8], ni=[5]), r"ni=\[5\] has 1 entries for the 2 hidden layers"),
    "DANNMLP, zero": (lambda: DANNMLP(hidden_sizes=[8, 0]), r"hidden_sizes=\[8, 0\]"),
    "DANNMLP, classes": (lambda: DANNMLP(num_classes=0), "num_classes=0"),
    "DANNMLP, correction": (lambda: DANNMLP(correction="fishr"), "correction='fishr'"),
    "DANNMLP, optimizer": (lambda: DANNMLP(optimizer="SGD"), "optimizer='SGD'"),
    "DANNMLP, other images": (lambda: DANNMLP()(torch.rand(2, 1, 32, 32)), r"\(2, 1024\).*784 features"),
    "MLP, norm": (lambda: MLP(norm="nosuch"), "norm='nosuch'"),
    "ConvNet, norm": (lambda: ConvNet(norm="layer"), "norm='layer'"),
    "ColumnEIMLP, ratio": (lambda: ColumnEIMLP(ratio=0), "ratio=0"),
    "DANNVGG, depth": (lambda: DANNVGG(depth=17), "depth=17"),
    "DANNVGG, dropout": (lambda: DANNVGG(input_shape=(3, 32, 32), dropout=1.5), "dropout=1.5"),
    "data, batch_size": (lambda: MNISTDataModule(batch_size=0), "batch_size=0"),
    "data, val_size": (lambda: MNISTDataModule(val_size=-1), "val_size=-1"),
    "data, split_seed": (lambda: CIFAR10DataModule(split_seed=2**63), "split_seed=9223372036854775808"),
    "data, num_workers": (lambda: MNISTDataModule(num_workers=-1), "num_workers=-1"),
    "data, missing": (lambda: read_arrays(Path("no.npz"), (1, 28, 28), 10), "no.npz does not exist"),
    "data, too early": (lambda: MNISTDataModule().train_dataloader(), r"call prepare_data\(\) and setup\(\)"),
    "data, below a file": (lambda: write_arrays(Path("/dev/null/x.npz"), {}), "cannot make the folder /dev/null"),
    "factors, correction": (lambda: fisher_param_groups(LAYER, "fischer"), "'fischer'"),
    "factors, nothing to train": (lambda: fisher_param_groups(torch.nn.ReLU()), "no trainable parameter"),
    "factors, unknown": (lambda: fisher_param_groups(Unknown()), r"Unknown.lr_factors\(\) names 'W'"),
    "factors, negative": (lambda: fisher_param_groups(LAYER, {"Wei": -1}), "Wei is -1"),
    "optimizer, not one": (lambda: fisher_optimizer(lambda groups: 3, fisher_param_groups(LAYER)), "made a int"),
    "optimizer, lacks lr": (
        lambda: fisher_optimizer(functools.partial(torch.optim.SGD, speed=1), fisher_param_groups(LAYER)), "speed"
    ),
    "DiagonalNGD, decay": (lambda: DiagonalNGD(LAYER.parameters(), decay=2), "decay=2"),
    "DiagonalNGD, factors": (lambda: DiagonalNGD(fisher_param_groups(LAYER)), "use correction='none'"),
    "LayerGradientClipping": (lambda: LayerGradientClipping(float("nan")), "max_norm=nan"),
    "CosineStepControl": (lambda: CosineStepControl(-0.1), "epsilon=-0.1"),
    "daleify, fraction": (lambda: daleify(relu_network(), torch.rand(3, 9), fraction=2), "fraction=2"),
    "daleify, ni": (lambda: daleify(relu_network(), torch.rand(3, 9), ni={"fc": 1}), "'fc' is no Linear"),
    "pruned weights": (
        lambda: project_(torch.nn.utils.prune.l1_unstructured(DANNLinear(9, 6, 2), "Wex", 3)), "no parameter of its own"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_refused_by_value(name):
    call, message = CALLS[name]
    with pytest.raises(UsageError, match=message):
        call()
