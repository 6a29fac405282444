"""The notebook of networks and brains, run on images and matrices that are made up; and what is committed of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from lightning_danns import DANNResNet, ResNet, export_pretrained

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "4_network_against_the_brain.ipynb"
PHOTOGRAPHS, PEOPLE = 24, 4


def structs(shape, **fields):
    """An array of structs as MATLAB saves it, each field filled by calls of a function."""
    array = np.empty(shape, dtype=[(name, object) for name in fields])
    for place in np.ndindex(shape):
        for name, make in fields.items():
            array[name][place] = make(*place)
    return array


@pytest.fixture
def brain(tmp_path):
    """Files in the layout of the published ones; returns images and the matrices of the two species."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (PHOTOGRAPHS, 40, 40, 3), dtype=np.uint8)
    common = rng.random((PHOTOGRAPHS, 5))
    monkey, *sessions = (pdist(common + rng.random((PHOTOGRAPHS, 5))) for _ in range(1 + PEOPLE * 2))
    human = np.mean(sessions, 0)
    stimuli = structs(
        (1, PHOTOGRAPHS), image=lambda _, k: images[k], animal=lambda _, k: k % 2, face=lambda _, k: int(k % 4 == 0)
    )
    of_species = structs((1, 2), RDM=lambda _, k: (monkey, human)[k][None])
    of_people = structs((1, PEOPLE, 2), RDM=lambda _, person, session: squareform(sessions[2 * person + session]))
    published = {"stimuli_92objs": stimuli, "RDMs_mIT_hIT_fig1": of_species}
    scipy.io.savemat(tmp_path / "Kriegeskorte_Neuron2008_supplementalData.mat", published)
    scipy.io.savemat(tmp_path / "92_brainRDMs.mat", {"RDMs": of_people})
    return images, monkey, human


@pytest.fixture
def manifest(tmp_path):
    for make, name in ((ResNet, "cifar10_resnet20_seed1"), (DANNResNet, "cifar10_dann_resnet20_seed1")):
        path = export_pretrained(make(depth=20, input_shape=(3, 32, 32)), name, tmp_path)
    return path


def printed(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    return outputs, "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


@pytest.mark.slow
def test_the_notebook_runs_on_other_photographs_and_networks(brain, manifest, monkeypatch):
    pytest.importorskip("rsatoolbox")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder = str(manifest.parent)
    settings = {"BRAIN": folder, "MANIFEST": str(manifest), "SAMPLES": "5"}
    for name, value in settings.items():
        monkeypatch.setenv(f"DANN_{name}", value)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs, text = printed(notebook.cells)
    images, monkey, human = brain
    pixels = pdist(images.transpose(0, 3, 1, 2).reshape(PHOTOGRAPHS, -1), "correlation")
    expected = {
        "pixels, monkey IT    ": spearmanr(pixels, monkey)[0],
        "pixels, human IT     ": spearmanr(pixels, human)[0],
        "monkey IT, human IT  ": spearmanr(monkey, human)[0],
    }
    for title, value in expected.items():
        assert f"{title} {value:.3f}" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "nan" not in text


def test_the_committed_notebook_holds_the_numbers_that_are_known():
    _, text = printed(json.loads(NOTEBOOK.read_text())["cells"])
    assert "monkey IT, human IT   0.439" in text
