"""FSDP2 by --trainer.strategy alone: the weights of one process, in parts, for networks that know nothing of it."""

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
    "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1", "--trainer.devices=2",
]  # fmt: skip
NETWORKS = {
    "mlp": ["--model=DANNMLP", "--model.hidden_sizes=[13]"],
    "balanced residual": ["--model=DANNResNet", "--model.balanced=true", "--model.weight_decay=0.01"],
    "centred control": ["--model=ConvNet", "--model.channels=[5,6]", "--model.norm=centred"],
}
pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 fails within torch 2.6")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path, n_train=24, n_test=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(run_dir, batch_size, *args):
    return cli.main([
        "fit", *args, "--data=MNISTDataModule", "--data.data_dir=.", "--data.val_size=8",
        f"--data.batch_size={batch_size}",
        "--model.optimizer=SGD", "--model.optimizer.lr=0.05", "--model.optimizer.momentum=0.9", "--seed_everything=1",
        f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ])  # fmt: skip


def whole(model):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("network", [
    "mlp", *[pytest.param(name, marks=pytest.mark.slow) for name in ("balanced residual", "centred control")]
])  # fmt: skip
def test_parts_train_resume_and_test_like_the_whole(folder, network):
    args = NETWORKS[network]

    def work(rank):
        fit("sharded", 4, *args, *SHARDED, "--trainer.max_epochs=1")
        made = fit("sharded", 4, *args, *SHARDED, "--trainer.max_epochs=2")  # goes on from its last.ckpt
        assert all(isinstance(p, DTensor) for p in made.model.parameters())
        assert sum(p.to_local().numel() for p in made.model.parameters()) < 0.7 * sum(
            p.numel() for p in made.model.parameters()
        )
        assert not imbalances(made.model)
        metrics = {name: float(value) for name, value in made.trainer.callback_metrics.items()}
        tested = made.trainer.test(made.model, datamodule=made.datamodule, verbose=False)[0]
        torch.save({"weights": whole(made.model), "metrics": metrics, "tested": tested}, f"{rank}.pt")

    assert wait(start(work, 2), timeout=200) == [0, 0]
    alone = fit("alone", 8, *args, "--trainer.devices=1", "--trainer.max_epochs=2")
    sharded = torch.load("0.pt")
    for name, weight in whole(alone.model).items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-3, atol=1e-5)
    metrics = {name: float(value) for name, value in alone.trainer.callback_metrics.items()}
    assert sharded["metrics"] == pytest.approx(metrics, rel=1e-3)
    tested = alone.trainer.test(alone.model, datamodule=alone.datamodule, verbose=False)[0]
    assert sharded["tested"] == pytest.approx(tested, rel=1e-3)


def test_without_such_a_strategy_nothing_is_sharded(make_trainer):
    model = DANNMLP(hidden_sizes=[3])
    model.configure_model()
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
