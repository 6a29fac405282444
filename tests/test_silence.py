"""Nothing wrong passes in silence: inputs, settings and ends that once gave wrong numbers or lost work."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import QUIET, SMALL
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import lightning_danns.cli as cli
import lightning_danns.compare
from lightning_danns import (
    DANNMLP,
    MLP,
    ColumnEIMLP,
    ConvNet,
    CosineStepControl,
    DANNConvNet,
    DiagonalNGD,
    MNISTDataModule,
    ReplicatedClassifier,
    Unfreeze,
    UsageError,
    WarmupCosine,
    project_,
)

SGD = partial(torch.optim.SGD, lr=0.1)
MODELS = {
    "dann": partial(DANNMLP, hidden_sizes=[12]),
    "dann as published": partial(DANNMLP, hidden_sizes=[12], balanced=False),
    "mlp": partial(MLP, hidden_sizes=[12]),
    "columns": partial(ColumnEIMLP, hidden_sizes=[11], pixel_mean=0.5),
    "convolutional dann": partial(DANNConvNet, channels=[4, 4], hidden_sizes=[8]),
    "convolutional": partial(ConvNet, channels=[4, 4], hidden_sizes=[8]),
}


def loader(images=lambda x: x, labels=lambda y: y):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(images(torch.rand(32, 1, 28, 28)), labels(torch.arange(32) % 10)), batch_size=16)


def normalised(x):
    return (x - 0.1307) / 0.3081


# 1: inputs


@pytest.mark.parametrize("model", MODELS)
def test_each_stage_refuses_normalised_images_whatever_another_stage_saw(model, make_trainer):
    make, wrong, right = MODELS[model], loader(normalised), loader()
    calls = [
        lambda: make_trainer().fit(make(), wrong, right),
        lambda: make_trainer(num_sanity_val_steps=0).fit(make(), right, wrong),
        lambda: make_trainer().validate(make(), wrong),
        lambda: make_trainer().test(make(), [right, wrong]),
        lambda: make_trainer().predict(make(), wrong),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"an input of -0\.42.*not normalised"):
            call()


WRONG = {
    "bytes as floats": (loader(lambda x: x * 255), r"pixels up to 25\d.*x / 255"),
    "bytes": (loader(lambda x: (x * 255).byte()), r"torch.uint8.*images.float\(\) / 255"),
    "double": (loader(lambda x: x.double()), r"torch.float64 .*x.to\(torch.float32\)"),
    "labels from 1": (loader(labels=lambda y: y + 1), "labels from 1 to 10.*from 0 to 9"),
    "one-hot labels": (loader(labels=lambda y: torch.nn.functional.one_hot(y, 10)), r"labels.argmax\(-1\)"),
    "float labels": (loader(labels=lambda y: y.float()), r"labels.long\(\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_model_refuses_the_same_inputs_with_the_same_words(wrong, make_trainer):
    batches, message = WRONG[wrong]
    for make in MODELS.values():
        with pytest.raises(UsageError, match=message):
            make_trainer().fit(make(), batches)
        if "labels" not in wrong:
            with pytest.raises(UsageError, match=message):
                make_trainer().predict(make(), batches)


# 4: schedules by step


class Stop(pl.Callback):
    """Ends the process' fit in the middle of an epoch, as a kill would after a checkpoint."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 8:
            raise KeyboardInterrupt


def test_a_schedule_by_steps_killed_within_an_epoch_ends_as_if_nothing_had_happened(run, data_dir):
    options = [
        *SMALL, *QUIET, "--trainer.max_epochs=3", "--model.lr_scheduler=lightning_danns.WarmupCosine",
        "--model.lr_scheduler.floor=0.1", "--last_checkpoint.every_n_train_steps=2",
    ]  # fmt: skip
    run("fit", *options, "--run_dir=straight")
    run("fit", *options, "--run_dir=killed", "--trainer.callbacks=test_silence.Stop", status=1)
    killed = torch.load(data_dir / "killed" / "checkpoints" / "last.ckpt")
    assert killed["global_step"] == 7  # of 15, in the second epoch
    run("fit", *options, "--run_dir=killed", "--ckpt_path=last")
    straight, resumed = (torch.load(data_dir / name / "checkpoints" / "last.ckpt") for name in ("straight", "killed"))
    assert all(torch.equal(weight, resumed["state_dict"][name]) for name, weight in straight["state_dict"].items())
    assert straight["lr_schedulers"] == resumed["lr_schedulers"]


# 5: rates of another optimizer


def test_an_optimizer_does_not_take_over_anothers_rate_unless_told(run, data_dir):
    (data_dir / "sgd.yaml").write_text(
        "model: {class_path: DANNMLP, init_args: {hidden_sizes: [12], optimizer: {class_path: torch.optim.SGD, "
        "init_args: {lr: 0.1}}}}\n"
    )
    common = ["fit", "--config=sgd.yaml", *SMALL[3:], *QUIET, "--trainer.max_steps=1", "--run_dir=run"]
    assert "AdamW would take lr=0.1 over from torch.optim.SGD" in run(*common, "--model.optimizer=AdamW", status=2)
    run(*common, "--model.optimizer=AdamW", "--model.optimizer.lr=0.001")
    config = yaml.safe_load((data_dir / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001
    run(*common[:-1], "--run_dir=same", "--model.optimizer=SGD")


def test_natural_gradient_learns_with_its_defaults_and_those_of_the_data(data_dir):
    data = MNISTDataModule(str(data_dir), val_size=0)
    data.setup()
    torch.manual_seed(0)
    model = DANNMLP(hidden_sizes=[100, 100, 100], ni=10, balanced=False, correction="none", optimizer=DiagonalNGD)
    optimizer = model.configure_optimizers()
    images, labels = data.train_set.images.float() / 255, data.train_set.labels
    for k in range(40):
        batch = torch.arange(k * data.batch_size, (k + 1) * data.batch_size) % len(labels)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.update_fisher(model.network, images[batch])
        optimizer.step()
        project_(model)
    assert float((model(images).argmax(-1) == labels).float().mean()) > 0.8


# 6: the cosine rule


def test_the_cosine_rule_bounds_the_turn_of_weights_and_logs_how_often_it_acts(make_trainer):
    shares = []
    for epsilon in (1.0, 1e-9):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks=[CosineStepControl(epsilon)])
        trainer.fit(DANNMLP(hidden_sizes=[12], optimizer=partial(torch.optim.SGD, lr=0.5)), loader())
        shares.append(float(trainer.callback_metrics["shortened_steps"]))
    assert shares[0] == 0 < shares[1] <= 1


# 7 and 8: where runs are and how they end


def test_replicas_with_a_logger_of_ones_own_write_into_their_run_folder(run, data_dir):
    for name in ("a", "b"):
        run(
            "fit", "--model=ReplicatedClassifier", "--model.classifier=DANNMLP", "--model.classifier.hidden_sizes=[12]",
            "--model.seeds=[0,1]", *SMALL[3:], *QUIET, "--trainer.max_epochs=1", f"--run_dir={name}",
            "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere",
        )  # fmt: skip
        assert (data_dir / name / "replicas.csv").exists()
        assert (data_dir / name / "replicas" / "1" / "checkpoints").is_dir()
    assert not list((data_dir / "elsewhere").rglob("replicas*"))


# 9 and 10: compiled networks, TensorBoard


def test_a_compiled_network_saves_keys_that_reload_or_is_refused(make_trainer, tmp_path):
    model = DANNMLP(hidden_sizes=[12])
    model.network.compile(backend="eager")
    trainer = make_trainer()
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    DANNMLP.load_from_checkpoint(tmp_path / "compiled.ckpt")
    model = DANNMLP(hidden_sizes=[12])
    model.network = torch.compile(model.network, backend="eager")
    with pytest.raises(UsageError, match=r"does not reload: compile it in place, self.network.compile\(\)"):
        make_trainer().fit(model, loader())


def test_tensorboard_shows_metrics_and_no_empty_hp_metric(run, data_dir):
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir=run")
    events = EventAccumulator(str(data_dir / "run"))
    events.Reload()
    assert {"val_accuracy", "train_loss"} <= set(events.Tags()["scalars"])
    assert "hp_metric" not in events.Tags()["scalars"]


# 11 and 12: launchers, checkpoints and loaders beside ours


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_launchers_that_fork_or_spawn_train_from_python(strategy, make_trainer):
    model = DANNMLP(hidden_sizes=[12])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(devices=2, strategy=strategy)
    trainer.fit(model, loader(), loader())
    assert not torch.equal(before["network.1.Wex"], model.network[1].Wex)
    assert "val_accuracy" in trainer.callback_metrics


@pytest.mark.parametrize("options", [[], ["--trainer.enable_checkpointing=false"]])
def test_a_command_that_forks_keeps_all_that_it_wrote(options, run, data_dir):
    output = run(
        "fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--trainer.devices=2", "--trainer.strategy=ddp_fork",
        "--run_dir=run", *options,
    )  # fmt: skip
    assert "run folder: run" in output
    kept = {path.name for path in (data_dir / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "result.yaml"} <= kept
    assert ("checkpoints" in kept) == (not options)


def test_a_checkpoint_callback_of_ones_own_works_beside_the_built_in_one(run, data_dir):
    own = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_accuracy",
           "--trainer.callbacks.mode=max"]  # fmt: skip
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir=run", *own)
    names = sorted(path.name for path in (data_dir / "run" / "checkpoints").iterdir())
    assert names == ["best.ckpt", "epoch=0-step=5.ckpt", "last.ckpt"]


def test_one_trainer_fits_a_module_and_then_replicas_of_it(make_trainer, tmp_path):
    trainer = make_trainer(
        enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")]
    )
    trainer.fit(DANNMLP(hidden_sizes=[12]), loader(), loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(ReplicatedClassifier(partial(DANNMLP, hidden_sizes=[12]), seeds=[0, 1]), loader(), loader())
    assert {"val_accuracy/0", "val_accuracy/1"} <= trainer.callback_metrics.keys()


def test_several_test_and_predict_loaders_run(make_trainer):
    results = make_trainer().test(DANNMLP(hidden_sizes=[12]), [loader(), loader()], verbose=False)
    assert {"test_accuracy", "test_1_accuracy"} <= results[0].keys()
    assert [len(part) for part in make_trainer().predict(DANNMLP(hidden_sizes=[12]), [loader(), loader()])] == [2, 2]


# 13: what would undo the factors, and what does the same without


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network[1])

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.network[1], optimizer)


class Adding(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        layer = pl_module.network[1].requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": list(layer.parameters()), "lr": 0.1})


def test_callbacks_that_undo_factors_are_refused_by_their_substitute(make_trainer):
    with pytest.raises(UsageError, match=r"python -m lightning_danns\.sweep"):
        Tuner(make_trainer()).lr_find(DANNMLP(hidden_sizes=[12]), loader())
    with pytest.raises(UsageError, match="use EMAWeightAveraging"):
        make_trainer(callbacks=[StochasticWeightAveraging(0.1)]).fit(DANNMLP(hidden_sizes=[12]), loader())
    with pytest.raises(UsageError, match=r"Finetuning has frozen network\.1\.Wex.*lightning_danns\.Unfreeze"):
        make_trainer(callbacks=[Finetuning()]).fit(DANNMLP(hidden_sizes=[12]), loader())
    frozen = DANNMLP(hidden_sizes=[12])
    frozen.network[1].requires_grad_(False)
    with pytest.raises(UsageError, match=r"network\.1\.\w+ was added.*without learning-rate factor"):
        make_trainer(callbacks=[Adding()]).fit(frozen, loader())


@pytest.mark.parametrize(
    ("callback", "schedule"),
    [(EMAWeightAveraging(), None), (Unfreeze(["network.1"], epoch=1), None), (None, partial(WarmupCosine, floor=0.1))],
)
def test_the_substitutes_keep_the_factors(callback, schedule, make_trainer):
    model = DANNMLP(hidden_sizes=[12], optimizer=SGD, lr_scheduler=schedule)
    trainer = make_trainer(max_epochs=2, callbacks=[callback] if callback else [])
    trainer.fit(model, loader())
    rates = {round(group["lr"] / group["lr_scale"], 9) for group in trainer.optimizers[0].param_groups}
    assert len(rates) == 1


def test_a_callback_that_one_network_cannot_have_is_let_to_an_ordinary_one(make_trainer):
    make_trainer(max_epochs=2, callbacks=[StochasticWeightAveraging(0.1)]).fit(MLP(hidden_sizes=[12]), loader())


# 14 and 15: schedules and sweeps on the command line


def test_a_sequence_of_schedules_is_one_yaml_away_and_exact_over_a_kill(run, data_dir):
    schedule = {
        "class_path": "lightning_danns.Sequential",
        "init_args": {
            "schedulers": [
                {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 4}},
                {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 11}},
            ],
            "milestones": [4],
            "interval": "step",
        },
    }
    (data_dir / "schedule.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"lr_scheduler": schedule}}}))
    options = [*SMALL[:3], "--config=schedule.yaml", *SMALL[3:], *QUIET, "--trainer.max_epochs=3",
               "--last_checkpoint.every_n_train_steps=2"]  # fmt: skip
    run("fit", *options, "--run_dir=straight")
    run("fit", *options, "--run_dir=killed", "--trainer.callbacks=test_silence.Stop", status=1)
    run("fit", *options, "--run_dir=killed", "--ckpt_path=last")
    straight, resumed = (torch.load(data_dir / name / "checkpoints" / "last.ckpt") for name in ("straight", "killed"))
    assert all(torch.equal(weight, resumed["state_dict"][name]) for name, weight in straight["state_dict"].items())


def test_a_timer_is_saved_in_the_config_and_stops_the_fit(run, data_dir):
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:01"]
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=100000", "--run_dir=run", *timer)
    saved = yaml.safe_load((data_dir / "run" / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    assert yaml.safe_load((data_dir / "run" / "result.yaml").read_text())["ended_by"] == "max_time"


def test_one_batch_that_is_read_as_all_is_told(run, data_dir):
    options = [*SMALL, *QUIET, "--trainer.max_epochs=1", "--trainer.limit_val_batches=2", "--run_dir=run"]
    said = run("fit", *options, "--trainer.limit_train_batches=1")
    assert "warning: limit_train_batches=1 means all batches (1.0), not one" in said
    assert "limit_val_batches" not in said


# 17 and paths


def test_printed_commands_work_in_folders_with_spaces_and_letters_of_all_kinds(run, data_dir):
    output = run("fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir", "my runs/é 1")
    command = shlex.split(output.split("test them: ")[1].splitlines()[0])
    assert "test_accuracy" in run(*command[command.index("test") :], *QUIET)


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("train.py", ["python", "train.py"]),
        ("lightning-danns", ["./lightning-danns"]),
        ("/home/pkg/__main__.py", ["python", "-m", "pkg"]),
        ("/opt/bin/lightning-danns", ["/opt/bin/lightning-danns"]),
        (lightning_danns.compare.__file__, ["python", "-m", "lightning_danns"]),
        ("/usr/bin/pytest", ["python", "-m", "lightning_danns"]),
    ],
)
def test_printed_commands_start_the_environment_that_printed_them(run, monkeypatch, capsys, started, words):
    monkeypatch.setenv("PATH", "/nowhere")  # no environment is activated
    monkeypatch.setattr(sys, "argv", [started])
    cli.main(["fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir=run"])
    said = shlex.split(capsys.readouterr().out.split("test them: ")[1].splitlines()[0])
    python = min(os.path.relpath(sys.executable), sys.executable, key=len)
    assert said[: said.index("test")] == [python if word == "python" else word for word in words]


def test_a_link_and_a_home_are_the_folder_that_they_stand_for(run, data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(data_dir))
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=1", "--run_dir=~/run")
    os.symlink("run", data_dir / "link")
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=2", "--run_dir=link", "--ckpt_path=last")
    assert torch.load(data_dir / "run" / "checkpoints" / "last.ckpt")["epoch"] == 1
    assert {path.name for path in Path(data_dir).iterdir()} >= {"run", "link"}
