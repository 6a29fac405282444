"""Training steps of R networks at once (`ReplicatedClassifier`) against R single runs, one after the other.

    python benchmarks/replicas.py [--replicas 1 4 16 32] [--hidden 100 100] [--model DANNMLP] [--optimizer SGD]
        [--batch 32] [--repeats 7] [--threads 2] [--device cuda]

A step is forward, backward, optimizer over the parameter groups and projection, without metrics and Trainer. The two
are measured in turns; the table gives replica-steps per second (R times steps per second) and the median ratio.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

import lightning_danns
from lightning_danns import ImageClassifier, ReplicatedClassifier, project_


def step_of(model: ImageClassifier, batch_size: int, device: str) -> Callable[[], None]:
    model.to(device)
    batch = torch.rand(batch_size, 1, 28, 28, device=device), torch.randint(10, (batch_size,), device=device)
    optimizer = model.configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        model.step(batch)[2].sum().backward()
        optimizer.step()
        project_(model)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--hidden", type=int, nargs="+", default=[100, 100])
    parser.add_argument("--model", default="DANNMLP", help="any with hidden_sizes")
    parser.add_argument("--optimizer", default="SGD")
    parser.add_argument("--rates", type=int, default=1, help="how many learning rates the replicas share")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--block", type=float, default=0.3, help="seconds of each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    optimizer = functools.partial(getattr(torch.optim, args.optimizer), lr=1e-3)
    classifier = functools.partial(getattr(lightning_danns, args.model), hidden_sizes=args.hidden, optimizer=optimizer)
    print(
        f"{args.model} 784-{'-'.join(map(str, args.hidden))}-10, {args.optimizer}, batch {args.batch}, {args.device}\n"
    )
    print("| replicas | single runs, replica-steps / s | at once | gain |\n|---|---|---|---|")
    for replicas in args.replicas:
        rates = min(args.rates, replicas)
        many = ReplicatedClassifier(
            classifier, list(range(replicas // rates)), [1e-3 * (k + 1) for k in range(rates)] if rates > 1 else None
        )
        timers = {
            name: Timer("step()", globals={"step": step_of(model, args.batch, args.device)}, num_threads=args.threads)
            for name, model in (("single", classifier()), ("many", many))
        }
        steps = {name: max(2, int(args.block / timer.timeit(2).mean)) for name, timer in timers.items()}
        rate: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(args.repeats):
            for name, at_a_time in (("single", 1), ("many", len(many.replicas))):
                rate[name].append(at_a_time / timers[name].timeit(steps[name]).mean)
        gain = statistics.median(m / s for m, s in zip(rate["many"], rate["single"], strict=True))
        single, at_once = (statistics.median(rate[name]) for name in ("single", "many"))
        print(f"| {len(many.replicas)} | {single:.0f} | {at_once:.0f} | {gain:.1f} |", flush=True)


if __name__ == "__main__":
    main()
