"""The report: numbers against computations by hand, and folders that are no runs or not whole."""

import copy
import itertools
import math
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import yaml

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from lightning_danns.errors import UsageError  # noqa: E402
from lightning_danns.report import load_runs, table  # noqa: E402
from lightning_danns.report.__main__ import main  # noqa: E402
from lightning_danns.report.runs import read  # noqa: E402

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 6, "callbacks": None, "precision": None},
    "model": {
        "class_path": "lightning_danns.MLP",
        "init_args": {"hidden_sizes": [9], "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
    },
    "data": {"class_path": "lightning_danns.MNISTDataModule", "init_args": {"data_dir": "data", "val_size": 0}},
}
FALLING = [0.5, 0.7, 0.8, 0.84, 0.86, 0.9]


def rows(values, name="test_accuracy", start=0, loss=0.5):
    """A row for each evaluation and one for each training of an epoch, as CSVLogger writes them."""
    lines = [f"epoch,step,{name},train_accuracy,train_loss"]
    for epoch, value in enumerate(values, start):
        lines += [f"{epoch},{10 * epoch},{value},,", f"{epoch},{10 * epoch},,{value},{loss}"]
    return "\n".join(lines) + "\n"


def make_run(folder, values=FALLING, seed=0, lr=0.1, name="test_accuracy", loss=0.5, checkpoint=True, **parts):
    """A run folder by hand; ``parts`` go into the part of the config that has their name."""
    config = copy.deepcopy(CONFIG)
    config["seed_everything"] = seed
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = lr
    config["trainer"] |= parts.get("trainer", {})
    for part in ("model", "data"):
        config[part]["init_args"] |= parts.get(part, {})
    (folder / "checkpoints").mkdir(parents=True)
    if checkpoint:
        (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text(rows(values, name, loss=loss))
    return folder


def report(capsys, *args, status=0):
    if status:
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, args)])
        assert exit_info.value.code == status
    else:
        main([*map(str, args)])
    out, err = capsys.readouterr()
    return out + err


def test_the_error_of_an_arm_is_the_mean_over_seeds_of_each_seeds_last_epochs(tmp_path):
    ends = [[0.9, 0.92, 0.91, 0.93, 0.94], [0.8, 0.82, 0.81, 0.83, 0.84], [0.95, 0.95, 0.95, 0.95, 0.95]]
    for seed, end in enumerate(ends):
        make_run(tmp_path / "arm" / f"seed_{seed}", [0.1, *end], seed)
    (row,) = table(load_runs(tmp_path)).itertuples()
    seeds = [100 - 100 * sum(end) / 5 for end in ends]
    half = 4.302653 * statistics.stdev(seeds) / math.sqrt(3)  # t of 2 degrees of freedom, from a printed table
    assert (row.arm, row.runs, row.lr) == ("arm", 3, 0.1)
    assert row.error == pytest.approx(statistics.mean(seeds))
    assert (row.low, row.high) == pytest.approx((row.error - half, row.error + half), rel=1e-6)
    (of_last_two,) = table(load_runs(tmp_path), last=2).error
    assert of_last_two == pytest.approx(100 - 100 * (0.935 + 0.835 + 0.95) / 3)


def test_one_seed_has_no_interval(tmp_path, capsys):
    make_run(tmp_path / "arm" / "seed_0")
    (row,) = table(load_runs(tmp_path)).itertuples()
    assert math.isnan(row.low)
    assert math.isnan(row.high)
    assert "| arm | 1 | 18.00 | - | 0.1 | - |" in report(capsys, tmp_path)


def test_of_an_epoch_in_several_logs_the_newest_counts(tmp_path):
    run = make_run(tmp_path / "arm" / "seed_0", [0.9, 0.9], trainer={"max_epochs": 12})
    (run / "metrics-1.csv").write_text(rows([0.1] * 5))
    (run / "metrics-2.csv").write_text(rows([0.2] * 4, start=4))
    (run / "metrics-10.csv").write_text(rows([0.3] * 3, start=7))
    (run / "metrics.csv").write_text(rows([0.4] * 3, start=9))
    runs = load_runs(tmp_path)
    assert list(runs.epoch) == list(range(12))
    assert list(runs.test_accuracy) == [0.1] * 4 + [0.2] * 3 + [0.3] * 2 + [0.4] * 3
    assert runs.finished.all()


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, capsys):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", FALLING[:3], seed=1)
    make_run(tmp_path / "arm" / "seed_2", [0.99] * 6, seed=2, checkpoint=False)
    assert list(table(load_runs(tmp_path)).runs) == [1]
    output = report(capsys, tmp_path)
    assert "arm, seed 1: 3 of 6 epochs" in output
    assert "arm, seed 2: 6 of 6 epochs" in output


def test_runs_on_different_data_have_tables_of_their_own(tmp_path, capsys):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, data={"val_size": 50})
    make_run(tmp_path / "arm" / "seed_2", seed=2, data={"data_dir": "elsewhere", "num_workers": 3, "order_seed": 1})
    rows_ = table(load_runs(tmp_path))
    assert [(row.data, row.arm, row.runs) for row in rows_.itertuples()] == [
        ("MNIST (val_size=0)", "arm", 2),
        ("MNIST (val_size=50)", "arm", 1),
    ]
    assert "## MNIST (val_size=50)" in report(capsys, tmp_path)


def test_runs_of_one_folder_with_different_settings_are_arms_that_say_what_differs(tmp_path):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, lr=0.2)
    make_run(tmp_path / "arm" / "seed_2", seed=2, lr=0.2, trainer={"precision": "bf16-mixed"})
    arms = {"arm (lr=0.1, precision=None)", "arm (lr=0.2, precision=None)", "arm (lr=0.2, precision=bf16-mixed)"}
    runs = load_runs(tmp_path)
    assert set(table(runs).arm) == arms
    assert set(runs.family) == {"arm (precision=None)", "arm (precision=bf16-mixed)"}  # a line against lr for each


def test_without_seed_folders_an_arm_is_its_model(tmp_path):
    for day, seed in (("monday", 0), ("tuesday", 1)):
        make_run(tmp_path / "MLP" / day, seed=seed)
    make_run(tmp_path / "MLP" / "friday", seed=0, model={"hidden_sizes": [9, 9]})
    sizes = {row.arm: row.runs for row in table(load_runs(tmp_path)).itertuples()}
    assert sizes == {"MLP (hidden_sizes=[9])": 2, "MLP (hidden_sizes=[9, 9])": 1}


def test_callbacks_that_look_on_do_not_make_another_arm(tmp_path):
    watching = {"class_path": "lightning_danns.DaleDiagnostics", "init_args": {"every": 2}}
    acting = {"class_path": "lightning_danns.LayerGradientClipping", "init_args": {"max_norm": 1.0}}
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, trainer={"callbacks": [watching]})
    assert list(table(load_runs(tmp_path)).runs) == [2]
    make_run(tmp_path / "arm" / "seed_2", seed=2, trainer={"callbacks": [watching, acting]})
    assert sorted(table(load_runs(tmp_path)).runs) == [1, 2]


def test_the_same_seed_twice_counts_once(tmp_path, capsys):
    make_run(tmp_path / "a" / "arm" / "seed_0", FALLING[:2])
    for again in "bc":
        make_run(tmp_path / again / "arm" / "seed_0")
    assert list(table(load_runs(tmp_path, tmp_path / "b")).runs) == [1]
    assert "a/arm/seed_0: seed and settings of" in report(capsys, tmp_path)


def test_the_error_is_named_after_what_it_is_of(tmp_path, capsys):
    make_run(tmp_path / "each_epoch" / "seed_0", [0.9] * 6)
    make_run(tmp_path / "validated" / "seed_0", [0.8] * 6, name="val_accuracy")
    tested = make_run(tmp_path / "tested" / "seed_0", [0.8] * 6, name="val_accuracy")
    (tested / "test").mkdir()
    (tested / "test" / "metrics.csv").write_text("epoch,step,test_accuracy,test_loss\n6,60,0.7,1.0\n")
    (tested / "test" / "config.yaml").write_text((tested / "config.yaml").read_text())  # which is no run of its own
    errors = {row.arm: (row.error_of, round(row.error, 6)) for row in table(load_runs(tmp_path)).itertuples()}
    assert errors == {
        "each_epoch": ("test error", 10),
        "validated": ("validation error", 20),
        "tested": ("test error of one checkpoint", 30),
    }
    assert read(tmp_path)[1] == {}  # what the command test wrote is no run, and none that was left out
    output = report(capsys, tmp_path)
    for heading in (
        "### Test error, mean of the last 5 epochs",
        "### Test error of one checkpoint\n",
        "### Validation",
    ):
        assert heading in output


def test_csv_and_markdown_hold_the_same_numbers_sorted_by_error(tmp_path, capsys):
    for arm, shift in (("a_worse", 0.1), ("b_better", 0.0)):
        for seed in range(3):
            make_run(tmp_path / arm / f"seed_{seed}", [x - shift - 0.013 * seed for x in FALLING], seed, lr=0.1107)
    report(capsys, tmp_path, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.csv")
    lines = path.with_suffix(".md").read_text().splitlines()
    assert path.with_suffix(".md").read_text().split("\n", 2)[2].strip() in (tmp_path / "out" / "report.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    csv = pd.read_csv(path)
    assert list(csv.arm) == ["b_better", "a_worse"]
    for row, shown in zip(csv.itertuples(), cells, strict=True):
        expected = [row.arm, str(row.runs), f"{row.error:.2f}", f"{row.low:.2f} to {row.high:.2f}", "0.1107", "-"]
        assert shown == expected


def test_what_is_no_run_is_left_out_with_the_reason_and_no_traceback(tmp_path, capsys):
    make_run(tmp_path / "arm" / "seed_0")
    damage = {
        "empty": ("metrics.csv", b"", "metrics.csv is empty"),
        "header": ("metrics.csv", b"epoch,step\n", "metrics.csv is empty"),
        "ragged": ("metrics.csv", b'a,b\n1,2\n1,2,3,4\n"', "metrics.csv cannot be read"),
        "binary": ("metrics.csv", b"\xff\xfe\x00\x81" * 9, "metrics.csv"),
        "yaml": ("config.yaml", b"a: [1\nb: }", "config.yaml cannot be read"),
        "bytes": ("config.yaml", b"\xff\xfe\x81", "config.yaml cannot be read"),
        "list": ("config.yaml", b"- 1\n- 2\n", "config.yaml is none of a fit"),
        "other": ("config.yaml", b"model: 3\n", "config.yaml is none of a fit"),
        "tested": ("metrics.csv", b"epoch,step,test_loss\n6,60,0.1\n", "metrics.csv has neither train_loss"),
        "tagged": ("config.yaml", b"a: !!python/object:os.system {}\n", "config.yaml cannot be read"),
    }
    for name, (file, content, _) in damage.items():
        (make_run(tmp_path / name / "seed_0") / file).write_bytes(content)
    started = make_run(tmp_path / "started" / "seed_0")
    (started / "metrics.csv").unlink()
    output = report(capsys, tmp_path)
    assert "| arm | 1 |" in output
    for name, (_, _, reason) in damage.items():
        assert f"{name}/seed_0: {reason}" in output, name
    assert "started/seed_0: no metrics.csv yet" in output


def nodes(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from nodes(inner, (*path, key))


def test_whatever_a_config_holds_reading_ends_in_a_table_or_a_reason(tmp_path):
    whole, odd = make_run(tmp_path / "arm" / "seed_0"), make_run(tmp_path / "arm" / "seed_1", seed=1)
    junk = [None, -1.5, "text", {"a": 1}, [{"class_path": 7}]]
    for path, value in itertools.product([path for path in nodes(CONFIG) if path], junk):
        config = copy.deepcopy({**CONFIG, "seed_everything": 1})
        part = config
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        (odd / "config.yaml").write_text(yaml.safe_dump(config))
        runs, omitted = read(tmp_path)
        assert {*runs.folder, *omitted} == {str(whole), str(odd)}, (path, value)
        if path[0] == "model":  # never averaged with the other
            assert set(table(runs).runs) == {1}, (path, value)


def test_no_runs_are_an_empty_table(tmp_path):
    assert load_runs(tmp_path).empty
    assert table(load_runs(tmp_path)).empty


def test_mistakes_end_with_a_line_and_status_2(tmp_path, capsys):
    assert "there is no such folder" in report(capsys, tmp_path / "nowhere", status=2)
    assert "no runs (folders with config.yaml and metrics.csv)" in report(capsys, tmp_path, status=2)
    run = make_run(tmp_path / "arm" / "seed_0")
    (run / "config.yaml").write_text("{")
    assert "config.yaml cannot be read" in report(capsys, tmp_path, status=2)
    make_run(tmp_path / "arm" / "seed_1")
    assert "--last 0" in report(capsys, tmp_path, "--last", 0, status=2)
    assert "cannot be loaded" in report(capsys, tmp_path, "--distributions", tmp_path / "arm" / "seed_1", status=2)
    assert "arm" in report(capsys, tmp_path)  # without the option, such a run is no mistake


@pytest.mark.parametrize("package", ["pandas", "matplotlib"])
def test_without_the_extra_it_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; from lightning_danns.report.__main__ import main; main(['.'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'pip install -e ".[study]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_diverged_run_is_averaged_and_named(tmp_path, capsys):
    run = make_run(tmp_path / "arm" / "seed_0")
    (run / "metrics-1.csv").write_text(rows([0.5, 0.6]))  # at first all was well
    (run / "metrics.csv").write_text(rows([0.1] * 5, start=1, loss="nan"))
    make_run(tmp_path / "arm" / "seed_1", [0.1] * 6, seed=1)
    runs = load_runs(tmp_path)
    assert dict(zip(runs.seed, runs.diverged, strict=True)) == {0: True, 1: False}
    output = report(capsys, tmp_path)
    assert "| arm | 2 | 90.00 |" in output
    assert "arm, seed 0: training loss is no number" in output


def test_trials_of_a_sweep_are_in_no_table_and_end_as_the_sweep_says(tmp_path):
    from lightning_danns.report.figures import learning_rate_points

    trials = tmp_path / "arm" / "trials"
    for number, (lr, epochs) in enumerate([(0.1, 6), (0.01, 2), (1.0, 3)]):
        values = [0.8, 0.9, 0.85, 0.8, 0.8, 0.8][:epochs]
        make_run(trials / f"{number:04d}", values, lr=lr, name="val_accuracy", checkpoint=False)
    (tmp_path / "arm" / "trials.csv").write_text(
        "number,state,value,model.optimizer.lr\n0,complete,1,0.1\n1,pruned,2,0.01\n2,diverged,,1.0\n3,diverged,,9.0\n"
    )
    runs = load_runs(tmp_path)
    assert table(runs).empty
    assert str(runs.seed[0]) == "0"  # also beside trials whose seed is unknown
    points = learning_rate_points(runs, last=5).set_index("lr")
    assert dict(points.state) == {0.1: "finished", 0.01: "stopped", 1.0: "diverged", 9.0: "diverged"}
    assert points.error[0.1] == pytest.approx(10)  # of the best epoch
    assert set(points.family) == {"arm"}


def test_two_sweeps_of_one_name_are_told_apart_by_what_neither_searches(tmp_path):
    for epochs, rates in ((3, [0.1, 0.2]), (6, [0.1, 0.4])):
        for number, lr in enumerate(rates):
            folder = tmp_path / f"sweeps_{epochs}" / "arm" / "trials" / f"{number:04d}"
            make_run(folder, FALLING[:epochs], lr=lr, name="val_accuracy", trainer={"max_epochs": epochs})
    make_run(tmp_path / "more" / "arm" / "trials" / "0000", lr=0.8, name="val_accuracy")  # more values of the second
    runs = load_runs(tmp_path)
    rates = runs.groupby("arm").lr.unique().map(sorted)
    assert dict(rates) == {"arm (max_epochs=3)": [0.1, 0.2], "arm (max_epochs=6)": [0.1, 0.4, 0.8]}


def test_replicas_are_runs_of_their_own(tmp_path):
    many = make_run(tmp_path / "many")
    config = yaml.safe_load((many / "config.yaml").read_text())
    single = {**config, "seed_everything": 5}
    (many / "config.yaml").write_text(
        yaml.safe_dump({**config, "model": {"class_path": "lightning_danns.ReplicatedClassifier"}})
    )
    (many / "metrics.csv").write_text(
        "epoch,step,train_accuracy,train_accuracy/0,train_accuracy/1,test_accuracy,test_accuracy/0,test_accuracy/1\n"
        + "".join(f"{epoch},{epoch},0.5,0.5,0.5,0.7,0.6,0.8\n" for epoch in range(6))
    )
    for k in (0, 1):
        folder = many / "replicas" / str(k)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        (folder / "config.yaml").write_text(yaml.safe_dump({**single, "seed_everything": k}))
    (row,) = table(load_runs(tmp_path)).itertuples()
    assert (row.arm, row.runs, row.error) == ("MLP", 2, pytest.approx(30))
    assert row.high > 100  # 20 and 40 %: not the mean of the replicas twice


def test_seconds_of_an_epoch_are_of_epochs_in_one_process(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    run = make_run(tmp_path / "arm" / "seed_0")
    for start in (1000.0, 9000.0):  # the second process started long after the first had ended
        writer = SummaryWriter(str(run), filename_suffix=f".{start:.0f}")
        for epoch, seconds in enumerate([0, 10, 20, 31]):
            writer.add_scalar("train_loss", 0.5, epoch, walltime=start + seconds)
        writer.close()
    assert table(load_runs(tmp_path)).seconds[0] == 10


def test_figures_are_drawn_for_each_table_with_their_text_as_text(tmp_path, capsys):
    for arm, shift in (("one", 0.1), ("two", 0.0)):
        for seed in range(2):
            run = make_run(tmp_path / arm / f"seed_{seed}", [x - shift - 0.01 * seed for x in FALLING], seed)
    log = pd.read_csv(run / "metrics.csv")
    log["network.1/z_std"], log["val_accuracy/3"], log["lr-SGD/network.1.Wex"] = 0.9, 0.5, 0.1
    log.to_csv(run / "metrics.csv", index=False)
    report(capsys, tmp_path)
    stem = "mnist_val_size_0"
    names = {f"{stem}_test_error_curves", f"{stem}_test_error_seeds", f"{stem}_two_diagnostics"}
    for kind in ("png", "svg"):
        assert {path.stem for path in (tmp_path / "report").glob(f"*.{kind}")} == names
    written = (tmp_path / "report" / "report.md").read_text()
    assert all(f"({name}.png)" in written for name in names)
    texts = {
        name: {
            text.text for text in ET.parse(tmp_path / "report" / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")
        }
        for name in names
    }
    assert {"one", "two", "epoch", "test error (%)"} <= texts[f"{stem}_test_error_curves"]
    assert {"one", "two", "test error (%)"} <= texts[f"{stem}_test_error_seeds"]
    assert {"z_std", "network.1", "epoch"} <= texts[f"{stem}_two_diagnostics"]
    assert not {"3", "network.1.Wex", "lr-SGD"} & texts[f"{stem}_two_diagnostics"]


def test_an_arm_looks_alike_everywhere_and_unlike_all_others():
    from lightning_danns.report.style import styles

    looks = styles(map(str, range(24)))
    without_colour = {(look["marker"], str(look["linestyle"])) for look in looks.values()}
    assert len(without_colour) == len(looks)


def test_distributions_are_those_of_the_network(run, data_dir, capsys):
    from lightning_danns.report.distributions import activity, trained_dann, weights

    run("fit", "--model=DANNMLP", "--model.hidden_sizes=[12]", "--data=MNISTDataModule", "--data.val_size=0",
        "--data.test_each_epoch=true", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--run_dir=a/seed_0",
        "--trainer.enable_progress_bar=false")  # fmt: skip
    folder = data_dir / "a" / "seed_0"
    model, batches = trained_dann(folder)
    first = model.network[1]
    found = weights(model)
    assert [*found] == ["network.1", "network.3"]
    # each unit's answer to one pixel alone is its net weight
    pixels = torch.eye(784)
    parts = first.components(pixels)
    torch.testing.assert_close(found["network.1"]["Wex - Wei Wix"], (parts.z_e - parts.subtraction).T)
    with np.load(data_dir / "mnist.npz") as file:
        images = torch.from_numpy(file["x_test"]).flatten(1) / 255
    z = first(images)
    drawn = activity(model, batches)
    assert "h" not in drawn["network.3"]
    assert drawn["network.1"]["z"].min() >= z.min() - 1e-5
    share = float((drawn["network.1"]["h"] == 0).float().mean())
    assert share == pytest.approx(float((z <= 0).float().mean()), abs=0.02)
    report(capsys, "a")
    assert {"weights.png", "weights.svg", "activity.png", "activity.svg"} <= {
        path.name for path in (data_dir / "a" / "report").iterdir()
    }
    assert list(table(load_runs("a")).arm) == ["a"]


def test_names_too_long_for_a_file_stay_different(tmp_path, capsys):
    for size in (8, 9):
        make_run(tmp_path / "arm" / f"seed_{size}", data={"note": "y" * 300 + str(size)})
    report(capsys, tmp_path)
    assert len(list((tmp_path / "report").glob("*.csv"))) == 2


def test_folders_may_be_given_as_text_and_must_exist(tmp_path):
    make_run(tmp_path / "arm" / "seed_0")
    assert len(load_runs(str(tmp_path))) == 6
    with pytest.raises(UsageError, match="nowhere"):
        load_runs("nowhere")
