"""What users get: wheel, sdist, version, types; and what contributors read."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import QUIET, SMALL, write_data

import lightning_danns

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of a fresh environment that holds the wheel and sees the libraries here, but not the clone."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/*/site-packages"))
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    libraries = [path for path in sys.path if path.endswith("-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))  # their own .pth, as that of the clone, are not followed
    return folder / "bin" / "python"


def outside(folder, python, *command):
    """What a command prints in ``folder``, away from the clone, with the installed package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def files(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}


def is_junk(name):
    return "__pycache__" in name or "_checkpoints" in name or name.endswith((".pyc", ".ckpt", ".DS_Store", "~"))


def test_the_wheel_holds_the_package_its_licence_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == {
        n for n in files("lightning_danns") if not is_junk(n)
    }
    assert "lightning_danns/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_tests_read_and_no_junk(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {name for folder in ("tests", "configs", "examples", "docs") for name in files(folder)}
    assert names >= {name for name in wanted if not is_junk(name)} | {"train.py", "pyproject.toml", "README.md"}
    assert not [name for name in names if is_junk(name) or name.startswith((".git/", ".venv", "runs/", "data/"))]


def test_the_version_is_the_newest_release_everywhere(built):
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert lightning_danns.__version__ == newest
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == newest
    assert built[0].name.startswith(f"lightning_danns-{newest}-")


def test_the_changelog_opens_with_what_is_unreleased_and_uses_known_headings():
    headings = re.findall(r"^(#+) (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(text for level, text in headings if level == "##") == "[Unreleased]"
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert {text for level, text in headings if level == "###"} <= known


def test_the_installed_package_trains_without_the_clone(installed, tmp_path):
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    where = outside(tmp_path, installed, "-c", "import lightning_danns; print(lightning_danns.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    outside(tmp_path, installed, "-m", "lightning_danns", "fit", *SMALL, *QUIET, "--trainer.max_epochs=1",
            "--run_dir=run")  # fmt: skip
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    environment = yaml.safe_load((tmp_path / "run" / "environment.yaml").read_text())
    assert (environment["lightning-danns"], environment["commit"]) == (lightning_danns.__version__, None)


@pytest.mark.slow
def test_a_strict_type_checker_of_a_user_reads_the_types(installed, tmp_path):
    (tmp_path / "consumer.py").write_text((ROOT / "tests" / "consumer.py").read_text())
    check = ["-m", "mypy", "--strict", "--config-file=", "consumer.py"]
    assert "Success" in outside(tmp_path, installed, *check)


def test_the_code_of_the_type_checked_user_runs():
    import consumer

    for part in (consumer.layers, consumer.own_loop, consumer.modules, consumer.conversion):
        part()


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:lightning_danns|tests|configs|examples|docs|\.ci)/[\w./]*)`", text)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
