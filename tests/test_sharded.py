"""FSDP2 by --trainer.strategy alone: parts of the weights in each process, for networks that know nothing of it."""

import pytest
import torch
from conftest import write_data
from processes import start, wait
from torch.distributed.tensor import DTensor

import lightning_danns.cli as cli
from lightning_danns import DANNMLP
from lightning_danns.layers import imbalances

SHARDED = [
    "--trainer.strategy=pytorch_lightning.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1",
]  # fmt: skip
NETWORKS = {
    "mlp": ["--model=DANNMLP", "--model.hidden_sizes=[13]"],
    "balanced residual": ["--model=DANNResNet", "--model.balanced=true", "--model.weight_decay=0.01"],
    "decay to inhibition": [
        "--model=DANNMLP",
        "--model.hidden_sizes=[13]",
        "--model.weight_decay=0.3",
        "--model.decay_to=inhibition",
    ],
    "centred control": ["--model=ConvNet", "--model.channels=[5,6]", "--model.norm=centred"],
}
pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 fails within torch 2.6")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path, n_train=24, n_test=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(run_dir, *args):
    return cli.main([
        "fit", *args, "--data=MNISTDataModule", "--data.data_dir=.", "--data.val_size=8", "--data.batch_size=4",
        "--model.optimizer=SGD", "--model.optimizer.lr=0.05", "--model.optimizer.momentum=0.9", "--seed_everything=1",
        f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--trainer.devices=2",
    ])  # fmt: skip


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


@pytest.mark.parametrize("network", [
    "mlp", *[pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "mlp"]
])  # fmt: skip
def test_parts_train_resume_and_test_like_copies_under_ddp(folder, network):
    args = NETWORKS[network]

    def in_parts(rank):
        fit("parts", *args, *SHARDED, "--trainer.max_epochs=1")
        made = fit("parts", *args, *SHARDED, "--trainer.max_epochs=2")  # goes on from its last.ckpt
        parameters = list(made.model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        assert sum(p.to_local().numel() for p in parameters) < 0.7 * sum(p.numel() for p in parameters)
        assert not imbalances(made.model)
        keep(rank, made, "parts")

    def in_copies(rank):
        keep(rank, fit("copies", *args, "--trainer.strategy=ddp", "--trainer.max_epochs=2"), "copies")

    def keep(rank, made, path):
        metrics = {name: float(value) for name, value in made.trainer.callback_metrics.items()}
        weights = {name: whole(parameter) for name, parameter in made.model.named_parameters()}
        metrics |= made.trainer.test(made.model, datamodule=made.datamodule, verbose=False)[0]
        torch.save({"weights": weights, "metrics": metrics}, f"{path}{rank}.pt")

    assert wait(start(in_parts, 2), timeout=200) == [0, 0]
    assert wait(start(in_copies, 2), timeout=200) == [0, 0]
    for rank in range(2):
        parts, copies = torch.load(f"parts{rank}.pt"), torch.load(f"copies{rank}.pt")
        for name, weight in copies["weights"].items():
            torch.testing.assert_close(parts["weights"][name], weight, rtol=1e-4, atol=1e-6)
        assert parts["metrics"] == pytest.approx(copies["metrics"], rel=1e-4)


def test_without_such_a_strategy_nothing_is_sharded(make_trainer):
    model = DANNMLP(hidden_sizes=[3])
    model.configure_model()
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
