"""Rooms import in one direction, and only what they need."""

import subprocess
import sys

import pytest

import lightning_danns

HEAVY = ("pytorch_lightning", "torchvision", "tensorboard", "mlxtend", "pandas", "jsonargparse")
BOTTOM = ("initialization", "layers", "optim", "networks", "analysis", "testing")


def loaded_after(*statements):
    """Which heavy packages are loaded after each statement, in one new interpreter."""
    told = f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    code = f"import sys\nfor statement in {statements!r}:\n exec(statement)\n {told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_bottom_rooms_are_plain_torch_and_modules_load_no_package_of_images():
    rooms = [f"import lightning_danns.{room}" for room in BOTTOM]
    names = "from lightning_danns import DANNLinear, fisher_param_groups, project_"
    modules = "from lightning_danns import DANNMLP, MNIST5kDataModule"
    *plain, loaded = loaded_after(*rooms, names, modules)
    assert plain == [[]] * (len(rooms) + 1)
    assert "pytorch_lightning" in loaded
    assert not {"mlxtend", "pandas", "tensorboard"} & {*loaded}


def test_every_public_name_exists():
    for name in lightning_danns.__all__:
        assert getattr(lightning_danns, name).__name__ == name
    assert set(lightning_danns.__all__) <= set(dir(lightning_danns))
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = lightning_danns.NoSuchLayer
