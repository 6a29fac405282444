"""The scripts of benchmarks/ still run: on little data, and once instead of often. What they measure is not tested."""

import math
import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BALANCE = runpy.run_path(str(BENCHMARKS / "balance.py"))


@pytest.mark.parametrize("variant", BALANCE["VARIANTS"])
def test_every_part_of_balance_trains(variant):
    x, y = torch.rand(10, 3, 16, 16), torch.arange(10)
    row = BALANCE["train"](variant, 0.01, 0, (x, y, x, y))
    name, rate, last, averaged, loss, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, rate) == (variant, "0.01")
    assert 0 <= float(last) <= 100
    assert 0 <= float(averaged) <= 100
    assert math.isfinite(float(loss))


@pytest.mark.slow
@pytest.mark.parametrize("section", ["dense", "conv", "projection", "memory"])
def test_what_a_step_costs_is_measured_against_the_first_row(section):
    rows = runpy.run_path(str(BENCHMARKS / "run.py"))[section](repeats=1)
    assert len(rows) > 1
    assert all(math.isfinite(value) and value > 0 for row in rows for value in row.values() if isinstance(value, float))
