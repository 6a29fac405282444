"""Training that is killed and restarted ends as if nothing had happened, and no write costs an earlier checkpoint."""

import csv
import errno
import functools
import io
import os
import random
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import write_data
from processes import srun, start, wait
from torch import nn

import lightning_danns.cli as cli
from lightning_danns import DANNLinear, ImageClassifier
from lightning_danns.cli.checkpoints import AtomicCheckpointIO

EPOCHS, STEPS = 3, 10  # of 100 images in batches of 10


class Net(ImageClassifier):
    """Draws random numbers in every step, and kills its process where it is told to."""

    kill_at: tuple[int, float] | None = None  # step, seconds after its start
    signal_at: int | None = None  # step

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(
            nn.Flatten(), DANNLinear(3072, 12, 2, inputs="pixels"), nn.ReLU(), nn.Dropout(), DANNLinear(12, 10, 1)
        )

    def training_step(self, batch, batch_idx):
        if self.kill_at and self.global_step == self.kill_at[0]:
            threading.Timer(self.kill_at[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.global_step == self.signal_at and self.global_rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_idx)


class Stop(pl.Callback):
    """What max_time does, at a certain step."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 15


ARMS = {
    "momentum, steps down": [
        "--model.optimizer=SGD", "--model.optimizer.lr=0.05", "--model.optimizer.momentum=0.9",
        "--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=1",
    ],
    "natural gradient": ["--model.optimizer=lightning_danns.DiagonalNGD", "--model.correction=none"],
    "plateau, accumulation, workers": [
        "--model.lr_scheduler=pytorch_lightning.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=train_loss",
        "--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=9",
        "--model.lr_scheduler.factor=0.5", "--model.lr_scheduler.eps=0",
        "--trainer.accumulate_grad_batches=2", "--data.num_workers=2",
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path, "cifar10", n_train=120, shape=(32, 32, 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(run_dir, *args):
    cli.main([
        "fit", "--model=test_interruption.Net", "--data=CIFAR10DataModule", "--data.data_dir=.", "--data.augment=true",
        "--data.val_size=20", "--data.batch_size=10", "--seed_everything=1", f"--run_dir={run_dir}",
        "--ckpt_path=last", "--last_checkpoint.every_n_train_steps=2", "--trainer.accelerator=cpu",
        f"--trainer.max_epochs={EPOCHS}", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *args,
    ])  # fmt: skip


def killed(run_dir, args, *kill_at):
    """Fits in a child process until it is killed or has finished."""

    def work(rank):
        Net.kill_at = kill_at
        fit(run_dir, *args)

    wait(start(work, 1, lambda *_: {}))


def epochs(run_dir):
    """The logged metrics of each epoch; where an epoch was run twice, those of the second time."""
    logs = sorted(run_dir.glob("metrics*.csv"), key=lambda path: path.stat().st_mtime)
    rows = {}
    for path in logs:
        with open(path) as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["epoch"], {}).update({name: value for name, value in row.items() if value})
    return rows


def differences(one, other, path=""):
    """Where two nested structures differ in anything but paths and times."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [d for k, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}.{k}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [path]


def assert_run_equals_straight(folder, arm, *report, options=()):
    """Goes on with the interrupted ``run``, and compares its end with that of a run without interruption."""
    fit("run", *ARMS[arm], *options)
    fit("straight", *ARMS[arm], *options)
    straight, run = (torch.load(folder / name / "checkpoints" / "last.ckpt") for name in ("straight", "run"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert not differences(straight[part], run[part], part), report
    assert epochs(folder / "run") == epochs(folder / "straight"), report
    assert sorted(os.listdir(folder / "run" / "checkpoints")) == ["best.ckpt", "last.ckpt"], report


def assert_interruption_changes_nothing(folder, arm, kills, seed):
    """Interrupts a run at random points."""
    draw = random.Random(seed)
    steps = EPOCHS * STEPS // (2 if "accumulation" in arm else 1)
    points = sorted((draw.randrange(steps), draw.random() / 50) for _ in range(kills))
    print(f"{arm}: seed {seed}, killed in step, after seconds: {points}")
    for point in points:
        killed("run", ARMS[arm], *point)
    assert_run_equals_straight(folder, arm, seed, points)


@pytest.mark.parametrize("arm", ARMS)
def test_a_killed_run_ends_as_if_nothing_had_happened(folder, arm):
    assert_interruption_changes_nothing(folder, arm, kills=1, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(10))
@pytest.mark.parametrize("arm", ARMS)
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(folder, arm, repetition):
    assert_interruption_changes_nothing(folder, arm, kills=3, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.parametrize(
    ("arm", "stop", "options"),
    [
        ("momentum, steps down", "max_steps=15", []),
        ("plateau, accumulation, workers", "max_steps=7", []),
        ("momentum, steps down", "callbacks=test_interruption.Stop", []),
        ("momentum, steps down", "max_epochs=1", ["--trainer.reload_dataloaders_every_n_epochs=1"]),
    ],
)
def test_a_fit_that_was_told_to_stop_earlier_goes_on_exactly(folder, arm, stop, options):
    fit("run", *ARMS[arm], *options, f"--trainer.{stop}", "--last_checkpoint.every_n_train_steps=null")
    assert torch.load("run/checkpoints/last.ckpt")["global_step"] in (7, 10, 15)
    assert_run_equals_straight(folder, arm, options=options)


def test_a_fit_at_its_end_keeps_its_log(folder):
    result = None
    for _ in range(2):
        fit("run", "--trainer.max_epochs=1")
        assert [path.name for path in (folder / "run").glob("*.csv")] == ["metrics.csv"]
        kept = (folder / "run" / "result.yaml").read_text()
        assert "val_loss" in kept
        assert result in (None, kept)
        result = kept


@pytest.mark.parametrize(("moment", "left"), [("half written", 8), ("written", 8), ("renamed", 10)])
def test_death_while_saving_after_the_first_epoch_costs_nothing(folder, moment, left):
    """By then ``best.ckpt`` is there, of which the ``last.ckpt`` within the epoch knows nothing."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def step(path):
        return torch.load(path)["global_step"]

    def save_half(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        half = whole.tell() // 2
        file.write(whole.getvalue()[:half])
        if checkpoint["global_step"] == 10 and "last" in file.name:
            file.flush()
            die()
        file.write(whole.getvalue()[half:])

    def replace_and_die(partial, path):
        at_the_end = step(partial) == 10 and "last" in str(path)
        if at_the_end and moment == "written":
            die()
        replace(partial, path)
        if at_the_end:
            die()

    def interrupted(rank):
        if moment == "half written":
            torch.save = save_half
        else:
            os.replace = replace_and_die
        fit("run", *ARMS["natural gradient"])

    save, replace = torch.save, os.replace
    assert wait(start(interrupted, 1, lambda *_: {})) == [-9]
    checkpoints = folder / "run" / "checkpoints"
    partial = {".last.partial"} if moment != "renamed" else set()
    assert {path.name for path in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"} | partial
    assert step(checkpoints / "last.ckpt") == left
    assert_run_equals_straight(folder, "natural gradient")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert torch.load(path) == {"step": 1}


def test_what_a_killed_requeue_leaves_is_no_checkpoint(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: None)  # stands for death before it
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    trainer = make_trainer()
    AtomicCheckpointIO().save_checkpoint({}, trainer._checkpoint_connector.hpc_save_path(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    assert trainer._checkpoint_connector._hpc_resume_path is None


def test_a_checkpoint_is_never_written_in_place(folder, monkeypatch):
    """Not even where the folder for temporary files is on another disk, from which files can only be copied."""
    if os.stat("/dev/shm").st_dev == os.stat(folder).st_dev:
        pytest.skip("needs two file systems")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    fit("run", *ARMS["natural gradient"], "--trainer.max_epochs=1")
    os.link("run/checkpoints/last.ckpt", "before")  # another name for the same bytes
    fit("run", *ARMS["natural gradient"], "--trainer.max_epochs=2")
    assert torch.load("before")["global_step"] == STEPS
    assert torch.load("run/checkpoints/last.ckpt")["global_step"] == 2 * STEPS


@pytest.mark.parametrize("count", [1, 2])
def test_a_requeued_job_goes_on_exactly(folder, monkeypatch, count):
    """SLURM's signal comes to one process in the middle of a step, and its requeueing ends the processes."""
    (folder / "scontrol").write_text(f"#!/bin/sh\necho $@ > {folder}/scontrol.log\nkill -9 $PPID\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def job(rank, run_dir, signal_at=None):
        Net.signal_at = signal_at
        strategy = "ddp" if count > 1 else "auto"
        fit(run_dir, *ARMS["natural gradient"], "--ckpt_path=null", f"--trainer.devices={count}",
            f"--trainer.strategy={strategy}", "--trainer.max_epochs=4")  # fmt: skip

    # in the middle of an epoch, and in its last step, after which a checkpoint would cost the validation
    for signal_at in (12,) if count > 1 else (12, 19):
        statuses = wait(start(functools.partial(job, run_dir=f"run{signal_at}", signal_at=signal_at), count, srun))
        assert statuses[0] == -9
        assert (folder / "scontrol.log").read_text() == "requeue 41234\n"
        assert wait(start(functools.partial(job, run_dir=f"run{signal_at}"), count, srun)) == [0] * count
    assert wait(start(functools.partial(job, run_dir="straight"), count, srun)) == [0] * count
    straight = torch.load("straight/checkpoints/last.ckpt")
    for run in folder.glob("run*"):
        assert list(run.glob("hpc_ckpt_1.ckpt"))
        again = torch.load(run / "checkpoints" / "last.ckpt")
        assert not differences(straight["state_dict"], again["state_dict"])
        assert epochs(run).keys() == epochs(folder / "straight").keys()
