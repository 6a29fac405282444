"""The notebooks of docs/ run with small settings, and are kept with the output of a run on real data.

To run one anew, in a folder where Jupyter is installed:

    DANN_DATA=FOLDER_OF_NPZ_FILES jupyter nbconvert --to notebook --execute --inplace \
        --ExecutePreprocessor.record_timing=False docs/notebooks/1_first_dann.ipynb
"""

import json
import logging
import re
from pathlib import Path

import pytest
from conftest import write_data

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
OWN_DATA = NOTEBOOKS[:3]
"""Those that run on arrays; tests/test_brain_notebook.py runs the one that needs photographs."""


def cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small settings, small data, and a process that is afterwards as it was."""
    plt = pytest.importorskip("matplotlib.pyplot")
    write_data(tmp_path, "mnist", n_train=2_200)
    write_data(tmp_path, "cifar10", n_train=1_100, shape=(32, 32, 3))
    monkeypatch.setenv("DANN_DATA", str(tmp_path))
    monkeypatch.setenv("DANN_NOTEBOOK_SMALL", "1")
    monkeypatch.chdir(tmp_path)
    backend, level = plt.get_backend(), logging.getLogger("pytorch_lightning").level
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)
    logging.getLogger("pytorch_lightning").setLevel(level)


@pytest.mark.parametrize("notebook", OWN_DATA, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, small, capsys):
    names = {"__name__": "__main__"}
    for k, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {k + 1}", "exec"), names)
    assert "False" not in capsys.readouterr().out  # what they print of equations and reloading
    assert all(history["train_loss"].notna().all() for history in names["histories"].values())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_the_output_of_one_whole_run(notebook):
    kept = cells(notebook)
    assert [cell["execution_count"] for cell in kept] == list(range(1, len(kept) + 1))
    outputs = [output for cell in kept for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not re.findall(r"/(?:root|home|Users|tmp|work)/", notebook.read_text())
    assert notebook.stat().st_size < 300_000
