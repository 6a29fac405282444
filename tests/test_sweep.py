"""A sweep finds the best setting by held-out images alone, and a killed process costs it nothing but time."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUIET, SMALL
from hypothesis import given
from hypothesis import strategies as st

from lightning_danns.errors import UsageError
from lightning_danns.sweep import __main__ as tool
from lightning_danns.sweep import trials
from lightning_danns.sweep.pruning import ReportToTrial
from lightning_danns.sweep.search_space import design, parse_axis

optuna = pytest.importorskip("optuna")

LR = "model.optimizer.lr"
FIT = [*SMALL, "--data.batch_size=20", "--trainer.max_epochs=2", QUIET[-1]]


@pytest.fixture
def make(run, monkeypatch):
    """Sweeps of tiny fits, in the folder ``s``, started without rehearsal."""
    monkeypatch.setattr(tool, "_rehearse_in_a_process", lambda args: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def make(*args, search=f"{LR}=log:0.01:1", number=3, fit=FIT):
        options = ["--search", search, f"--trials={number}", "--folder=s", *args, *fit]
        return trials.Sweep(*tool.options_parser().parse_with_rest(options))

    return make


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@given(
    st.floats(1e-6, 1e3), st.floats(1.5, 1e6), st.integers(2, 30)
)  # fmt: skip
def test_the_first_points_divide_a_logarithmic_range_evenly(low, ratio, number):
    axis = parse_axis(f"lr=log:{low}:{low * ratio}")
    values = sorted(point["lr"] for point in design([axis], number))
    assert values[0] >= axis.low
    assert values[-1] <= axis.high
    steps = [math.log(b / a) for a, b in pairwise(values)]
    torch.testing.assert_close(steps, [math.log(ratio) / (number - 1)] * (number - 1), rtol=1e-3, atol=1e-5)


def test_the_first_points_cover_every_axis():
    axes = [parse_axis(text) for text in ("a=uniform:0:1", "b=int:1:4", "c=choice:x,y")]
    points = design(axes, 8)
    assert sorted(point["a"] for point in points) == pytest.approx([k / 7 for k in range(8)])
    assert {point["b"] for point in points} == {1, 2, 3, 4}
    assert [point["c"] for point in points].count("x") == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr", "KEY="), ("lr=log", "KEY="), ("lr=norm:0:1", "KEY="), ("=log:1:2", "KEY="),
        ("lr=log:1:0.1", "no range"), ("lr=log:1:1", "no range"), ("lr=log:0:1", "above 0"),
        ("lr=log:1", "two numbers"), ("lr=log:a:b", "two numbers"), ("lr=uniform:0:inf", "no range"),
        ("n=int:1:2.5", "two numbers"),
        ("norm=choice:layer", "two choices"), ("norm=choice:a,a", "two choices"),
    ],
)  # fmt: skip
def test_a_search_that_is_none_is_refused(text, reason, capsys, tmp_path):
    assert tool.main(["--search", text, "--folder", str(tmp_path / "s")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--monitor=test_loss"], "held-out"), (["--monitor=train_loss"], "held-out"), (["--trials=0"], "one trial"),
        (["--jobs=0"], "at least one"), (["--config=nowhere.yaml"], "nowhere.yaml"), (["--run_dir=x"], "leave it out"),
        (["--ckpt_path", "last"], "leave it out"), ([f"--{LR}=1"], "is searched"), (["fit"], "belongs to no option"),
        (["--search", f"{LR}=log:1:2"], "twice"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(args, reason, capsys, tmp_path):
    options = ["--search", f"{LR}=log:0.1:1", "--folder", str(tmp_path / "s"), *args]
    assert tool.main(options) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--search=model.optimizer.lrr=log:1:2"], "lrr"),
        (["--trainer.max_epoch=3"], "max_epochs"),
        (["--data.val_size=0"], "none are held out"),
        (["--data.test_each_epoch=true"], "must not see the test images"),
        (["--monitor=val_acc"], "val_loss"),
    ],
)
def test_a_rehearsal_finds_mistakes_in_settings(make, capsys, args, reason):
    with pytest.raises(SystemExit) as exit:
        trials.rehearse(make(fit=[*FIT, *args]))
    assert exit.value.code == 2
    assert reason in capsys.readouterr().err
    assert not os.path.exists("s")


def test_a_rehearsal_tries_every_choice(make, capsys):
    with pytest.raises(SystemExit):
        trials.rehearse(make(search="model.correction=choice:none,fisher,fishy"))
    assert "fishy" in capsys.readouterr().err


def test_a_sweep_ends_with_the_config_of_the_lowest_validation_loss(make, run):
    sweep = make()
    study = tool.prepare(sweep, [])
    trials.work(sweep)
    best = trials.write_results(sweep, study)
    lowest = {}
    for row in rows("s/trials.csv"):
        folder = f"s/trials/{int(row['number']):04d}"
        losses = [float(epoch["val_loss"]) for epoch in rows(f"{folder}/metrics.csv") if epoch["val_loss"]]
        lowest[float(row[LR])] = min(losses)
        assert float(row["value"]) == pytest.approx(min(losses), rel=1e-5)
        assert study.trials[int(row["number"])].value == pytest.approx(min(losses), rel=1e-5)
        assert not os.path.exists(f"{folder}/checkpoints")
        assert not any(name.startswith("test") for name in rows(f"{folder}/metrics.csv")[0])
    assert sorted(lowest) == pytest.approx([0.01, 0.1, 1])
    assert best.params[LR] == min(lowest, key=lowest.get)
    out = run("fit", "--config", "s/best.yaml", "--run_dir=again", *QUIET)
    assert "again/checkpoints/best.ckpt" in out
    again = [float(epoch["val_loss"]) for epoch in rows("again/metrics.csv") if epoch["val_loss"]]
    assert min(again) == pytest.approx(min(lowest.values()), rel=1e-6)


@pytest.mark.parametrize("model", [[], ["--model=MLP", "--model.hidden_sizes=[12]"]], ids=["NaN weights", "NaN loss"])
def test_diverged_trials_are_the_worst_and_do_not_end_a_sweep(make, model):
    sweep = make(search=f"{LR}=choice:0.1,1e30", number=2, fit=[*(model or FIT[:2]), *FIT[2:]])
    study = tool.prepare(sweep, [])
    trials.work(sweep)
    assert trials.write_results(sweep, study).params == {LR: "0.1"}
    assert {row[LR]: row["state"] for row in rows("s/trials.csv")} == {"0.1": "complete", "1e30": "diverged"}


class HopelessTrial:
    """Is always to be pruned."""

    def __init__(self):
        self.reported = {}

    def report(self, value, epoch):
        self.reported[epoch] = value

    def should_prune(self):
        return True


def test_a_hopeless_trial_ends_after_a_third_of_its_epochs(make):
    from lightning_danns.cli import main

    report = ReportToTrial("val_loss", HopelessTrial())
    main(["fit", *FIT, "--trainer.max_epochs=6", "--run_dir=r"], callbacks=[report])
    assert report.outcome == "pruned"
    assert list(report.trial.reported) == [0, 1]


def taken_by_another_process(sweep):
    """A process that takes a trial, as a worker does, and says so."""
    code = (
        "import sys, time; from pathlib import Path; from lightning_danns.sweep import __main__ as tool, trials\n"
        "s = trials.Sweep(*tool.options_parser().parse_with_rest(sys.argv[1:]))\n"
        "locks = {}; print(trials.ask(s, s.load(), locks).number, flush=True); time.sleep(600)"
    )
    args = ["--search", f"{LR}=log:0.01:1", f"--trials={sweep.trials}", "--folder=s"]
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "0"
    return process


def test_the_trial_of_a_killed_process_is_tried_again(make):
    sweep = make()
    study = tool.prepare(sweep, [])
    other = taken_by_another_process(sweep)
    locks = {}
    trials.give_back_lost(sweep, study, locks)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "WAITING", "WAITING"]  # it lives
    other.kill()
    other.wait()
    trials.work(sweep)
    trials.write_results(sweep, study)
    assert sorted(float(row[LR]) for row in rows("s/trials.csv")) == pytest.approx([0.01, 0.1, 1])
    assert study.trials[0].state.name == "FAIL"
    assert study.trials[3].params == study.trials[0].params


def test_a_trial_that_kills_its_process_is_given_up(make, monkeypatch):
    sweep = make(number=1)
    study = tool.prepare(sweep, [])
    for _ in range(trials.TRIES):
        locks = {}
        assert trials.ask(sweep, study, locks) is not None
        [lock] = locks.values()
        lock.release()  # as after a death
        trials.give_back_lost(sweep, study, {})
    assert trials.finished(sweep, study)
    assert trials.write_results(sweep, study) is None
    assert [row["state"] for row in rows("s/trials.csv")] == ["failed"]


def test_a_folder_keeps_to_one_sweep(make):
    tool.prepare(make(), [])
    tool.prepare(make(number=5), [])  # more trials are the same sweep
    for other in (make(search=f"{LR}=log:0.01:2"), make(fit=[*FIT, "--seed_everything=1"]), make("--mode=max")):
        with pytest.raises(UsageError, match=r"other (search|arguments|monitor)"):
            tool.prepare(other, [])


def test_a_sweep_that_is_refused_leaves_no_folder(make, monkeypatch):
    def refuse(args):
        raise UsageError("no such key")

    sweep = make()
    monkeypatch.setattr(tool, "_rehearse_in_a_process", refuse)
    with pytest.raises(UsageError, match="no such key"):
        tool.prepare(sweep, [])
    assert not os.path.exists("s")


def test_a_finished_sweep_only_writes_its_results(make, capsys):
    sweep = make("--mode=max", number=1)
    study = tool.prepare(sweep, [])
    trials.work(sweep)
    assert tool.run(sweep, []) == 0
    assert "1 of 1 trials are done" in capsys.readouterr().out
    assert yaml.safe_load(Path("s/best.yaml").read_text())["run_dir"] is None
    assert len(os.listdir("s/trials")) == 1
    losses = [float(epoch["val_loss"]) for epoch in rows("s/trials/0000/metrics.csv") if epoch["val_loss"]]
    assert study.trials[0].value == pytest.approx(max(losses), rel=1e-5)  # of any epoch, not of the last


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_losing_or_repeating_a_trial(run):
    args = ["--search", f"{LR}=log:0.01:1", "--trials=4", "--startup=4", "--jobs=2", "--folder=s", "--no_pruning", *FIT]
    command = [sys.executable, "-m", "lightning_danns.sweep", *args, "--trainer.max_epochs=60"]
    with open("log.txt", "w") as log:
        parent = subprocess.Popen(command, stdout=log, stderr=log)
        while not list(Path("s").glob("trials/*/metrics.csv")):
            assert parent.poll() is None, Path("log.txt").read_text()
            time.sleep(0.2)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert subprocess.run(command, stdout=log, stderr=log, timeout=300).returncode == 0, Path("log.txt").read_text()
    assert sorted(float(row[LR]) for row in rows("s/trials.csv")) == pytest.approx(
        [10 ** (-2 + 2 * k / 3) for k in range(4)], rel=1e-4
    )
    assert {row["epochs"] for row in rows("s/trials.csv")} == {"60"}
