"""The Python of README and the site runs, prints what it says, and each public name has its place on an API page."""

import re
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import write_data
from PIL import Image

import lightning_danns

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^ *print\(.*\)\n((?:# .*\n)+)", re.MULTILINE)
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if BLOCK.search(page.read_text())
]


def blocks(text):
    """Each Python block, below as many empty lines as stand above it, so that errors name the line of the page."""
    return ["\n" * text.count("\n", 0, found.start(1)) + found[1] for found in BLOCK.finditer(text)]


def shown(block):
    """What the comments below its prints say is printed."""
    return [line[2:] for found in SHOWN.finditer(block) for line in found[1].splitlines()]


def before_finetuning(folder):
    """The checkpoint and the folder of images that the page starts from."""
    body = lightning_danns.DANNResNet(input_shape=(3, 32, 32), num_classes=4, balanced=True)
    trainer = pl.Trainer()
    trainer.strategy.connect(body)
    trainer.save_checkpoint(folder / "body.ckpt", weights_only=True)
    for k in range(6):
        place = folder / "animals" / "train" / f"class_{k}"
        place.mkdir(parents=True)
        for j in range(2):
            Image.fromarray(np.full((32, 32, 3), 40 * k + j, np.uint8)).save(place / f"{j}.png")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    monkeypatch.setattr(pl, "Trainer", partial(pl.Trainer, **small, **quiet))
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", "mnist5k", n_train=600)
    if page.stem == "finetuning":
        before_finetuning(tmp_path)
    batches = [(torch.rand(4, 1, 28, 28), torch.arange(4))]
    names = {"__name__": page.stem, "batches": batches}
    for block in blocks(page.read_text()):
        capsys.readouterr()
        exec(compile(block, str(page), "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in shown(block) if line not in printed] == []


def test_every_public_name_is_on_an_api_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^(?:::: |\[\]\(\){#)lightning_danns\.(\w+)}?$", pages, re.MULTILINE)
    assert sorted(named) == lightning_danns.__all__


def test_docstrings_reach_the_api_pages_as_markdown():
    pytest.importorskip("griffe")
    markdown = runpy.run_path(str(ROOT / "docs" / "_build" / "docstrings.py"))["markdown"]
    assert markdown("See `DANNLinear`, ``Wex`` and `d`, :math:`x \\ge 0`.") == (
        "See [`DANNLinear`][lightning_danns.DANNLinear], ``Wex`` and `d`, $x \\ge 0$."
    )
    texts = [markdown(getattr(lightning_danns, name).__doc__ or "") for name in lightning_danns.__all__]
    assert re.findall(r"math::|:math:|^ *>(?!>>).*", "\n".join(texts), re.MULTILINE) == []
    assert sum(text.count("$$") for text in texts) == 2 * 5  # two layers, columns, batch normalisation and a schedule


def test_a_formula_keeps_its_symbols():
    pytest.importorskip("latex2mathml")
    mathml = runpy.run_path(str(ROOT / "docs" / "_build" / "hooks.py"))["mathml"]
    made = mathml(r"z_e = W_{ex}\, x &gt; 0", display=False)
    assert re.findall(r"<m[ion]>(?:&#x0*)?([^<;]+)", made) == ["z", "e", "3D", "W", "ex", "x", "3E", "0"]


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_of_the_repository_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / page).parent.joinpath(target).exists()] == []
