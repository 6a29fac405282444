"""Many replicas in one process: each is the single run of its seed and learning rate."""

import copy
import csv
import functools
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

import lightning_danns.replicas.module
from lightning_danns import (
    DANNMLP,
    MLP,
    ColumnEIMLP,
    ConvNet,
    DANNConvNet,
    DiagonalNGD,
    ImageClassifier,
    LayerGradientClipping,
    MNISTDataModule,
    ReplicatedClassifier,
    Unfreeze,
    UsageError,
    project_,
)
from lightning_danns.testing import assert_dale

SGD = functools.partial(torch.optim.SGD, lr=0.05)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-3)
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
SMALL = functools.partial(DANNMLP, hidden_sizes=[12, 9], ni=[3, 2])

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture
def data(data_dir):
    return MNISTDataModule(str(data_dir), val_size=50, order_seed=5)


def single(classifier, seed, rate=None):
    """The classifier of a run of its own: its seed alone, and its learning rate in its optimizer."""
    torch.manual_seed(seed)
    model = classifier()
    if rate is not None:
        factory = model.optimizer_factory
        model.optimizer_factory = functools.partial(factory.func, **{**factory.keywords, "lr": rate})
    return model


def assert_same(replica, run, **tolerance):
    for (name, ours), theirs in zip(replica.state_dict().items(), run.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


CLASSIFIERS = pytest.mark.parametrize(
    "classifier",
    [
        SMALL,
        functools.partial(DANNMLP, hidden_sizes=[12], divisive=False, correction="none"),
        functools.partial(ColumnEIMLP, hidden_sizes=[22]),
        functools.partial(MLP, hidden_sizes=[12], norm="layer"),
        functools.partial(MLP, hidden_sizes=[12], norm="batch"),
        functools.partial(DANNConvNet, channels=[4, 6], hidden_sizes=[8]),
        functools.partial(ConvNet, channels=[4], hidden_sizes=[8], norm="batch"),
    ],
    ids=["dann", "subtractive", "column_ei", "layernorm", "batchnorm", "dann_conv", "conv_batchnorm"],
)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@CLASSIFIERS
def test_a_replica_is_the_single_run_of_its_seed_and_rate(classifier, optimizer, data, make_trainer):
    classifier = functools.partial(classifier, optimizer=optimizer)
    precise = {"precision": "64-true", "max_epochs": 2}
    rates = [0.02, 0.003]
    model = ReplicatedClassifier(classifier, seeds=[3, 8], learning_rates=rates)
    together = make_trainer(**precise)
    together.fit(model, datamodule=data)
    run, alone = single(classifier, 8, rates[1]), make_trainer(**precise)
    alone.fit(run, datamodule=data)
    assert_same(model.replicas[3], run, rtol=1e-6, atol=1e-8)
    for name in alone.logged_metrics:
        assert together.logged_metrics[f"{name}/3"] == pytest.approx(float(alone.logged_metrics[name]))


@CLASSIFIERS
def test_in_single_precision_they_are_the_same_up_to_its_rounding(classifier):
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    classifier = functools.partial(classifier, optimizer=SGD)
    many, run = ReplicatedClassifier(classifier, [3, 8]), single(classifier, 8)
    for model in (many, run):
        optimizer = model.configure_optimizers()
        for _ in range(5):
            optimizer.zero_grad()
            model.step((images, labels))[2].sum().backward()
            optimizer.step()
            project_(model)
    assert_same(many.replicas[1], run, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(many(images)[:, 1], run(images), rtol=1e-3, atol=1e-3)


def half_wei(model):
    return {name: 0.5 for name, _ in model.named_parameters() if name.endswith("Wei")}


def focal(logits, labels):
    log_p = nn.functional.log_softmax(logits, -1).gather(-1, labels[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


@pytest.mark.parametrize(
    "own",
    [
        {"label_smoothing": 0.2, "top_k": [3]},
        {"loss": focal},
        {"loss": nn.CrossEntropyLoss(weight=torch.arange(1, 11).double())},
        {"metrics": {"f1": MulticlassF1Score(10)}},
        {"weight_decay": 0.01},
        {"correction": half_wei},
        {"rates": {"network.1": 0.1}},
        {"balanced": False},
    ],
    ids=lambda own: next(iter(own)),
)
def test_what_a_classifier_has_of_its_own_acts_in_each_replica_as_in_its_single_run(
    own, data, make_trainer, monkeypatch
):
    monkeypatch.setattr(lightning_danns.replicas.module, "COUNTED_AT_ONCE", 2)  # less than an epoch
    classifier = functools.partial(SMALL, optimizer=MOMENTUM, **own)
    model, run = ReplicatedClassifier(classifier, [3, 8], [0.02, 0.003]).double(), single(classifier, 8, 0.003).double()
    together, alone = (make_trainer(precision="64-true", max_epochs=2) for _ in range(2))
    for trainer, module in ((together, model), (alone, run)):
        project_(module)  # balance to the last digit of the higher precision
        trainer.fit(module, datamodule=data)
    assert_same(model.replicas[3], run, rtol=1e-6, atol=1e-9)
    for name, value in alone.callback_metrics.items():
        assert together.callback_metrics[f"{name}/3"] == pytest.approx(float(value), rel=1e-6)


def test_a_correction_may_differ_from_replica_to_replica():
    def by_weights(model):
        return {"network.1.Wei": float(model.network[1].Wex.detach().mean())}

    model = ReplicatedClassifier(functools.partial(SMALL, correction=by_weights, optimizer=SGD), [3, 8])
    group = {p: group for group in model.configure_optimizers().param_groups for p in group["params"]}
    for replica in model.replicas:
        layer = replica.network[1]
        assert group[layer.Wei]["lr"] == pytest.approx(0.05 * float(layer.Wex.mean()))


def test_frozen_weights_of_one_replica_stay(data, make_trainer):
    model = ReplicatedClassifier(SMALL, [3, 8])
    layers = [replica.network[1] for replica in model.replicas]
    start = [layer.Wex.detach().clone() for layer in layers]
    frozen = Unfreeze(["replicas.1.network.1"])
    make_trainer(callbacks=[frozen]).fit(model, datamodule=data)
    assert [torch.equal(layer.Wex, before) for layer, before in zip(layers, start, strict=True)] == [False, True]


def fit_four(data, make_trainer, classifier=SMALL, optimizer=SGD, **options):
    """Seeds 3 and 8 with rates 0.02 and 0.003; the third has seed 3 and rate 0.003."""
    model = ReplicatedClassifier(functools.partial(classifier, optimizer=optimizer), [3, 8], [0.02, 0.003])
    trainer = make_trainer(**options)
    trainer.fit(model, datamodule=data)
    return model, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_seed_can_have_the_batches_of_its_own_run(accumulate, data_dir, make_trainer):
    options = {"precision": "64-true", "max_epochs": 2, "accumulate_grad_batches": accumulate}
    together = MNISTDataModule(str(data_dir), val_size=50, order_seed=[11, 12])
    model, _ = fit_four(together, make_trainer, optimizer=MOMENTUM, **options)
    for index, (seed, rate, order) in enumerate([(3, 0.02, 11), (8, 0.02, 12), (3, 0.003, 11), (8, 0.003, 12)]):
        run = single(functools.partial(SMALL, optimizer=MOMENTUM), seed, rate)
        alone = MNISTDataModule(str(data_dir), val_size=50, order_seed=order)
        make_trainer(**options).fit(run, datamodule=alone)
        assert_same(model.replicas[index], run, rtol=1e-6, atol=1e-9)


def test_schedules_and_step_controls_act_on_each_replica_as_on_its_single_run(data, make_trainer):
    classifier = functools.partial(
        SMALL, optimizer=SGD, lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    )
    options = {"precision": "64-true", "max_epochs": 2}
    model, _ = fit_four(data, make_trainer, classifier, callbacks=[LayerGradientClipping(0.05)], **options)
    run = single(classifier, 3, 0.003)
    make_trainer(callbacks=[LayerGradientClipping(0.05)], **options).fit(run, datamodule=data)
    assert_same(model.replicas[2], run, rtol=1e-6, atol=1e-9)


def test_a_loop_without_a_trainer_gets_the_gradients_of_each_replica():
    model = ReplicatedClassifier(SMALL, [0, 1]).double()
    images, labels = torch.rand(6, 1, 28, 28).double(), torch.arange(6)
    for times in (1, 2):  # gradients add up until they are cleared
        model.step((images, labels))[2].sum().backward()
        for seed, replica in enumerate(model.replicas):
            run = single(SMALL, seed).double()
            (times * nn.functional.cross_entropy(run(images), labels)).backward()
            for ours, theirs in zip(replica.parameters(), run.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("move", ["data", "assign", "to float32", "copy"])
def test_weights_given_new_memory_are_those_that_are_used(move):
    model, x = ReplicatedClassifier(SMALL, [0, 1]).double(), torch.rand(2, 1, 28, 28).double()
    before = model(x)
    if move == "data":
        model.replicas[1].network[-1].b.data = torch.ones(10).double()
    elif move == "assign":
        model.load_state_dict({k: v + k.endswith("1.network.5.b") for k, v in model.state_dict().items()}, assign=True)
    elif move == "copy":
        model, x = copy.deepcopy(model), x
        model.replicas[1].network[-1].b.data.fill_(1)
    else:
        model, x, before = model.float(), x.float(), before.float()
    after = model(x)
    assert after.dtype == x.dtype
    torch.testing.assert_close(after[:, 0], before[:, 0], atol=1e-4, rtol=1e-4)
    for k, replica in enumerate(model.replicas):
        torch.testing.assert_close(after[:, k], replica(x), atol=1e-4, rtol=1e-4)


def test_dropout_draws_other_units_for_each_replica():
    class Thinned(ImageClassifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))

    model = ReplicatedClassifier(Thinned, [0, 1])
    model.replicas[1].load_state_dict(model.replicas[0].state_dict())
    x = torch.rand(3, 1, 28, 28)
    same, other = model.eval()(x), model.train()(x)
    torch.testing.assert_close(same[:, 0], same[:, 1])
    assert not torch.isclose(other[:, 0], other[:, 1]).any()


def test_all_replicas_obey_dale_and_a_run_resumes_where_it_stopped(data, make_trainer, tmp_path):
    straight, _ = fit_four(data, make_trainer, optimizer=MOMENTUM, max_epochs=3)
    last = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    fit_four(data, make_trainer, optimizer=MOMENTUM, max_epochs=2, enable_checkpointing=True, callbacks=[last])
    resumed = ReplicatedClassifier(functools.partial(SMALL, optimizer=MOMENTUM), [3, 8], [0.02, 0.003])
    trainer = make_trainer(max_epochs=3, enable_checkpointing=True)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert_dale(resumed)
    assert_same(resumed, straight)
    with open(tmp_path / "replicas.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    again = ReplicatedClassifier.load_from_checkpoint(tmp_path / "last.ckpt", classifier=SMALL)
    assert (again.seeds, again.learning_rates) == ([3, 8], [0.02, 0.003])


def test_each_replica_is_saved_with_its_best_weights_and_all_metrics_in_one_table(data, make_trainer, tmp_path):
    model, trainer = fit_four(data, make_trainer, max_epochs=3, enable_checkpointing=True)
    with open(tmp_path / "replicas.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["replica"], row["seed"], row["learning_rate"]) for row in rows[4:8]] == [
        ("1", "0", "3", "0.02"),
        ("1", "1", "8", "0.02"),
        ("1", "2", "3", "0.003"),
        ("1", "3", "8", "0.003"),
    ]
    last = [float(row["val_accuracy"]) for row in rows[8:]]
    assert last == pytest.approx([float(trainer.callback_metrics[f"val_accuracy/{k}"]) for k in range(4)])
    assert sum(last) / 4 == pytest.approx(float(trainer.callback_metrics["val_accuracy"]))
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = model.replica(0).trainer  # the copy leaves the whole Trainer behind
    for k in range(4):
        folder = tmp_path / "replicas" / str(k) / "checkpoints"
        assert_same(DANNMLP.load_from_checkpoint(folder / "last.ckpt"), model.replica(k))
        best = DANNMLP.load_from_checkpoint(folder / "best.ckpt")
        (validated,) = make_trainer().validate(best, datamodule=data, verbose=False)
        assert validated["val_accuracy"] == pytest.approx(max(float(row["val_accuracy"]) for row in rows[k::4]))
        assert (folder / "last.ckpt").stat().st_size < 2 * sum(p.numel() * 4 for p in best.parameters())
    trainer.test(model, datamodule=data, verbose=False)
    with open(tmp_path / "replicas.csv") as file:
        assert list(csv.DictReader(file)) == rows


@pytest.mark.parametrize("classifier", [SMALL, functools.partial(ReplicatedClassifier, SMALL, [0, 1])])
def test_validation_under_inference_mode_leaves_a_model_that_can_be_trained(classifier, data, make_trainer):
    model = classifier()
    (start,) = make_trainer().validate(model, datamodule=data, verbose=False)
    model.step((torch.rand(6, 1, 28, 28), torch.arange(6)))[2].sum().backward()
    trainer = make_trainer(max_epochs=3)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val_loss"] < start["val_loss"]


def test_a_cut_off_write_of_a_replica_costs_the_earlier_one_nothing(tmp_path, monkeypatch):
    def cut_off(checkpoint, file):
        if isinstance(file, Path):
            file.write_bytes(b"half")
        raise OSError("No space left on device")

    model = ReplicatedClassifier(SMALL, [0])
    model.save_replica(0, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(OSError, match="No space"):
        model.save_replica(0, tmp_path / "last.ckpt")
    assert_same(DANNMLP.load_from_checkpoint(tmp_path / "last.ckpt"), model.replica(0))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# needs the command line
def test_the_folder_of_a_replica_is_the_folder_of_its_single_run(run, data_dir):
    output = run(
        *(
            "fit",
            "--model=lightning_danns.ReplicatedClassifier",
            "--model.classifier=DANNMLP",
            "--model.classifier.hidden_sizes=[12]",
        ),
        *("--model.seeds=[0,1]", "--model.learning_rates=[0.02,0.05]", "--data=MNISTDataModule", "--data.val_size=50"),
        *("--data.order_seed=[5,6]", "--trainer.max_epochs=2", "--run_dir=many", *QUIET),
    )
    assert "learning rate 0.05, 2 seeds:  val_accuracy 0." in output
    run("fit", "--config=many/replicas/3/config.yaml", "--run_dir=alone")
    many, alone = (yaml.safe_load((data_dir / f / "result.yaml").read_text()) for f in ("many/replicas/3", "alone"))
    assert many == {**alone, "best": pytest.approx(alone["best"]), "metrics": pytest.approx(alone["metrics"], rel=1e-3)}
    many, alone = (
        DANNMLP.load_from_checkpoint(data_dir / folder / "checkpoints" / "last.ckpt")
        for folder in ("many/replicas/3", "alone")
    )
    assert_same(many, alone, rtol=1e-3, atol=1e-4)
    command = output.split("test replica 0:  python -m lightning_danns ")[1].splitlines()[0].split()
    assert "test_accuracy" in run(*command)
    assert (data_dir / "many" / "replicas" / "0" / "test" / "metrics.csv").exists()
    run("test", "--config=many/config.yaml", "--ckpt_path=best")
    with open(data_dir / "many" / "test" / "replicas_test.csv") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]


def test_a_replica_that_diverges_ends_alone(data, make_trainer, tmp_path):
    def fit(rates):
        model = ReplicatedClassifier(functools.partial(SMALL, optimizer=SGD), [3], rates)
        make_trainer(max_epochs=2, enable_checkpointing=True).fit(model, datamodule=data)
        return model

    model = fit([0.02, 1e30])
    assert_dale(model.replicas[0])
    assert (tmp_path / "replicas" / "0" / "checkpoints" / "last.ckpt").exists()
    assert not (tmp_path / "replicas" / "1" / "checkpoints").exists()
    assert "nan" in (tmp_path / "replicas" / "1" / "metrics.csv").read_text()
    with open(tmp_path / "replicas.csv") as file:
        assert [row["train_loss"] == "nan" for row in csv.DictReader(file)] == [False, True] * 2
    with pytest.raises(UsageError, match="training has diverged"):
        fit([1e30])


def test_a_fit_that_goes_on_within_an_epoch_counts_the_whole_of_it(data, make_trainer, tmp_path):
    straight, _ = fit_four(data, make_trainer, optimizer=MOMENTUM, max_epochs=2)
    _, trainer = fit_four(data, make_trainer, optimizer=MOMENTUM, max_steps=7)  # of 5 in an epoch
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = ReplicatedClassifier(functools.partial(SMALL, optimizer=MOMENTUM), [3, 8], [0.02, 0.003])
    make_trainer(max_epochs=2).fit(resumed, datamodule=data, ckpt_path=tmp_path / "cut.ckpt")
    assert_same(resumed, straight)
    assert resumed.history == straight.history


def test_a_logger_of_ones_own_leaves_replicas_in_the_run_folder_and_a_second_run_those_of_the_first(
    data, make_trainer, tmp_path
):
    tables = []
    for _ in range(2):
        logger = CSVLogger(tmp_path / "logs", name="", version="")
        options = {"default_root_dir": tmp_path / "run", "logger": logger, "enable_checkpointing": True}
        model, trainer = fit_four(data, make_trainer, **options)
        trainer.test(model, datamodule=data, verbose=False)
        tables.append((tmp_path / "run" / "replicas.csv").read_text())
    assert tables[0] == tables[1]
    written = {path.name for path in (tmp_path / "run").iterdir() if "replicas" in path.name}
    assert written == {
        *("replicas", "replicas.csv", "replicas-v1", "replicas-v1.csv"),
        *("replicas_test.csv", "replicas_test-v1.csv"),
    }
    assert not [path for path in (tmp_path / "logs").iterdir() if "replicas" in path.name]


def test_one_trainer_fits_replicas_between_single_networks(data, make_trainer):
    mixed, alone = make_trainer(enable_checkpointing=True), make_trainer()
    models = [single(SMALL, 3), ReplicatedClassifier(SMALL, [3, 8]), single(SMALL, 8)]
    for model in models:
        mixed.fit(model, datamodule=data)
        mixed.fit_loop.max_epochs += 1
    runs = [single(SMALL, 3), single(SMALL, 8), single(SMALL, 8)]
    for run in runs:
        alone.fit(run, datamodule=data)
        alone.fit_loop.max_epochs += 1
    for model, run in zip([models[0], models[1].replicas[1], models[2]], runs, strict=True):
        assert_same(model, run, rtol=1e-3, atol=1e-4)
    assert_dale(models[1])


def test_replicas_pickle():
    model = ReplicatedClassifier(functools.partial(SMALL, optimizer=SGD), [3, 8])
    x = torch.rand(2, 1, 28, 28)
    before = model(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), before)


class OwnHook(DANNMLP):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 2


class NoNetwork(ImageClassifier):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, r"seeds=\[\]: give at least one"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\].*none twice"),
        ({"learning_rates": []}, r"learning_rates=\[\]"),
        ({"learning_rates": [0.1, -1]}, r"learning_rates=\[0.1, -1\]: all must be positive"),
        ({"classifier": DANNMLP(hidden_sizes=[3])}, "give what makes one"),
        ({"classifier": nn.Identity}, "made a Identity, which is no ImageClassifier"),
        ({"classifier": NoNetwork}, "NoNetwork has no parameters: set self.network"),
        ({"classifier": OwnHook}, "OwnHook has its own training_step"),
        ({"classifier": functools.partial(ReplicatedClassifier, SMALL, [0])}, "ReplicatedClassifier has its own"),
        ({"classifier": functools.partial(SMALL, correction="measured")}, "measures one network, not many"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        ReplicatedClassifier(**{"classifier": SMALL, "seeds": [0, 1], **arguments})


class Masked(MLP):
    """Has a tensor of its own that is no buffer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mask = (torch.rand(1, 28, 28) > 0.5).float()

    def forward(self, x):
        return super().forward(x * self.mask)


def branching(logits, labels):
    loss = nn.functional.cross_entropy(logits, labels)
    return loss if loss > 0 else 2 * loss


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (functools.partial(SMALL, loss=branching), "DANNMLP.step or its loss cannot run for many replicas at once"),
        (
            functools.partial(SMALL, loss=nn.CrossEntropyLoss(reduction="none")),
            r"the loss of DANNMLP has shape \(25,\)",
        ),
        (Masked, "Masked computes other outputs in a stack than alone"),
    ],
)
def test_what_would_not_run_as_in_a_single_run_is_refused(classifier, message, data, make_trainer):
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(ReplicatedClassifier(classifier, [0, 1]), datamodule=data)


PLATEAU = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, eps=0)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ({"lr_scheduler": PLATEAU}, "ReduceLROnPlateau follows one validation loss"),
        ({"optimizer": DiagonalNGD, "correction": "none"}, "DiagonalNGD estimates"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS doesn't support per-parameter options"),
    ],
)
def test_an_optimizer_or_schedule_that_would_tie_the_replicas_together_is_refused(classifier, message, make_trainer):
    model = ReplicatedClassifier(functools.partial(SMALL, **classifier), seeds=[0, 1])
    model.trainer = make_trainer()
    with pytest.raises(UsageError, match=message):
        model.configure_optimizers()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 clips the gradient of all replicas together"),
        ({"world_size": 2}, "replicas train in one process"),
        ({"precision": "16-mixed"}, "16-mixed"),
    ],
)
def test_a_trainer_that_would_tie_the_replicas_together_is_refused(trainer, message):
    model = ReplicatedClassifier(SMALL, seeds=[0, 1])
    model.trainer = SimpleNamespace(**{"world_size": 1, "gradient_clip_val": None, "precision": "32-true", **trainer})
    with pytest.raises(UsageError, match=message):
        model.setup("fit")


def test_negative_images_and_batches_for_another_number_of_seeds_are_refused(data_dir, make_trainer):
    normalised = DataLoader(TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8)), batch_size=4)
    model = ReplicatedClassifier(SMALL, seeds=[0, 1])
    with pytest.raises(UsageError, match=r"layer 'replicas.0.network.1'.*must be >= 0"):
        make_trainer().fit(model, normalised)
    three = MNISTDataModule(str(data_dir), val_size=50, order_seed=[1, 2, 3])
    with pytest.raises(UsageError, match=r"images of shape \(3, 30, 1, 28, 28\).*for each of 2 seeds"):
        make_trainer().fit(ReplicatedClassifier(SMALL, seeds=[0, 1]), datamodule=three)


def test_building_replicas_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ReplicatedClassifier(SMALL, seeds=[7])
    assert torch.equal(torch.rand(3), expected)
