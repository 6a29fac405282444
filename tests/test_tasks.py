"""Tasks: a file of one's own is short, trains in Python and from the command line, and refuses wrong batches."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from lightning_danns import DANNMLP, MLP, Classification, DANNLinear, Regression, Task, UsageError, fisher_ratios
from lightning_danns.testing import assert_dale

EXAMPLES = Path(__file__).parents[1] / "examples"
X = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (64,), generator=torch.Generator().manual_seed(1))


def batches(x=X, y=Y, size=16):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def small(cls=DANNMLP, **kwargs):
    torch.manual_seed(0)
    return cls(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], **kwargs)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in ("regression", "autoencoder", "rows"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "limit"), [("regression", 15), ("autoencoder", 15), ("rows", 25)])
def test_a_task_of_ones_own_is_a_few_lines(name, limit):
    parts = ast.parse((EXAMPLES / f"{name}.py").read_text()).body
    classes = [part for part in parts if isinstance(part, ast.ClassDef)]
    used = {node.id for made in classes for node in ast.walk(made) if isinstance(node, ast.Name)}
    imports = [part for part in parts if isinstance(part, ast.Import | ast.ImportFrom)]
    needed = [part for part in imports if used & {(alias.asname or alias.name) for alias in part.names}]
    code = "\n".join(map(ast.unparse, needed + classes)).splitlines()
    assert len([line for line in code if line.strip()]) <= limit
    overridden = [line.split("def ")[1] for line in code if "def _" in line]
    assert all(name.startswith("__init__") for name in overridden)


@pytest.mark.parametrize("model", ["autoencoder.Autoencoder", "rows.Rows"])
def test_a_task_of_ones_own_runs_from_the_command_line(model, examples, run, data_dir):
    run("fit", f"--model={model}", "--data=MNISTDataModule", "--data.val_size=50", "--run_dir=run", *QUIET,
        "--trainer.max_epochs=1")  # fmt: skip
    assert "test_loss" in run("test", "--config=run/config.yaml", "--ckpt_path=best", *QUIET)


def test_a_regression_learns_and_reloads(examples, make_trainer, tmp_path):
    from regression import Line

    x = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, trainer = Line(), make_trainer(max_epochs=150, check_val_every_n_epoch=150)
    data = batches(x, x.sum(1, keepdim=True))
    trainer.fit(model, data, data)
    with torch.no_grad():
        residual = (model.eval()(x) - x.sum(1, keepdim=True)).square().mean()
        spread = x.sum(1).var(correction=0)
    assert float(trainer.callback_metrics["val_r2"]) == pytest.approx(float(1 - residual / spread), abs=1e-3)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(residual), rel=1e-3)
    assert float(residual) < 0.2 * float(spread)
    assert_dale(model)
    trainer.save_checkpoint(tmp_path / "line.ckpt")
    assert torch.equal(Line.load_from_checkpoint(tmp_path / "line.ckpt").eval()(x), model(x))


def test_a_recurrent_dann_learns_from_sequences(examples, make_trainer):
    from rows import Rows

    torch.manual_seed(0)
    x = torch.rand(200, 1, 6, 5)
    y = (x[:, 0, :, 0].sum(1) > 3).long()
    model, trainer = Rows(d=5, n=20, num_classes=2), make_trainer(max_epochs=40, check_val_every_n_epoch=40)
    trainer.fit(model, batches(x, y), batches(x, y))
    assert trainer.callback_metrics["val_accuracy"] > 0.8
    assert_dale(model)


def test_smoothing_acts_on_training_alone_and_soft_labels_count_as_their_class(make_trainer):
    model = small(MLP, label_smoothing=0.3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    soft = F.one_hot(Y, 4).float() * 0.9 + 0.025
    trainer = make_trainer()
    trainer.fit(model, batches(), batches(y=soft))
    with torch.no_grad():
        logits = model.eval()(X)
    logged = trainer.callback_metrics
    assert float(logged["train_loss"]) == pytest.approx(
        float(F.cross_entropy(logits, Y, label_smoothing=0.3)), rel=1e-5
    )
    assert float(logged["val_loss"]) == pytest.approx(float(F.cross_entropy(logits, soft)), rel=1e-5)
    assert float(logged["val_accuracy"]) == pytest.approx(float((logits.argmax(-1) == Y).float().mean()))


def test_own_loss_own_metrics_and_top_k_are_trained_by_and_logged(make_trainer):
    model = small(
        loss=nn.MultiMarginLoss(),
        top_k=[2],
        metrics={"f1": MulticlassF1Score(4)},
        optimizer=lambda g: torch.optim.SGD(g, 0.0),
    )
    trainer = make_trainer()
    trainer.fit(model, batches(), batches())
    with torch.no_grad():
        logits = model.eval()(X)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val_loss"] == pytest.approx(float(nn.MultiMarginLoss()(logits, Y)), rel=1e-5)
    assert logged["val_accuracy_top2"] == pytest.approx(
        float((logits.topk(2).indices == Y[:, None]).any(1).float().mean())
    )
    assert logged["val_f1"] == pytest.approx(float(MulticlassF1Score(4)(logits, Y)), rel=1e-5)


WRONG = {
    "bytes": (X.mul(255).byte(), Y, r"inputs of torch\.uint8 .*images\.float\(\) / 255"),
    "pixels up to 255": (X * 255, Y, r"pixels up to 25\d.*scale them to \[0, 1\]"),
    "double": (X.double(), Y, r"inputs of torch\.float64 for weights of torch\.float32"),
    "labels from 1": (X, Y + 1, r"labels from 1 to 4: the 4 classes are numbered from 0 to 3"),
    "float labels": (X, Y.float(), r"labels of shape \(16,\) and torch\.float32: class indices are whole numbers"),
    "one-hot": (X, F.one_hot(Y, 4), r"one-hot: labels\.argmax\(-1\)"),
    "int32": (X, Y.int(), r"labels of torch\.int32: .*labels\.long\(\)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("cls", [DANNMLP, MLP])
def test_wrong_batches_are_refused_alike_in_every_model_and_stage(cls, name, make_trainer):
    x, y, message = WRONG[name]
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(small(cls), batches(x, y))
    with pytest.raises(UsageError, match=message):
        make_trainer(num_sanity_val_steps=0).fit(small(cls), batches(), batches(x, y))
    with pytest.raises(UsageError, match=message):
        make_trainer().test(small(cls), batches(x, y))


def test_targets_that_would_broadcast_are_refused(make_trainer):
    class Line(Regression):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))

    with pytest.raises(
        UsageError, match=r"targets of shape \(16,\) for outputs of shape \(16, 1\).*targets\[:, None\]"
    ):
        make_trainer().fit(Line(), batches(y=Y.float()))


def test_fisher_information_asks_the_tasks_likelihood():
    class Line(Regression):
        def __init__(self):
            super().__init__()
            self.network = DANNLinear(3, 2, 1)

    # for a Gaussian of variance 1, F of a bias is 1
    from lightning_danns.optim import mean_squared_gradients

    model = Line()
    squares = mean_squared_gradients(model.network, torch.rand(4000, 3), likelihood=model.likelihood)
    torch.testing.assert_close(squares[model.network.b], torch.ones(2), rtol=0.1, atol=0)
    with pytest.raises(UsageError, match="Task has no likelihood"):
        fisher_ratios(model.network, torch.rand(4, 3), likelihood=Task().likelihood)


def test_a_classifier_of_one_class_and_wrong_arguments_are_refused():
    for arguments, message in (
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0"),
        ({"top_k": [4], "num_classes": 4}, r"top_k=\[4\]"),
        ({"metrics": {"x": math.inf}}, r"metrics\['x'\] is a float"),
    ):
        with pytest.raises(UsageError, match=message):
            Classification(**arguments)
