"""Time and memory beside those of ordinary layers, in one run: what is compared is measured in turns.

    python benchmarks/run.py [SECTION ...] [--repeats 15] [--threads 2] [--json FILE]

Each turn of each contestant is one block of calls (`torch.utils.benchmark.Timer`). The tables give the median time of a
call, and the median over turns of its ratio to the first row's call in the same turn.

It starts itself anew with an allocator that keeps freed memory (glibc's, on Linux). Otherwise a step may give its
memory back to the system and take it again, page by page. That takes up to 0.4 times as long as the step and hits one
contestant or another by chance. Whole fits are not affected.
"""

import argparse
import functools
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lightning_danns import DANNMLP, DANNConv2d, MNISTDataModule, cli, fisher_param_groups, project_
from lightning_danns.networks import ColumnEIFamily, DANNFamily, Family, StandardFamily, mlp, resnet

Step = Callable[[], Any]
Row = dict[str, Any]
MNIST, HIDDEN, CLASSES = (1, 28, 28), (500, 500, 500), 10
STEMS: tuple[Literal["small", "large"], ...] = ("small", "large")
LAYERNORM, DANN = StandardFamily("layer"), DANNFamily()


def in_turns(steps: dict[str, Step], repeats: int, block: float = 0.15) -> list[Row]:
    """Rows of name, microseconds and ratio to the first; blocks last about ``block`` seconds."""
    threads = torch.get_num_threads()
    timers = {name: Timer("step()", globals={"step": step}, num_threads=threads) for name, step in steps.items()}
    numbers = {name: max(1, round(block / timer.timeit(3).mean)) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean)
    return rows_of(times)


def rows_of(times: dict[str, list[float]]) -> list[Row]:
    control = next(iter(times.values()))
    return [
        {
            "name": name,
            "microseconds": round(statistics.median(measured) * 1e6, 1),
            "ratio": round(statistics.median(t / c for t, c in zip(measured, control, strict=True)), 3),
        }
        for name, measured in times.items()
    ]


def training_step(
    network: nn.Module, inputs: Tensor, targets: Tensor, project: Callable[[nn.Module], None] = project_
) -> Step:
    """Forward, backward, SGD over the parameter groups, projection."""
    optimizer = torch.optim.SGD(fisher_param_groups(network, lr=1e-3))

    def step() -> None:
        optimizer.zero_grad()
        inputs.grad = None
        loss(network(inputs), targets).backward()
        optimizer.step()
        project(network)

    loss = F.cross_entropy if targets.dim() == 1 else F.mse_loss
    return step


def dense_step(family: Family, batch: int, hidden: Sequence[int] = HIDDEN, ni: int | None = None) -> Step:
    torch.manual_seed(0)
    network = mlp(MNIST, hidden, CLASSES, family, ni)
    return training_step(network, torch.rand(batch, *MNIST), torch.randint(CLASSES, (batch,)))


def conv_blocks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "Conv2d + BatchNorm2d + ReLU": nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        "DANNConv2d + ReLU": nn.Sequential(DANNConv2d(64, 64, 10, 3, padding=1), nn.ReLU()),
    }


def dense(repeats: int) -> list[Row]:
    """Training step of 784-500-500-500-10, ni = 50."""
    rows = []
    for batch in (32, 250):
        steps = {
            "Linear + LayerNorm + ReLU": dense_step(LAYERNORM, batch),
            "Linear + ReLU": dense_step(StandardFamily(), batch),
            "DANN": dense_step(DANN, batch),
            "DANN, subtractive": dense_step(DANNFamily(divisive=False), batch),
            "ColumnEI (550 units)": dense_step(ColumnEIFamily(), batch, (550, 550, 550)),
        }
        rows += [{"batch": batch, **row} for row in in_turns(steps, repeats)]
    return rows


def conv(repeats: int) -> list[Row]:
    """Training step of one block 64 -> 64 channels, 32 x 32 pixels, batch 32, ni = 10."""
    x, target = torch.rand(32, 64, 32, 32, requires_grad=True), torch.rand(32, 64, 32, 32)
    return in_turns({name: training_step(net, x, target) for name, net in conv_blocks().items()}, repeats, block=1)


def projection(repeats: int) -> list[Row]:
    """Training step as published and balanced, without and with the projection; batch 32."""

    def dense_net(balanced: bool) -> nn.Module:
        return mlp(MNIST, HIDDEN, CLASSES, DANNFamily(balanced=balanced))

    def conv_net(balanced: bool) -> nn.Module:
        return nn.Sequential(DANNConv2d(64, 64, 10, 3, padding=1, balanced=balanced), nn.ReLU())

    cases: dict[str, tuple[Callable[[bool], nn.Module], Tensor, Tensor]] = {
        "784-500-500-500-10": (dense_net, torch.rand(32, *MNIST), torch.randint(CLASSES, (32,))),
        "3x3 convolution": (conv_net, torch.rand(32, 64, 32, 32, requires_grad=True), torch.rand(32, 64, 32, 32)),
    }
    rows = []
    for name, (net, inputs, targets) in cases.items():
        steps = {
            "as published, no projection": training_step(net(False), inputs, targets, lambda network: None),
            "as published": training_step(net(False), inputs, targets),
            "balanced, no projection": training_step(net(True), inputs, targets, lambda network: None),
            "balanced": training_step(net(True), inputs, targets),
        }
        rows += [{"network": name, **row} for row in in_turns(steps, repeats)]
    return rows


def resnets(repeats: int) -> list[Row]:
    """Training step of ResNet-18, 64 x 64 pixels, batch 16, 1000 classes, beside its BatchNorm twin."""
    images, labels = torch.rand(16, 3, 64, 64), torch.randint(1000, (16,))
    families = {"BatchNorm": StandardFamily("batch"), "DANN": DANN, "DANN, balanced": DANNFamily(balanced=True)}
    rows = []
    for stem in STEMS:
        nets = {name: resnet(18, (3, 64, 64), 1000, family, stem=stem) for name, family in families.items()}
        steps = {name: training_step(net, images, labels) for name, net in nets.items()}
        for row, net in zip(in_turns(steps, repeats), nets.values(), strict=True):
            rows.append({"stem": stem, **row, "MB kept": kept_for_backward(net, images)})
    return rows


def memory(repeats: int) -> list[Row]:
    """Memory that the forward pass keeps for the backward pass, beside the parameters."""
    x = torch.rand(250, *MNIST)
    cases = {f"dense, {name}": (mlp(MNIST, HIDDEN, CLASSES, family), x) for name, family in
             {"Linear + LayerNorm + ReLU": LAYERNORM, "DANN": DANN}.items()}  # fmt: skip
    cases |= {f"conv, {name}": (net, torch.rand(32, 64, 32, 32)) for name, net in conv_blocks().items()}
    return [{"name": name, "MB": kept_for_backward(network, images)} for name, (network, images) in cases.items()]


def kept_for_backward(network: nn.Module, images: Tensor) -> float:
    """Megabytes of what autograd keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images)
    size = round(sum(kept.values()) / 1e6, 2)
    del output
    return size


def compiled(repeats: int) -> list[Row]:
    """torch.compile (whole graph, no break) against eager, the same training step."""
    rows = []
    for batch in (32, 250):
        images, labels = torch.rand(batch, *MNIST), torch.randint(CLASSES, (batch,))
        eager, whole = (mlp(MNIST, HIDDEN, CLASSES, DANN) for _ in range(2))
        whole.compile(fullgraph=True)
        steps = {"DANN": training_step(eager, images, labels), "DANN, compiled": training_step(whole, images, labels)}
        rows += [{"batch": batch, **row} for row in in_turns(steps, repeats)]
    return rows


def scaling(repeats: int) -> list[Row]:
    """Training step of a DANN beside Linear + LayerNorm + ReLU, one size changed at a time."""
    sizes = {"width": 500, "depth": 3, "ni": 50, "batch": 32}
    changes = {"width": (100, 250, 1000, 2000), "depth": (1, 6), "ni": (1, 10, 100, 250), "batch": (8, 128, 512)}
    rows = []
    for name, value in [("width", 500), *((name, value) for name, values in changes.items() for value in values)]:
        at = {**sizes, name: value}
        hidden = [at["width"]] * at["depth"]
        steps = {
            "control": dense_step(LAYERNORM, at["batch"], hidden),
            "dann": dense_step(DANN, at["batch"], hidden, at["ni"]),
        }
        control, dann = in_turns(steps, max(3, repeats // 3))
        rows.append({**at, "control": control["microseconds"], "DANN": dann["microseconds"], "ratio": dann["ratio"]})
    return rows


def noise_in(folder: str) -> MNISTDataModule:
    """Half of an MNIST, of random images."""
    generator = torch.Generator().manual_seed(0)
    arrays = {
        f"{kind}_{part}": torch.randint(high, (n, *shape), generator=generator, dtype=torch.uint8).numpy()
        for part, n in (("train", 30_000), ("test", 1_000))
        for kind, high, shape in (("x", 256, MNIST[1:]), ("y", CLASSES, ()))
    }
    np.savez(f"{folder}/mnist.npz", **arrays)
    data = MNISTDataModule(folder, val_size=32)
    data.setup()
    return data


def loader(repeats: int) -> list[Row]:
    """One batch of 32 from the data module's loader."""
    with tempfile.TemporaryDirectory() as folder:
        batches = noise_in(folder).train_dataloader()
        times = [Timer("for _ in batches: pass", globals={"batches": batches}).timeit(1).mean for _ in range(repeats)]
    return rows_of({"batch": [seconds / len(batches) for seconds in times]})


def fit(repeats: int) -> list[Row]:
    """A step of an epoch with metrics, logging, checkpoints and progress bar, against a bare loop over the loader."""
    times: dict[str, list[float]] = {"bare loop": [], "train.py fit": [], "Trainer().fit": []}
    model = functools.partial(DANNMLP, balanced=False, optimizer=functools.partial(torch.optim.SGD, lr=1e-3))
    with tempfile.TemporaryDirectory() as folder:
        data = noise_in(folder)
        batches = data.train_dataloader()
        command = "fit --model DANNMLP --model.balanced=false --model.optimizer.lr=1e-3 --data MNISTDataModule"
        command += f" --data.data_dir={folder}"
        options = f"--data.val_size=32 --trainer.accelerator=cpu --trainer.max_epochs=1 --run_dir={folder}/run"
        for _ in range(max(3, repeats // 3)):
            bare = model()
            optimizer = bare.configure_optimizers()
            start = time.perf_counter()
            for images, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(bare.network(images), labels).backward()
                optimizer.step()
                project_(bare.network)
            times["bare loop"].append((time.perf_counter() - start) / len(batches))

            trainer = cli.main([*command.split(), *options.split(), "--trainer.callbacks+=__main__.Clock"]).trainer
            times["train.py fit"].append(seconds_of(trainer) / len(batches))
            shutil.rmtree(f"{folder}/run")

            trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Clock()], default_root_dir=folder)
            trainer.fit(model(), datamodule=data)
            times["Trainer().fit"].append(seconds_of(trainer) / len(batches))
    return rows_of(times)


class Clock(pl.Callback):
    """How long a fit trained."""

    def on_train_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def seconds_of(trainer: pl.Trainer) -> float:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Clock)).seconds


def imports(repeats: int) -> list[Row]:
    """Importing a LightningModule and a DataModule of the package, and a layer alone, in a fresh process."""
    statements = {
        "pytorch_lightning": "import pytorch_lightning",
        "DANNMLP, MNISTDataModule": "from lightning_danns import DANNMLP, MNISTDataModule",
        "torch": "import torch",
        "DANNLinear, fisher_param_groups": "from lightning_danns import DANNLinear, fisher_param_groups",
    }
    times: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(max(3, repeats // 3)):
        for name, statement in statements.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    return rows_of(times)


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    function.__name__: function
    for function in (dense, conv, projection, resnets, memory, loader, fit, imports, compiled, scaling)
}


KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


def main() -> None:
    if not os.environ.keys() & KEEP_MEMORY.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if none is given"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}: choose of {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    results: dict[str, Any] = {
        "environment": {
            "torch": torch.__version__, "lightning": pl.__version__, "threads": args.threads,
            "python": platform.python_version(), "machine": platform.machine(),
        }
    }  # fmt: skip
    for section in args.sections or SECTIONS:
        function = SECTIONS[section]
        rows = results[section] = function(args.repeats)
        print(f"\n### {section}: {str(function.__doc__).splitlines()[0]}\n")
        print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
