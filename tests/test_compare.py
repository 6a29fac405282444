"""A comparison trains each config with each seed once, whatever interrupts it, and never mixes settings."""

import multiprocessing
import os
import re
import shlex
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from conftest import QUIET, SMALL
from study_fits import REAL, epochs_of, fake_main, hasty_connect, real_main

import lightning_danns.cli as cli
from lightning_danns.study import command, queue
from lightning_danns.study.settings import settings_of

ARM = "model: {{class_path: {0}}}\ndata: {{class_path: {0}Data}}\n"


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Runs the command on two configs in a folder with a space, with fits that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "main", fake_main)
    monkeypatch.setattr(queue.sqlite3, "connect", hasty_connect)
    for name in ("dann", "mlp"):
        Path(f"{name}.yaml").write_text(ARM.format(name))

    def compare(*args, status=0):
        assert command("comparison", [*map(str, args), "--folder=my runs"]) == status
        out = "".join(capsys.readouterr())
        lines = [line.split(": ", 1) for line in out.splitlines() if "/seed_" in line and ": " in line]
        return [line[0] for line in lines if "not finished" not in line[0] and line[0] != "error"], out

    return compare


def test_each_arm_is_trained_with_each_seed_and_then_never_again(compare):
    started, _ = compare("dann.yaml", "mlp.yaml", "--seeds", 0, 1)
    assert started == ["dann/seed_0", "mlp/seed_0", "dann/seed_1", "mlp/seed_1"]
    assert yaml.safe_load(Path("my runs/mlp/seed_1/config.yaml").read_text())["seed_everything"] == 1
    assert compare("dann.yaml", "mlp.yaml", "--seeds", 0, 1) == ([], "4 of 4 runs are finished\n")
    assert compare("dann.yaml", "mlp.yaml", "--seeds", 0, 1, 2)[0] == ["dann/seed_2", "mlp/seed_2"]


def test_more_epochs_are_added_to_finished_runs(compare):
    compare("dann.yaml", "--trainer.max_epochs=1")
    assert compare("dann.yaml", "--trainer.max_epochs", 3)[0] == ["dann/seed_0"]
    assert epochs_of("my runs/dann/seed_0") == [0, 1, 2]


@pytest.mark.parametrize("ended_by", ["early_stopping", "max_time", "max_steps", "other"])
def test_a_run_that_ended_before_its_last_epoch_is_finished_unless_something_else_ended_it(compare, ended_by):
    compare("dann.yaml")
    path = Path("my runs/dann/seed_0/result.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"ended_by": ended_by, "epochs": 1}))
    assert compare("dann.yaml")[0] == (["dann/seed_0"] if ended_by == "other" else [])


@pytest.mark.parametrize(
    ("args", "said"),
    [(["--lr=0.2"], "model.lr=0.1, not 0.2"), (["--trainer.max_epochs=1"], "trainer.max_epochs=2, not 1")],
)
def test_other_settings_than_those_of_an_earlier_part_are_refused(compare, args, said):
    compare("dann.yaml")
    before = Path("my runs/dann/seed_0/config.yaml").read_text()
    assert said in compare("dann.yaml", *args, status=2)[1]
    assert Path("my runs/dann/seed_0/config.yaml").read_text() == before


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(compare):
    for note, reason in (("fishy", "note=fishy is none"), ("broken", "RuntimeError: out of memory")):
        started, out = compare("dann.yaml", "mlp.yaml", f"--note={note}", status=1)
        assert started == ["dann/seed_0", "mlp/seed_0"]
        assert out.splitlines()[-1] == "not finished, see log.txt of each: dann/seed_0, mlp/seed_0"
        assert f"mlp/seed_0: failed, {reason}" in out
    assert "Traceback" in Path("my runs/mlp/seed_0/log.txt").read_text()
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["nowhere.yaml"], "nowhere.yaml does not exist"), (["mlp.yaml", "other/mlp.yaml"], "the same folder"),
        (["mlp.yaml", "mlp.yaml"], "the same folder"),
        (["mlp.yaml", "--jobs=0"], "at least 1"), (["mlp.yaml", "--seed_everything=1"], "leave it out"),
        (["mlp.yaml", "--run_dir=x"], "leave it out"), (["mlp.yaml", "--storage=nothing://x"], "nothing://x"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_with_a_line(compare, args, reason):
    os.mkdir("other")
    Path("other/mlp.yaml").write_text(Path("mlp.yaml").read_text())
    started, out = compare(*args, status=2)
    assert (started, os.path.exists("my runs")) == ([], False)
    assert reason in out
    assert "Traceback" not in out


def test_a_damaged_config_of_an_earlier_part_is_named(compare):
    compare("dann.yaml")
    Path("my runs/dann/seed_0/config.yaml").write_bytes(b"\xff\xfe")
    assert "config.yaml cannot be read" in compare("dann.yaml", status=2)[1]


def test_the_home_folder_may_be_written_as_a_tilde(compare, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("comparison", ["~/mlp.yaml", "--folder=~/runs"]) == 0
    assert epochs_of(tmp_path / "runs" / "mlp" / "seed_0") == [0, 1]


def in_processes(number, target, *args):
    """Start ``target`` in processes that share nothing but files."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args) for _ in range(number)]
    for process in processes:
        process.start()
    return processes


def test_processes_that_begin_at_once_train_each_run_once(compare):
    def note(folder, epoch):
        with open("trained.txt", "a") as file:
            file.write(f"{folder} {epoch}\n")

    cli.main = partial(fake_main, before_epoch=note)
    args = ["dann.yaml", "mlp.yaml", "--seeds", "0", "1", "--trainer.max_epochs=1", "--folder=my runs"]
    processes = in_processes(2, lambda: os._exit(command("comparison", args)))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 2
    trained = Counter(Path("trained.txt").read_text().splitlines())
    assert (len(trained), set(trained.values())) == (4, {1})


def test_a_trial_is_given_to_one_process_alone(tmp_path, monkeypatch):
    def take():
        study = optuna.load_study(study_name="s", storage=queue.open_storage(tmp_path, None))
        while queue.names(study, optuna.trial.TrialState.WAITING):
            with open(tmp_path / "taken.txt", "a") as file:
                file.write(f"{study.ask().number}\n")

    monkeypatch.setattr(queue.sqlite3, "connect", hasty_connect)
    study = optuna.create_study(study_name="s", storage=queue.open_storage(tmp_path, None))
    queue.fill(study, {f"{k}": [] for k in range(50)}, again=False)
    for process in in_processes(4, take):
        process.join()
    taken = Counter((tmp_path / "taken.txt").read_text().split())
    assert {k: taken[str(k)] for k in range(50)} == dict.fromkeys(range(50), 1)


def test_a_run_that_two_commands_have_queued_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "GRACE", 0.5)
    study = optuna.create_study(storage=queue.open_storage(tmp_path, None))
    for name in ("a", "a", "b"):
        study.enqueue_trial({}, user_attrs={"run": name, "args": []})
    assert study.ask().user_attrs["run"] == "a"  # by another process, which trains it
    trained = []
    queue.work(study, lambda trial: trained.append(trial.user_attrs["run"]) or 0.0)
    assert trained == ["b"]


def test_a_run_that_was_finished_after_it_was_queued_is_left_alone(compare):
    compare("dann.yaml")
    study = optuna.load_study(study_name="compare", storage=queue.open_storage(Path("my runs"), None))
    study.enqueue_trial({}, user_attrs={"run": "dann/seed_0", "args": []})
    assert compare("dann.yaml", "--seeds", 0, 1)[0] == ["dann/seed_1"]


def test_the_run_of_a_killed_process_is_finished_by_another(compare, monkeypatch):
    def hang(folder, epoch):
        if epoch == 1 and os.getpid() != here:
            time.sleep(600)

    here = os.getpid()
    cli.main = partial(fake_main, before_epoch=hang)
    monkeypatch.setattr(queue, "HEARTBEAT", 1)
    monkeypatch.setattr(queue, "GRACE", 2)
    (process,) = in_processes(1, command, "comparison", ["dann.yaml", "--folder=my runs"])
    while not epochs_of("my runs/dann/seed_0"):
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert compare("dann.yaml")[0] == ["dann/seed_0"]
    assert epochs_of("my runs/dann/seed_0") == [0, 1]


def test_an_interrupted_comparison_goes_on(compare):
    def interrupt(folder, epoch):
        if epoch == 1:
            raise KeyboardInterrupt

    cli.main = partial(fake_main, before_epoch=interrupt)
    assert "the same command goes on" in compare("dann.yaml", "mlp.yaml", status=130)[1]
    cli.main = fake_main
    assert sorted(compare("dann.yaml", "mlp.yaml")[0]) == ["dann/seed_0", "mlp/seed_0"]
    assert epochs_of("my runs/dann/seed_0") == [0, 1]


def test_jobs_are_the_same_command_with_shares_of_the_machine(compare, monkeypatch):
    class Process:
        def __init__(self, command, env):
            started.append((shlex.join(command), env["CUDA_VISIBLE_DEVICES"]))

        def wait(self):
            compare("mlp.yaml", "--jobs=1")
            return 0

    started = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(queue.subprocess, "Popen", Process)
    compare("mlp.yaml", "--jobs=2")
    assert [gpu for _, gpu in started] == ["4", "7"]
    assert started[0][0].endswith("lightning_danns.compare mlp.yaml --jobs=2 '--folder=my runs' --jobs=1")


def test_a_run_is_the_fit_that_it_would_be_alone(run, monkeypatch):
    monkeypatch.setattr(cli, "main", real_main)
    Path("a.yaml").write_text("model: {class_path: MLP, init_args: {hidden_sizes: [12]}}\ndata: MNISTDataModule\n")
    args = ["--data.val_size=50", "--data.batch_size=50", "--trainer.max_epochs=1", *QUIET]
    assert command("comparison", ["a.yaml", "--seeds", "0", "1", "--folder=f", *args]) == 0
    real_main(["fit", "--config=a.yaml", "--seed_everything=1", "--run_dir=alone", *args])
    alone, compared = (
        torch.load(f"{folder}/checkpoints/last.ckpt")["state_dict"] for folder in ("alone", "f/a/seed_1")
    )
    assert all(torch.equal(compared[name], value) for name, value in alone.items())


def test_a_fit_of_real_data_is_finished_once_and_goes_on_for_more_epochs(run, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", REAL)
    Path("a.yaml").write_text("model: {class_path: MLP, init_args: {hidden_sizes: [12]}}\ndata: MNISTDataModule\n")
    args = ["a.yaml", "--folder=f", "--data.val_size=0", "--data.test_each_epoch=true", *QUIET]
    assert command("comparison", [*args, "--trainer.max_epochs=1"]) == 0
    assert re.search(r"^a/seed_0: test_accuracy 0\.\d{4}, test_loss ", capsys.readouterr().out, re.MULTILINE)
    assert command("comparison", [*args, "--trainer.max_epochs=1"]) == 0
    assert capsys.readouterr().out == "1 of 1 runs are finished\n"
    assert command("comparison", [*args, "--trainer.max_epochs=2"]) == 0
    assert yaml.safe_load(Path("f/a/seed_0/result.yaml").read_text())["epochs"] == 2
    assert command("comparison", [*args, "--trainer.max_epochs=2", "--model.hidden_sizes=[13]"]) == 2
    assert "was trained with model.hidden_sizes=[12], not [13]" in capsys.readouterr().err
    again = shlex.split(Path("f/a/seed_0/log.txt").read_text().split("test them: ")[1].splitlines()[0])
    assert again[1:5] == ["-m", "lightning_danns", "test", "--config"]


def test_arguments_of_one_meaning_are_the_same_settings_and_many_devices_are_refused(run):
    joined, apart = [*SMALL, "--model.hidden_sizes=[12]"], [*SMALL, "--model.hidden_sizes", "[12]"]
    assert settings_of(joined) == settings_of(apart)
    assert settings_of(joined) != settings_of([*SMALL, "--model.hidden_sizes=[13]"])
    with pytest.raises(ValueError, match="devices=2: a study's run has one process"):
        settings_of([*SMALL, "--trainer.devices=2"])
