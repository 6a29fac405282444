"""A comparison trains each config with each seed once, whatever interrupts it, and never mixes settings."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUIET

import lightning_danns.cli as cli
from lightning_danns import compare as tool
from lightning_danns import workers
from lightning_danns.report import load_runs

ARM = """
model:
  class_path: {model}
  init_args: {{hidden_sizes: [12], optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: {lr}}}}}}}
data:
  class_path: MNISTDataModule
  init_args: {{val_size: 50, batch_size: 20}}
"""
FIT = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2"]


@pytest.fixture
def arms(run):
    """Two configs in the working folder, with tiny data."""
    Path("dann.yaml").write_text(ARM.format(model="DANNMLP", lr=0.1))
    Path("mlp.yaml").write_text(ARM.format(model="MLP", lr=0.1))
    return ["dann.yaml", "mlp.yaml"]


@pytest.fixture
def compare(arms, monkeypatch, capsys):
    """Runs the tool with fits in this process, and returns which it started and what it printed."""

    def start(module, args, log, jobs, index):
        started.append("/".join(Path(next(a for a in args if a.startswith("--run_dir="))[10:]).parts[-2:]))
        try:
            cli.main(args)
        except SystemExit as exit:
            log.write_text(capsys.readouterr().err)
            return ended(exit.code)
        return ended(0)

    def ended(status):
        return SimpleNamespace(poll=lambda: status, returncode=status)

    def compare(*args, status=0):
        started.clear()
        capsys.readouterr()
        assert tool.main([*map(str, args), "--folder=f"]) == status
        return list(started), "".join(capsys.readouterr())

    started = []
    monkeypatch.setattr(workers, "start", start)
    monkeypatch.setattr(workers, "stop", lambda processes: None)
    monkeypatch.setattr(tool.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return compare


def weights(folder):
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt")["state_dict"]


def epochs(folder):
    """The epochs that were trained in a folder, over all its starts."""
    logs = []
    for path in sorted(Path(folder).glob("metrics*.csv"), key=lambda path: path.stat().st_mtime):
        with open(path) as file:
            logs += [int(row["epoch"]) for row in csv.DictReader(file) if row["train_loss"]]
    return logs


def test_each_arm_is_trained_with_each_seed_as_a_fit_of_its_own(compare, arms, run):
    started, out = compare(*arms, "--seeds", 0, 1, *FIT)
    assert started == ["dann/seed_0", "mlp/seed_0", "dann/seed_1", "mlp/seed_1"]
    assert "0 of 4 left" in out
    run("fit", "--config=dann.yaml", "--seed_everything=1", "--run_dir=alone", *FIT, *QUIET)
    for name, value in weights("alone").items():
        torch.testing.assert_close(weights("f/dann/seed_1")[name], value, rtol=0, atol=0)
    assert compare(*arms, "--seeds", 0, 1, *FIT)[0] == []


def test_an_unfinished_run_goes_on_and_more_epochs_are_added(compare, arms):
    compare("dann.yaml", *FIT, "--trainer.max_epochs=1")
    Path("f/dann/seed_0/metrics.csv").write_text("epoch,train_loss\n0,1\n1,1\n")  # logged, but its end was not saved
    assert compare("dann.yaml", *FIT)[0] == ["dann/seed_0"]
    assert epochs("f/dann/seed_0") == [0, 1, 1]
    assert compare("dann.yaml", *FIT)[0] == []


def test_a_run_that_was_stopped_early_is_finished(compare, arms):
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    never_better = ["--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=1", "--trainer.max_epochs=9"]
    assert compare("dann.yaml", *FIT, *stopping, *never_better)[0] == ["dann/seed_0"]
    assert epochs("f/dann/seed_0") == [0, 1]
    assert compare("dann.yaml", *FIT, *stopping, *never_better)[0] == []
    pytest.importorskip("pandas")
    assert load_runs("f").finished.all()


def test_other_settings_than_those_of_an_earlier_part_are_refused(compare, arms):
    compare("dann.yaml", *FIT)
    before = Path("f/dann/seed_0/config.yaml").read_text()
    for option, key in {
        "--model.optimizer.lr=0.2": "lr=0.1, not 0.2",
        "--data.val_size=0": "val_size=50, not 0",
        "--trainer.gradient_clip_val=1": "gradient_clip_val=None, not 1",
        "--trainer.max_epochs=1": "max_epochs=2, not 1",
        "--model=MLP": "class_path=lightning_danns.DANNMLP",
    }.items():
        started, out = compare("dann.yaml", *FIT, option, status=2)
        assert started == []
        assert key in out
    assert Path("f/dann/seed_0/config.yaml").read_text() == before
    os.rename("data", "moved")  # where the data lie does not matter
    assert compare("dann.yaml", *FIT, "--data.data_dir=moved")[0] == []


def test_a_run_that_fails_does_not_stop_the_others(compare, arms):
    Path("bad.yaml").write_text(ARM.format(model="DANNMLP", lr=0.1).replace("[12]", "[12], ni: 99"))
    started, out = compare("bad.yaml", "mlp.yaml", *FIT, status=1)
    assert started == ["bad/seed_0", "mlp/seed_0"]
    assert "failed: bad seed 0" in out
    assert "ni=99" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["nowhere.yaml"], "nowhere.yaml does not exist"), (["mlp.yaml", "other/mlp.yaml"], "one folder"),
        (["mlp.yaml", "mlp.yaml"], "one folder"), (["mlp.yaml", "--seeds", "1", "1"], "each must be there once"),
        (["mlp.yaml", "--jobs=0"], "at least one"), (["mlp.yaml", "--seed_everything=1"], "leave it out"),
        (["mlp.yaml", "--run_dir=x"], "leave it out"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(compare, arms, args, reason):
    os.mkdir("other")
    Path("other/mlp.yaml").write_text(Path("mlp.yaml").read_text())
    started, out = compare(*args, status=2)
    assert (started, os.path.exists("f")) == ([], False)
    assert reason in out


def test_a_misspelt_key_is_refused_before_anything_is_trained(arms, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as exit:
        tool.main([*arms, "--folder=f", "--trainer.max_epoch=2"])
    assert exit.value.code == 2
    assert "max_epochs" in capsys.readouterr().err
    assert not os.path.exists("f")


def test_a_lock_is_another_process_s_until_that_has_died(tmp_path):
    path = tmp_path / "deep" / "running.lock"
    code = (
        "import sys, time; from pathlib import Path; from lightning_danns import workers\n"
        "lock = workers.lease(Path(sys.argv[1])); print(workers.taken(lock), flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "True"
    lock = workers.lease(path)
    assert not workers.taken(lock)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert workers.taken(lock)
    lock.release()
    assert not path.exists()


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    (tmp_path / "child.py").write_text(
        "import os, time; from lightning_danns import workers\n"
        "workers.end_with_parent(); print(os.getpid(), os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(600)"
    )
    code = (
        "import time; from pathlib import Path; from lightning_danns import workers\n"
        "workers.start('child', [], Path('log.txt'), jobs=10**6); time.sleep(600)"
    )
    path = f"{tmp_path}{os.pathsep}{Path(tool.__file__).parents[1]}"
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=given)
    log = tmp_path / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.05)
    child, threads = map(int, log.read_text().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert threads == 1
    for _ in range(200):
        if not _alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it lives on")


def _alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell in the background lets its children ignore


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_an_interrupted_comparison_ends_with_the_weights_of_one_that_was_not(arms, how):
    args = [*arms, "--seeds", "0", "1", "--jobs", "2", *FIT, "--trainer.max_epochs=40"]
    command = [sys.executable, "-m", "lightning_danns.compare", *args, "--folder"]
    with open("log.txt", "w") as log:
        assert subprocess.run([*command, "straight"], stdout=log, stderr=log, timeout=400).returncode == 0
        parent = subprocess.Popen([*command, "f"], stdout=log, stderr=log, preexec_fn=_heed_interrupts)
        while not list(Path("f").glob("*/*/checkpoints/last.ckpt")):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(how)
        assert parent.wait(timeout=60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
        assert subprocess.run([*command, "f"], stdout=log, stderr=log, timeout=400).returncode == 0
    assert len(list(Path("f").glob("*/*/metrics-1.csv"))) >= 1  # something was interrupted
    for folder in Path("straight").glob("*/*"):
        for name, value in weights(folder).items():
            assert torch.equal(weights(Path("f") / folder.relative_to("straight"))[name], value)
