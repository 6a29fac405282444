"""Two processes on one machine train one network."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import write_data


def test_ranks_agree_to_the_bit_and_cover_the_data(tmp_path):
    write_data(tmp_path)
    script = Path(__file__).with_name("ddp_fit.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path, "2"], check=True, env=environment, timeout=300)
    first, second = (torch.load(tmp_path / f"rank{rank}of2.pt", weights_only=True) for rank in (0, 1))
    for name, weight in first["weights"].items():
        if not name.startswith("metrics"):  # each rank counts its own images
            assert torch.equal(weight, second["weights"][name]), name
    assert first["groups"] == second["groups"]
    assert first["metrics"] == second["metrics"]
    assert first["steps"] == 2 * 160 / (2 * 10)
