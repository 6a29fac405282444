"""Trains a small DANN on as many CPU processes as asked for, and saves the weights of every rank."""

import functools
import sys

import pytorch_lightning as pl
import torch

from lightning_danns import DANNMLP, MNISTDataModule
from lightning_danns.testing import assert_dale

if __name__ == "__main__":
    folder, devices = sys.argv[1], int(sys.argv[2])
    pl.seed_everything(0, verbose=False)
    model = DANNMLP(hidden_sizes=[12], optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    data = MNISTDataModule(folder, batch_size=10, val_size=40)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert_dale(model)
    groups = [(group["name"], group["lr"]) for group in trainer.optimizers[0].param_groups]
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    torch.save(
        {"weights": model.state_dict(), "groups": groups, "metrics": metrics, "steps": trainer.global_step},
        f"{folder}/rank{trainer.global_rank}of{devices}.pt",
    )
