"""A long run in small: what must not grow with the number of steps does not."""

import csv
import os
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import lightning_danns.cli as cli
from lightning_danns import ImageDataModule
from lightning_danns.testing import assert_dale

EPOCHS, STEPS = 100, 1000


class Tiny(ImageDataModule):
    dataset, image_shape, num_classes = "tiny", (1, 4, 4), 4


class Watch(pl.Callback):
    """Memory in MB and open files of this process after each epoch."""

    def __init__(self):
        self.memory, self.files = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.slow
def test_a_hundred_thousand_steps_leave_memory_files_and_logs_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 8400), ("test", 10)):
        arrays[f"x_{part}"] = draw.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        arrays[f"y_{part}"] = arrays[f"x_{part}"][:, :2, :2].max((1, 2)) // 64
    np.savez("tiny.npz", **arrays)
    begun = time.monotonic()
    made = cli.main([
        "fit", "--model=DANNMLP", "--model.hidden_sizes=[8]", "--data=test_soak.Tiny", "--data.data_dir=.",
        "--data.batch_size=8", "--data.val_size=400", "--run_dir=run", f"--trainer.max_epochs={EPOCHS}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks=test_soak.Watch",
        "--last_checkpoint.every_n_train_steps=300",
    ])  # fmt: skip
    seconds = time.monotonic() - begun
    watch = next(callback for callback in made.trainer.callbacks if isinstance(callback, Watch))
    print(f"\n{made.trainer.global_step / seconds:.0f} steps/s; memory {watch.memory[0]:.1f} MB after the first epoch, "
          f"{watch.memory[9]:.1f} after the tenth, {watch.memory[-1]:.1f} at the end; files {watch.files[0]}, "
          f"{watch.files[-1]}")  # fmt: skip
    assert made.trainer.global_step == EPOCHS * STEPS
    assert watch.memory[-1] - watch.memory[9] < 2
    assert watch.files[-1] == watch.files[0]
    with open("run/metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * EPOCHS  # one row of validation, one of training
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert sum(path.stat().st_size for path in Path("run").rglob("*")) < 2**20
    assert_dale(made.model)
    assert all(torch.isfinite(parameter).all() for parameter in made.model.parameters())
