"""A search finds the best setting by held-out data alone, and goes on with what was asked before."""

import csv
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import QUIET, SMALL
from study_fits import epochs_of, fake_main, hasty_connect, real_main

import lightning_danns.cli as cli
from lightning_danns.errors import UsageError
from lightning_danns.study import command, queue
from lightning_danns.study.search import TrialReport, parse_axis


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with a space, with fits that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "main", fake_main)
    monkeypatch.setattr(queue.sqlite3, "connect", hasty_connect)

    def sweep(*args, status=0):
        assert command("search", [*map(str, args), "--folder=my sweeps"]) == status
        return "".join(capsys.readouterr())

    return sweep


def rows(path="my sweeps/trials.csv"):
    with open(path) as file:
        return list(csv.DictReader(file))


LR = "--search=lr=log:0.001:10"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lr=log:1e-3:1", {"low": 0.001, "high": 1, "log": True}), ("--n=int:1:4", {"low": 1, "high": 4}),
        ("p=uniform:-1:1", {"low": -1, "high": 1, "log": False}), ("c=choice:none,b", {"choices": ["none", "b"]}),
        ("s=choice:[10,20],[10,30]", {"choices": ["[10, 20]", "[10, 30]"]}),
        ("b=choice:true,null,1.5", {"choices": ["true", "null", "1.5"]}),
    ],
)  # fmt: skip
def test_a_search_space_is_read_as_it_is_written(text, axis):
    assert parse_axis(text)[1] == axis


@pytest.mark.parametrize(
    "text",
    ["lr", "lr=log", "lr=norm:0:1", "=log:1:2", "=choice:a,b", "lr=log:1:0.1", "lr=log:1:1", "lr=log:0:1", "lr=log:1",
     "lr=log:a:b", "lr=uniform:0:inf", "lr=uniform:-1e308:1e308", "lr=uniform:nan:1",
     "n=int:1:2.5", "a=choice:b", "a=choice:b,b", "a=choice:[1"],
)  # fmt: skip
def test_a_search_space_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="it must be KEY= and one of log:LOW:HIGH"):
        parse_axis(text)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--trials=0"], "at least 1"), (["--jobs=0"], "at least 1"), (["--run_dir=x"], "leave it out"),
        (["--ckpt_path", "last"], "leave it out"), (["--lr=1"], "--lr is searched"), (["fit"], "belongs to no option"),
        (["--search=lr=log:1:2"], "twice"), (["--val=false"], "there is no validation"),
        (["--test=true"], "must not see the test data"), (["--search=note=choice:plain,fishy"], "note=fishy is none"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_written(sweep, args, reason):
    out = sweep(LR, *args, status=2)
    assert reason in out
    assert "Traceback" not in out
    assert not Path("my sweeps").exists()


@pytest.mark.parametrize(("mode", "metric", "best_of"), [("max", "val_accuracy", max), ("min", "val_loss", min)])
def test_a_sweep_ends_with_the_config_of_the_best_epoch_of_what_the_task_monitors(sweep, mode, metric, best_of):
    out = sweep(LR, "--trials=5", f"--mode={mode}", "--trainer.max_epochs=3")
    best = {}
    for row in rows():
        if row["state"] == "COMPLETE":
            values = [float(epoch[metric]) for epoch in rows(f"my sweeps/trials/{row['run']}/metrics.csv")]
            best[float(row["lr"])] = best_of(values)
            assert float(row["value"]) == pytest.approx(best_of(values))
    config = yaml.safe_load(Path("my sweeps/best.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == best_of(best, key=best.get)
    assert (config["run_dir"], config["ckpt_path"]) == (None, None)
    command_line = next(line for line in out.splitlines() if line.startswith("train it:"))
    assert Path(shlex.split(command_line)[-1]).samefile("my sweeps/best.yaml")
    assert f"{best_of(best.values()):.4f}" in Path("my sweeps/best.yaml").read_text().splitlines()[2]


def test_hopeless_trials_end_early_but_not_in_the_first_third(sweep):
    sweep(LR, "--trials=30", "--trainer.max_epochs=3")  # of which TPE draws some badly
    lengths = {row["run"]: len(epochs_of(f"my sweeps/trials/{row['run']}")) for row in rows()}
    pruned = [row for row in rows() if row["state"] == "PRUNED"]
    assert pruned
    assert all(1 < lengths[row["run"]] < 3 for row in pruned)
    assert all(lengths[row["run"]] == 3 for row in rows() if row["state"] == "COMPLETE")


def test_no_trial_ends_early_without_pruning(sweep):
    sweep(LR, "--trials=9", "--trainer.max_epochs=3", "--no_pruning")
    assert [len(epochs_of(f"my sweeps/trials/{row['run']}")) for row in rows()] == [3] * 9


def test_a_trial_that_diverges_is_named_and_the_others_go_on(sweep):
    def explode(folder, epoch):
        if folder.name == "0001":
            raise UsageError("weights are NaN")

    def main(args, callbacks=()):  # the command line makes a line of it
        try:
            fake_main(args, callbacks, explode)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    cli.main = main
    assert "failed, weights are NaN" in sweep(LR, "--trials=3")
    assert [row["state"] for row in rows()] == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_a_trial(loss):
    trainer = SimpleNamespace(sanity_checking=False, callback_metrics={"val_loss": float(loss), "val_accuracy": 0.1})
    with pytest.raises(UsageError, match="diverged"):
        TrialReport(trial=object(), monitor="val_accuracy").on_validation_end(trainer, None)


def test_a_trial_that_fails_is_named_and_the_others_go_on(sweep):
    def fail(folder, epoch):
        if folder.name == "0001":
            raise RuntimeError("out of memory")

    cli.main = partial(fake_main, before_epoch=fail)
    assert "RuntimeError: out of memory" in sweep(LR, "--trials=3")
    assert [row["state"] for row in rows()] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_an_interrupted_trial_goes_on_with_its_setting_and_counts_once(sweep):
    def interrupt(folder, epoch):
        if (folder.name, epoch) == ("0001", 1):
            raise KeyboardInterrupt

    cli.main = partial(fake_main, before_epoch=interrupt)
    sweep(LR, "--trials=3", "--trainer.max_epochs=3", status=130)
    lr = yaml.safe_load(Path("my sweeps/trials/0001/config.yaml").read_text())["model"]["init_args"]["lr"]
    cli.main = fake_main
    sweep(LR, "--trials=3", "--trainer.max_epochs=3")
    assert [row["run"] for row in rows() if row["state"] == "COMPLETE"] == ["0000", "0002", "0001"]
    assert {float(row["lr"]) for row in rows() if row["run"] == "0001"} == {lr}
    assert epochs_of("my sweeps/trials/0001") == [0, 1, 2]


def test_the_same_sweep_goes_on_and_another_one_is_refused(sweep):
    sweep(LR, "--trials=2", "--trainer.max_epochs=3")
    sweep(LR, "--trials=4", "--trainer.max_epochs", 3)  # spelt another way
    assert [row["run"] for row in rows()] == ["0000", "0001", "0002", "0003"]
    for args, said in {
        (LR, "--trainer.max_epochs=4"): "trainer.max_epochs=3, not 4",
        ("--search=lr=log:0.001:1", "--trainer.max_epochs=3"): "with search=",
        (LR, "--trainer.max_epochs=3", "--no_pruning"): "pruning=True, not False",
    }.items():
        assert said in sweep(*args, status=2)


def test_a_sweep_over_lists_trains_real_networks_and_says_what_their_logs_say(run, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", real_main)
    fit = [*SMALL[:2], *SMALL[3:], "--data.batch_size=50", "--trainer.max_epochs=2", *QUIET]
    args = ["--search=model.hidden_sizes=choice:[12],[6,6]", "--search=model.optimizer.lr=log:0.01:0.5"]
    assert command("search", [*args, "--trials=2", "--folder=s", *fit]) == 0
    for row in rows("s/trials.csv"):
        log = rows(f"s/trials/{row['run']}/metrics.csv")
        values = [float(epoch["val_accuracy"]) for epoch in log if epoch["val_accuracy"]]
        assert float(row["value"]) == pytest.approx(max(values))
    config = yaml.safe_load(Path("s/best.yaml").read_text())
    assert config["model"]["init_args"]["hidden_sizes"] in ([12], [6, 6])
