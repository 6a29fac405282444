"""What in balance does it: the parts of balanced inhibition one by one, in a convolutional network of seven layers.

    python benchmarks/balance.py FOLDER [--variants published balanced ...] [--rates 0.03 0.1] [--seed 0]

FOLDER holds CIFAR-10 as `CIFAR10DataModule` reads it. Six 3x3 convolutions (32, 32, 64, 64, 128, 128) and 128 units
see 10 000 training images, averaged to 16 x 16 pixels, for 3 epochs in batches of 32 at a constant rate. Printed: error
in % on 5 000 held-out training images of the last weights and of averaged ones (0.99 a step); loss of the last epoch.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_danns import CIFAR10DataModule, DANNConv2d, DANNLinear, fisher_param_groups, project_
from lightning_danns.layers import dale_layers
from lightning_danns.layers.dale import total
from lightning_danns.networks import DANNFamily, StandardFamily, cnn

EPOCHS, BATCH, TRAIN, HELD_OUT = 3, 32, 10_000, 5_000


class BalancedForward:
    """Balance of the subtraction alone, in the forward pass: z = g (z_e - S / I Wei z_i) / gamma + b.

    Division is left as it is, so z keeps depending on the scale of a row of Wex.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        z_i = self._drive(x, self.Wix)
        subtraction = self._inhibit(self.in_balance(), z_i)
        gamma = self._inhibit(self.Wei, self._per_unit(self.alpha.exp()) * z_i) + self.eps
        drive = self._drive(x, self.Wex) - subtraction
        return self._per_unit(self.g) * drive / gamma + self._per_unit(self.b)


class ForwardConv2d(BalancedForward, DANNConv2d):
    pass


class ForwardLinear(BalancedForward, DANNLinear):
    pass


class BalancedAfter:
    """Balance after each step alone: gradients are those of Wei as it is, which the next balance partly undoes."""

    def in_balance(self: Any) -> Tensor:
        return self.Wei


class AfterConv2d(BalancedAfter, DANNConv2d):
    pass


class AfterLinear(BalancedAfter, DANNLinear):
    pass


class ForwardFamily(DANNFamily):
    Linear, Conv2d = ForwardLinear, ForwardConv2d  # type: Any, Any

    def dense(self, d: int, n: int, ni: int, **where: bool) -> list[nn.Module]:
        return [self.Linear(d, n, ni, **self._options())]

    def conv(self, c: int, n: int, ni: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        return [self.Conv2d(c, n, ni, kernel, stride, padding=kernel // 2, **self._options())]


class AfterFamily(ForwardFamily):
    Linear, Conv2d = AfterLinear, AfterConv2d


def centre_gradients_(net: nn.Module) -> None:
    """Take from each row of the gradients of Wex and Wix its mean."""
    for _, layer in dale_layers(net):
        for weight in (layer.Wex, layer.Wix):
            weight.grad -= weight.grad.mean(tuple(range(1, weight.dim())), keepdim=True)


def keep_rows(net: nn.Module) -> Callable[[nn.Module], None]:
    """Scales each row of Wex back to the total that it has now: scale invariance of each unit, without balance."""
    layers = [layer for _, layer in dale_layers(net)]
    totals = [total(layer.Wex.detach()) for layer in layers]

    @torch.no_grad()
    def scale_(net: nn.Module) -> None:
        for layer, before in zip(layers, totals, strict=True):
            layer.Wex *= (before / total(layer.Wex)).view(-1, *[1] * (layer.Wex.dim() - 1))

    return scale_


def nothing(net: nn.Module) -> None:
    pass


VARIANTS: dict[str, tuple[Any, str, Callable[[nn.Module], None], bool]] = {
    # family, correction, what happens to gradients, whether rows of Wex are scaled back after each step
    "ordinary": (StandardFamily(), "none", nothing, False),
    "centred": (StandardFamily("centred"), "none", nothing, False),
    "BatchNorm": (StandardFamily("batch"), "none", nothing, False),
    "published": (DANNFamily(), "fisher", nothing, False),
    "published, no factors": (DANNFamily(), "none", nothing, False),
    "exact centring": (DANNFamily(inhibition="groups"), "fisher", nothing, False),
    "rows of Wex scaled": (DANNFamily(inhibition="groups"), "fisher", nothing, True),
    "centred gradients": (DANNFamily(inhibition="groups"), "fisher", centre_gradients_, False),
    "balanced in the forward pass": (ForwardFamily(inhibition="groups"), "fisher", nothing, False),
    "balanced after the step alone": (AfterFamily(balanced=True), "fisher", nothing, False),
    "balanced, eps 1e-8": (DANNFamily(balanced=True, eps=1e-8), "fisher", nothing, False),
    "balanced": (DANNFamily(balanced=True), "fisher", nothing, False),
    "balanced, rows of Wex scaled": (DANNFamily(balanced=True), "fisher", nothing, True),
    "balanced, no factors": (DANNFamily(balanced=True), "none", nothing, False),
    "balanced, eps 1e-8, no factors": (DANNFamily(balanced=True, eps=1e-8), "none", nothing, False),
}


def small(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float() / 255, 2)


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((torch.cat([net(part).argmax(1) for part in x.split(500)]) != y).float().mean())


def train(variant: str, rate: float, seed: int, data: tuple[Tensor, ...]) -> str:
    """Train once; a row of the table."""
    family, correction, treat_, scaled = VARIANTS[variant]
    x, y, x_held_out, y_held_out = data
    torch.manual_seed(seed)
    net = cnn((3, 16, 16), [[32, 32], [64, 64], [128, 128]], [128], 10, family)
    scale_ = keep_rows(net) if scaled else nothing
    optimizer = torch.optim.SGD(fisher_param_groups(net, correction, lr=rate))
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    start, loss = time.monotonic(), torch.tensor(math.nan)
    for _ in range(EPOCHS):
        losses = []
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            treat_(net)
            optimizer.step()
            scale_(net)
            project_(net)
            averaged.update_parameters(net)
            losses.append(loss.detach())
        if not bool(loss.isfinite()):
            break
    errors = " | ".join(f"{error(of.eval(), x_held_out, y_held_out):.1f}" for of in (net, averaged))
    return f"| {variant} | {rate:g} | {errors} | {torch.stack(losses).mean():.2f} | {time.monotonic() - start:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cifar10 = CIFAR10DataModule(data_dir=options.folder, val_size=HELD_OUT)
    cifar10.prepare_data()
    cifar10.load()
    (x, y), (x_held_out, y_held_out) = ((of.images, of.labels) for of in (cifar10.train_set, cifar10.val_set))
    data = small(x[:TRAIN]), y[:TRAIN], small(x_held_out), y_held_out
    print("| variant | rate | last | averaged | loss | time |\n|---|--:|--:|--:|--:|--:|", flush=True)
    for variant in options.variants:
        for rate in options.rates:
            print(train(variant, rate, options.seed, data), flush=True)


if __name__ == "__main__":
    main()
