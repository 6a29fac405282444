"""The report: numbers against computations by hand, and folders that are no runs or not whole."""

import copy
import itertools
import math
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pandas as pd
import pytest
import yaml

from lightning_danns.errors import UsageError
from lightning_danns.study import command
from lightning_danns.study.report import learning_rates, styles
from lightning_danns.study.runs import load_runs
from lightning_danns.study.tables import cell, file_name, label, table

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 6, "callbacks": None, "precision": None},
    "model": {
        "class_path": "lightning_danns.MLP",
        "init_args": {"hidden_sizes": [9], "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
    },
    "data": {"class_path": "lightning_danns.MNISTDataModule", "init_args": {"data_dir": "data", "val_size": 0}},
}
RISING = [0.5, 0.7, 0.8, 0.84, 0.86, 0.9]


def rows(values, name="test_accuracy", start=0, loss=0.5):
    """A row for each evaluation and one for each training of an epoch, as CSVLogger writes them."""
    lines = [f"epoch,step,{name},train_loss"]
    for epoch, value in enumerate(values, start):
        lines += [f"{epoch},{10 * epoch},{value},", f"{epoch},{10 * epoch},,{loss}"]
    return "\n".join(lines) + "\n"


def make_run(folder, values=RISING, seed=0, lr=0.1, name="test_accuracy", loss=0.5, result=(), **parts):
    """A run folder by hand; ``parts`` go into the part of the config that has their name."""
    config = copy.deepcopy(CONFIG)
    config["seed_everything"] = seed
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = lr
    config["trainer"] |= parts.get("trainer", {})
    for part in ("model", "data"):
        config[part]["init_args"] |= parts.get(part, {})
    folder.mkdir(parents=True)
    ended = {"ended_by": "max_epochs", "epochs": len(values), "monitor": "val_accuracy", "mode": "max"}
    if result is not None:
        (folder / "result.yaml").write_text(yaml.safe_dump(ended | dict(result)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "metrics.csv").write_text(rows(values, name, loss=loss))
    return folder


def runs_of(*folders):
    """The runs, without what was left out."""
    return load_runs(*folders)[0]


@pytest.fixture
def report(capsys):
    def report(*args, status=0):
        assert command("report", [*map(str, args)]) == status
        return "".join(capsys.readouterr())

    return report


def test_the_value_of_an_arm_is_the_mean_over_seeds_of_each_seeds_last_epochs(tmp_path):
    ends = [[0.9, 0.92, 0.91, 0.93, 0.94], [0.8, 0.82, 0.81, 0.83, 0.84], [0.95, 0.95, 0.95, 0.95, 0.95]]
    for seed, end in enumerate(ends):
        make_run(tmp_path / "arm" / f"seed_{seed}", [0.1, *end], seed)
    (row,) = table(runs_of(tmp_path)).itertuples()
    seeds = [sum(end) / 5 for end in ends]
    half = 4.302653 * statistics.stdev(seeds) / math.sqrt(3)  # t of 2 degrees of freedom, from a printed table
    assert (row.arm, row.runs, row.lr, row.metric) == ("arm", 3, 0.1, "test_accuracy")
    assert row.value == pytest.approx(statistics.mean(seeds))
    assert (row.low, row.high) == pytest.approx((row.value - half, row.value + half), rel=1e-6)
    assert list(table(runs_of(tmp_path), last=2).value) == pytest.approx([(0.935 + 0.835 + 0.95) / 3])


def test_one_seed_has_no_interval(tmp_path, report):
    make_run(tmp_path / "arm" / "seed_0")
    assert table(runs_of(tmp_path)).low.isna().all()
    assert "| arm | 1 | 0.8200 | - | 0.1 | 6 | - |" in report(tmp_path)


def test_the_table_follows_the_task(tmp_path, report):
    for arm, shift in (("a_worse", 0.1), ("b_better", 0.0)):
        loss = {"monitor": "val_loss", "mode": "min"}
        make_run(tmp_path / "r" / arm / "seed_0", [1 + shift] * 6, name="val_loss", result=loss)
        make_run(tmp_path / "c" / arm / "seed_0", [0.9 - shift] * 6, name="val_accuracy", data={"val_size": 9})
    tables = table(runs_of(tmp_path))
    assert list(tables.metric) == ["val_loss"] * 2 + ["val_accuracy"] * 2
    assert list(tables.arm) == ["b_better", "a_worse"] * 2
    assert "### val_loss, mean of the last 5 epochs" in report(tmp_path)


def test_test_data_count_before_a_checkpoint_s_and_those_before_the_monitored(tmp_path):
    make_run(tmp_path / "each_epoch" / "seed_0", [0.9] * 6)
    make_run(tmp_path / "validated" / "seed_0", [0.8] * 6, name="val_accuracy")
    tested = make_run(tmp_path / "tested" / "seed_0", [0.8] * 6, name="val_accuracy")
    (tested / "test").mkdir()
    (tested / "test" / "metrics.csv").write_text("epoch,step,test_accuracy,test_loss\n6,60,0.7,1.0\n")
    (tested / "test" / "config.yaml").write_text((tested / "config.yaml").read_text())  # which is no run of its own
    found = {row.arm: (row.metric, round(row.value, 6)) for row in table(runs_of(tmp_path)).itertuples()}
    assert found == {
        "each_epoch": ("test_accuracy", 0.9),
        "validated": ("val_accuracy", 0.8),
        "tested": ("checkpoint_test_accuracy", 0.7),
    }
    assert load_runs(tmp_path)[1] == {}


def test_of_an_epoch_in_several_logs_the_newest_counts(tmp_path):
    run = make_run(tmp_path / "arm" / "seed_0", [0.9, 0.9])
    (run / "metrics-1.csv").write_text(rows([0.1] * 5))
    (run / "metrics-2.csv").write_text(rows([0.2] * 4, start=4))
    (run / "metrics-10.csv").write_text(rows([0.3] * 3, start=7))
    (run / "metrics.csv").write_text(rows([0.4] * 3, start=9))
    runs = runs_of(tmp_path)
    assert list(runs.epoch) == list(range(12))
    assert list(runs.test_accuracy) == [0.1] * 4 + [0.2] * 3 + [0.3] * 2 + [0.4] * 3


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, report):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", RISING[:3], seed=1, result=None)
    make_run(tmp_path / "arm" / "seed_2", RISING[:4], seed=2, result={"ended_by": "other"})
    make_run(tmp_path / "arm" / "seed_3", RISING[:5], seed=3, result={"ended_by": "max_time"})
    assert list(table(runs_of(tmp_path)).runs) == [2]
    output = report(tmp_path)
    assert "arm, seed 1: 3 epochs" in output
    assert "arm, seed 2: 4 epochs" in output


def test_runs_on_different_data_have_tables_of_their_own(tmp_path):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, data={"val_size": 50})
    make_run(tmp_path / "arm" / "seed_2", seed=2, data={"data_dir": "elsewhere", "num_workers": 3, "order_seed": 1})
    assert {(row.data, row.arm, row.runs) for row in table(runs_of(tmp_path)).itertuples()} == {
        ("MNIST (val_size=0)", "arm", 2),
        ("MNIST (val_size=50)", "arm", 1),
    }


def test_runs_of_one_folder_with_different_settings_are_arms_that_say_what_differs(tmp_path):
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, lr=0.2)
    make_run(tmp_path / "arm" / "seed_2", seed=2, lr=0.2, trainer={"precision": "bf16-mixed"})
    differing = ("precision=null, lr=0.1", "precision=null, lr=0.2", "precision=bf16-mixed, lr=0.2")
    named = {frozenset(arm.removeprefix("arm (")[:-1].split(", ")) for arm in table(runs_of(tmp_path)).arm}
    assert named == {frozenset(what.split(", ")) for what in differing}


def test_without_seed_folders_an_arm_is_its_model(tmp_path):
    for day, seed in (("monday", 0), ("tuesday", 1)):
        make_run(tmp_path / "MLP" / day, seed=seed)
    make_run(tmp_path / "MLP" / "friday", seed=0, model={"hidden_sizes": [9, 9]})
    sizes = {row.arm: row.runs for row in table(runs_of(tmp_path)).itertuples()}
    assert sizes == {"MLP (hidden_sizes=[9])": 2, "MLP (hidden_sizes=[9, 9])": 1}


def test_callbacks_that_look_on_do_not_make_another_arm(tmp_path):
    watching = {"class_path": "lightning_danns.DaleDiagnostics", "init_args": {"every": 2}}
    acting = {"class_path": "lightning_danns.LayerGradientClipping", "init_args": {"max_norm": 1.0}}
    make_run(tmp_path / "arm" / "seed_0")
    make_run(tmp_path / "arm" / "seed_1", seed=1, trainer={"callbacks": [watching]})
    assert list(table(runs_of(tmp_path)).runs) == [2]
    make_run(tmp_path / "arm" / "seed_2", seed=2, trainer={"callbacks": [watching, acting]})
    assert sorted(table(runs_of(tmp_path)).runs) == [1, 2]


def test_the_same_seed_twice_counts_once(tmp_path, report):
    make_run(tmp_path / "a" / "arm" / "seed_0", RISING[:2], result=None)
    for again in "bc":
        make_run(tmp_path / again / "arm" / "seed_0")
    assert list(table(runs_of(tmp_path, tmp_path / "b")).runs) == [1]
    assert "a/arm/seed_0: arm arm has another run with seed 0" in report(tmp_path)


def test_a_fit_in_python_is_reported_under_its_folder(tmp_path, report):
    make_run(tmp_path / "arm" / "seed_0", name="val_accuracy")
    for folder in ("one/version_0", "two/version_0"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.csv").write_text(rows(RISING, "val_accuracy"))
    tables = table(runs_of(tmp_path))
    assert {row.arm: (row.runs, row.metric) for row in tables.itertuples()} == {
        "arm": (1, "val_accuracy"), "one/version_0": (1, "val_accuracy"), "two/version_0": (1, "val_accuracy"),
    }  # fmt: skip
    assert "| one/version\\_0 |" in report(tmp_path) or "| one/version_0 |" in report(tmp_path)


def test_what_cannot_be_read_is_left_out_with_the_reason(tmp_path, report):
    make_run(tmp_path / "arm" / "seed_0")
    damage = {
        "empty": ("metrics.csv", b"", "metrics.csv is empty"),
        "header": ("metrics.csv", b"epoch,step\n", "metrics.csv is empty"),
        "no epoch": ("metrics.csv", b"epoch,step,train_loss\n,1,\n", "metrics.csv is empty"),
        "ragged": ("metrics.csv", b'a,b\n1,2\n1,2,3,4\n"', "metrics.csv cannot be read"),
        "binary": ("metrics.csv", b"\xff\xfe\x00\x81" * 9, "metrics.csv"),
        "yaml": ("config.yaml", b"a: [1\nb: }", "config.yaml cannot be read"),
        "bytes": ("config.yaml", b"\xff\xfe\x81", "config.yaml cannot be read"),
        "list": ("config.yaml", b"- 1\n- 2\n", "config.yaml holds no settings"),
        "other": ("config.yaml", b"model: 3\n", "config.yaml or result.yaml is none of a fit"),
        "tagged": ("config.yaml", b"a: !!python/object:os.system {}\n", "config.yaml cannot be read"),
        "result": ("result.yaml", b"{", "result.yaml cannot be read"),
    }
    for name, (file, content, _) in damage.items():
        (make_run(tmp_path / name / "seed_0") / file).write_bytes(content)
    (make_run(tmp_path / "started" / "seed_0") / "metrics.csv").unlink()
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "events.out.tfevents.1").touch()
    output = report(tmp_path)
    assert "| arm | 1 |" in output
    for name, (_, _, reason) in damage.items():
        assert f"{name}/seed_0: {reason}" in output, name
    for name in ("started/seed_0", "board"):
        assert f"{name}: no metrics.csv: no epoch has ended, or its logger is another than CSVLogger" in output


def nodes(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from nodes(inner, (*path, key))


def test_whatever_a_config_holds_reading_ends_in_a_table_or_a_reason(tmp_path):
    whole, odd = make_run(tmp_path / "arm" / "seed_0"), make_run(tmp_path / "arm" / "seed_1", seed=1)
    junk = [None, [{"class_path": 7}]]
    for path, value in itertools.product([path for path in nodes(CONFIG) if path], junk):
        config = copy.deepcopy({**CONFIG, "seed_everything": 1})
        part = config
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        (odd / "config.yaml").write_text(yaml.safe_dump(config))
        runs, left_out = load_runs(tmp_path)
        assert {*runs.folder, *left_out} == {str(whole), str(odd)}, (path, value)
        if path[0] == "model":  # never averaged with the other
            assert set(table(runs).runs) == {1}, (path, value)


def test_mistakes_end_with_a_line_and_status_2(tmp_path, report):
    assert "there is no such folder" in report(tmp_path / "nowhere", status=2)
    assert "no runs (folders with metrics.csv)" in report(tmp_path, status=2)
    (make_run(tmp_path / "arm" / "seed_0") / "config.yaml").write_text("{")
    assert "config.yaml cannot be read" in report(tmp_path, status=2)
    assert "--last 0" in report(tmp_path, "--last", 0, status=2)
    with pytest.raises(UsageError, match="nowhere"):
        load_runs("nowhere")


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['pandas'] = None; from lightning_danns.study import command; command('report', ['.'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'studies need pip install "lightning-danns[study]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_diverged_run_is_averaged_and_named(tmp_path, report):
    run = make_run(tmp_path / "arm" / "seed_0", [0.1] * 6)
    (run / "metrics-1.csv").write_text(rows([0.5, 0.6]))  # at first all was well
    (run / "metrics.csv").write_text(rows([0.1] * 5, start=1, loss="nan"))
    make_run(tmp_path / "arm" / "seed_1", [0.1] * 6, seed=1)
    output = report(tmp_path)
    assert "| arm | 2 | 0.1000 | 0.1000 to 0.1000 | 0.1 | 6 | 1 |" in output


def test_trials_are_in_no_table_and_their_best_epochs_in_the_figure(tmp_path):
    for number, (lr, epochs) in enumerate([(0.1, 6), (0.01, 2)]):
        values = [0.8, 0.9, 0.85, 0.8, 0.8, 0.8][:epochs]
        ended = {"ended_by": "max_epochs" if epochs == 6 else "other"}
        make_run(tmp_path / "s" / "trials" / f"{number:04d}", values, lr=lr, name="val_accuracy", result=ended)
    runs = runs_of(tmp_path)
    assert table(runs).empty
    lines = learning_rates(runs, "val_accuracy", "max").axes[0].lines
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0], line.get_fillstyle()) for line in lines}
    assert drawn == {"s": (0.1, 0.9, "full"), "s, ended early": (0.01, 0.9, "none")}


def test_whole_runs_below_a_run_stand_for_it(tmp_path):
    upper = make_run(tmp_path / "many")
    for k in (0, 1):
        make_run(upper / "replicas" / str(k), [0.2 * (k + 1)] * 6, seed=k)
    (row,) = table(runs_of(tmp_path)).itertuples()
    assert (row.runs, row.value) == (2, pytest.approx(0.3))


def test_figures_are_drawn_for_each_table_with_their_text_as_text(tmp_path, report):
    for arm, shift in (("one", 0.1), ("two", 0.0)):
        for seed in range(2):
            run = make_run(tmp_path / arm / f"seed_{seed}", [x - shift - 0.01 * seed for x in RISING], seed)
    log = pd.read_csv(run / "metrics.csv")
    log["network.1/z_std"], log["val_accuracy/33"], log["lr-SGD/network.1.Wex"] = 0.9, 0.5, 0.1
    log.to_csv(run / "metrics.csv", index=False)
    backend, settings = mpl.get_backend(auto_select=False), mpl.rcParams.copy()
    report(tmp_path)
    assert (mpl.get_backend(auto_select=False), mpl.rcParams.copy()) == (backend, settings)
    written, texts = (tmp_path / "report" / "report.md").read_text(), {}
    for path in (tmp_path / "report").glob("*.svg"):
        assert f"({path.with_suffix('.png').name})" in written
        kind = next(kind for kind in ("curves", "diagnostics") if kind in path.name)
        texts[kind] = {text.text for text in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert {"one", "two", "epoch", "test_accuracy"} <= texts["curves"]
    assert {"z_std", "network.1", "epoch"} <= texts["diagnostics"]
    assert not {"33", "network.1.Wex", "lr-SGD"} & texts["diagnostics"]


def test_csv_and_markdown_hold_the_same_numbers(tmp_path, report):
    for arm, shift in (("a_worse", 0.1), ("b_better", 0.0)):
        for seed in range(3):
            make_run(tmp_path / arm / f"seed_{seed}", [x - shift - 0.013 * seed for x in RISING], seed, lr=0.1107)
    output = report(tmp_path, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.csv")
    for row in pd.read_csv(path).itertuples():
        shown = f"| {row.arm} | {row.runs} | {row.value:.4f} | {row.low:.4f} to {row.high:.4f} | 0.1107 | 6 | - |"
        assert shown in output


ODD = ["a|b", "two\nlines", "x" * 300, "$\\alpha$ $", "数据", "_hidden", "`code` <b>", "Müller µ", "\x07"]


def test_a_report_holds_any_name(tmp_path, report):
    for k, name in enumerate(ODD):
        make_run(tmp_path / f"arm{k}" / "seed_0", model={"note": name})
        (tmp_path / f"arm{k}").rename(tmp_path / (name if len(name) < 100 else name[:200]))
    output = report(tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(ODD)
    assert all(line.replace("\\|", "").count("|") == 8 for line in lines)
    for path in (tmp_path / "report").glob("*.svg"):
        assert ET.parse(path).getroot() is not None


@pytest.mark.parametrize("escape", [cell, label, file_name])
def test_differing_names_stay_different(escape):
    names = ["x" * 300, "x" * 299 + "y", "a b", "a_b", "A_B"][: 5 if escape is file_name else 2]
    assert len({escape(name) for name in names}) == len(names)
    assert max(len(escape(name)) for name in names) < 100


def test_an_arm_looks_unlike_all_others():
    looks = styles(map(str, range(56)))
    assert len({(look["marker"], look["color"]) for look in looks.values()}) == 56
