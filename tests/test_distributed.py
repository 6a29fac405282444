"""Several processes train one network: the same as one process would, to the bit among themselves, and to the end."""

import functools
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import write_data
from processes import srun, start, torchrun, wait
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_danns.cli as cli
import lightning_danns.cli.run_folder as folders
from lightning_danns import DANNMLP, DaleDiagnostics, DANNLinear, MNISTDataModule, UsageError, project_, standardise_
from lightning_danns.analysis.diagnostics import effective_rank
from lightning_danns.layers import sign_violations


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path, n_train=137, n_test=61)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(rank, count, batch_size, *args):
    """Fits, tests, and saves what this process has at the end."""
    made = cli.main([
        "fit", "--model=DANNMLP", "--model.hidden_sizes=[12]", "--model.optimizer=SGD", "--model.optimizer.lr=0.5",
        "--data=MNISTDataModule", "--data.data_dir=.", "--data.val_size=17", f"--data.batch_size={batch_size}",
        "--seed_everything=1", "--trainer.accelerator=cpu", f"--trainer.devices={count}", "--trainer.max_epochs=2",
        f"--trainer.strategy={'ddp' if count > 1 else 'auto'}", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *args,
    ])  # fmt: skip
    metrics = {name: float(value) for name, value in made.trainer.callback_metrics.items()}
    metrics |= made.trainer.test(made.model, datamodule=made.datamodule, verbose=False)[0]
    rates = [(group["name"], group["lr"]) for group in made.trainer.optimizers[0].param_groups]
    end = {"weights": made.model.state_dict(), "metrics": metrics, "rates": rates, "folder": str(made.folder)}
    torch.save(end, f"{rank}of{count}.pt")


def saved(rank, count):
    return torch.load(f"{rank}of{count}.pt")


STARTED = ["--trainer.callbacks+=StandardisedStart", "--trainer.precision=64-true"]


@pytest.mark.parametrize(("count", "launcher", "args"), [(2, torchrun, []), (3, srun, STARTED)])
def test_processes_train_like_one_with_their_joint_batch(folder, count, launcher, args):
    def work(rank):
        folders.datetime = SimpleNamespace(now=lambda: datetime(2000 + rank, 1, 1))  # no two start at the same time
        fit(rank, count, 30 // count, *args)

    assert wait(start(work, count, launcher)) == [0] * count
    (run_folder,) = (folder / "runs" / "DANNMLP").iterdir()
    first = saved(0, count)
    for rank in range(1, count):
        other = saved(rank, count)
        assert all(torch.equal(first["weights"][name], other["weights"][name]) for name in first["weights"])
        assert first["metrics"] == other["metrics"]
        assert first["rates"] == other["rates"]
        assert first["folder"] == other["folder"]
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}

    fit(0, 1, 30, "--run_dir=alone", *args)
    alone = saved(0, 1)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)  # 17 and 61 images do not divide evenly


class Interrupted(DANNMLP):
    """Draws dropout masks, other ones in each process; and one process kills itself, or fails, in the eighth step."""

    rank, how = -1, None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network.insert(3, nn.Dropout())

    def training_step(self, batch, batch_idx):
        if self.global_step == 7 and self.global_rank == self.rank:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this process fails")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("rank", "how"), [(0, "failed"), (1, "killed")])
def test_a_run_ends_when_a_process_dies_and_goes_on_exactly(folder, how, rank):
    def interrupted(process):
        Interrupted.rank, Interrupted.how = rank, how
        resumable(process)

    def resumable(process, run_dir="run"):
        fit(process, 2, 15, "--model=test_distributed.Interrupted", f"--run_dir={run_dir}", "--ckpt_path=last",
            "--last_checkpoint.every_n_train_steps=3")  # fmt: skip

    statuses = wait(start(interrupted, 2), timeout=60)
    assert statuses[rank] == (-9 if how == "killed" else 1)
    assert statuses[1 - rank] != 0
    assert torch.load("run/checkpoints/last.ckpt")["global_step"] == 7  # in the middle of the second epoch
    assert wait(start(resumable, 2)) == [0, 0]
    resumed = [saved(process, 2) for process in range(2)]
    assert wait(start(functools.partial(resumable, run_dir="straight"), 2)) == [0, 0]
    for process in range(2):
        straight = saved(process, 2)
        assert all(torch.equal(resumed[process]["weights"][name], w) for name, w in straight["weights"].items())
        assert resumed[process]["metrics"] == pytest.approx(straight["metrics"], rel=1e-6)  # summed in another order


class Sharded(DANNMLP):
    """Every process holds a part of each weight."""

    def configure_model(self):
        for module in (*[layer for layer in self.network if isinstance(layer, DANNLinear)], self.network):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


FSDP_ON_CPU = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fails within torch 2.6")


@FSDP_ON_CPU
def test_sharded_weights_train_and_resume_like_whole_ones(folder):
    def work(rank):
        def trainer(epochs, **kwargs):
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            return pl.Trainer(
                accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **kwargs,
            )  # fmt: skip

        def model():
            pl.seed_everything(1)
            return Sharded(hidden_sizes=[12], optimizer=functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9))

        def data():
            return MNISTDataModule(".", batch_size=15, val_size=17)

        first, straight, resumed = model(), model(), model()
        half = trainer(1)
        half.fit(first, datamodule=data())
        half.save_checkpoint("half.ckpt")
        diagnostics = DaleDiagnostics(every_n_batches=1)
        trainer(2, callbacks=[diagnostics]).fit(straight, datamodule=data())
        trainer(2).fit(resumed, datamodule=data(), ckpt_path="half.ckpt")
        assert isinstance(straight.network[1].Wei, DTensor)
        for name, weight in straight.named_parameters():
            assert torch.equal(weight.full_tensor(), resumed.get_parameter(name).full_tensor()), name
        rates = {group["name"]: group["lr"] for group in straight.trainer.optimizers[0].param_groups}
        whole = {name: weight.full_tensor() for name, weight in straight.named_parameters()}
        torch.save({"weights": whole, "rates": rates, "diagnostics": diagnostics.latest}, f"sharded{rank}.pt")

    assert wait(start(work, 2)) == [0, 0]
    fit(0, 1, 30, "--run_dir=alone", "--model.optimizer.momentum=0.9")
    sharded, alone = torch.load("sharded0.pt"), saved(0, 1)
    assert sharded["rates"] == dict(alone["rates"])
    for name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-3, atol=1e-5)
        assert name.rsplit(".")[-1] in ("alpha", "b") or weight.min() >= 0
    assert min(weight.min() for name, weight in sharded["weights"].items() if name.endswith("Wex")) == 0  # was clamped
    Wex, Wix, Wei = (alone["weights"][f"network.1.{name}"] for name in ("Wex", "Wix", "Wei"))
    seen = sharded["diagnostics"]
    assert seen["network.1/effective_rank"] == pytest.approx(effective_rank(Wex - Wei @ Wix), rel=1e-3)
    assert seen["network.1/zeros_Wex"] == pytest.approx(float((Wex == 0).float().mean()), rel=1e-3)
    assert seen["network.1/ei_ratio"] > 0
    assert 0 < seen["network.1/projection_cosine"] < 1


@FSDP_ON_CPU
def test_shards_beside_whole_weights_are_projected_and_checked(folder):
    def work(rank):
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        net = nn.Sequential(DANNLinear(6, 5, 2), nn.ReLU(), DANNLinear(5, 3, 1))
        fully_shard(net[2], mesh=init_device_mesh("cpu", (2,)))  # one interneuron: rank 1 has no row of Wix
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(10)
        before = sign_violations(net)
        with pytest.raises(UsageError, match="'2' is sharded"):
            standardise_(net, torch.rand(8, 6))
        project_(net)
        assert set(before) == {f"{k}.{name}" for k in (0, 2) for name in ("Wex", "Wix", "Wei", "g")}
        assert -10 <= before["2.Wix"] < -9
        assert sign_violations(net) == {}
        assert float(net[2].alpha.full_tensor().max()) < -9

    assert wait(start(work, 2)) == [0, 0]


def test_no_process_waits_when_the_run_is_refused(folder):
    (folder / "run" / "checkpoints").mkdir(parents=True)
    assert wait(start(lambda rank: fit(rank, 2, 15, "--run_dir=run"), 2, srun), timeout=60) == [2, 2]


def test_processes_without_a_common_name_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --standalone or --rdzv-id
    monkeypatch.delenv(folders.RUN_NAME, raising=False)  # of an earlier run in this process
    with pytest.raises(UsageError, match="--run_dir"):
        folders.run_name()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]],
    ids=["Lightning", "torchrun"],
)
def test_real_launchers_start_one_run_and_end_it_when_a_process_dies(folder, launcher):
    def run(*args):
        script = Path(__file__).parents[1] / "train.py"
        return subprocess.run(
            [
                *launcher, script, "fit", "--data=MNISTDataModule", "--data.data_dir=.", "--data.val_size=17",
                "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp",
                *args,
            ],
            env={**os.environ, "PYTHONPATH": f"{script.parent}:{Path(__file__).parent}"}, timeout=300,
        )  # fmt: skip

    assert run("--model=DANNMLP").returncode == 0
    (run_folder,) = (folder / "runs" / "DANNMLP").iterdir()
    assert (run_folder / "checkpoints" / "last.ckpt").exists()
    assert run("--model=test_distributed.Dying").returncode != 0


class Dying(DANNMLP):
    """The second process kills itself in its third step."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)
