"""Training step of a DANN against that of a normalised MLP of the same sizes, side by side in one run.

    python benchmarks/step.py [--batch 32 250] [--repeats 15] [--threads 2]

A step is forward, backward, SGD over the parameter groups and projection, in a bare loop. The two are measured in
turns, each turn as one block of steps; the table gives the median time of each and of the ratio turn by turn.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from lightning_danns import fisher_param_groups, project_
from lightning_danns.networks import DANNFamily, StandardFamily, mlp

SIZES = ((1, 28, 28), (500, 500, 500), 10)


def step_of(network: nn.Module, batch_size: int, signed: bool) -> Callable[[], None]:
    images, labels = torch.rand(batch_size, 1, 28, 28), torch.randint(10, (batch_size,))
    optimizer = torch.optim.SGD(fisher_param_groups(network, lr=1e-3))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        if signed:
            project_(network)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 250])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print("| batch | MLP + LayerNorm, ms | DANN, ms | ratio |\n|---|---|---|---|")
    for batch_size in args.batch:
        torch.manual_seed(0)
        networks = {"control": mlp(*SIZES, StandardFamily("layer")), "dann": mlp(*SIZES, DANNFamily())}
        timers = {
            name: Timer(
                "step()", globals={"step": step_of(network, batch_size, name == "dann")}, num_threads=args.threads
            )
            for name, network in networks.items()
        }
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(args.repeats):
            for name, timer in timers.items():
                times[name].append(timer.timeit(60).mean * 1e3)
        ratio = statistics.median(d / c for c, d in zip(times["control"], times["dann"], strict=True))
        control, dann = (statistics.median(times[name]) for name in ("control", "dann"))
        print(f"| {batch_size} | {control:.2f} | {dann:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
