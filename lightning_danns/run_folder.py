"""The folder of a run: its name, whose it is, and what is left in it."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from lightning_danns.errors import UsageError

RUN_NAME = "LIGHTNING_DANNS_RUN_NAME"


def folder_of(run_dir: str, command: str) -> Path:
    """Where a command writes: a fit into the folder of the run, the others below it."""
    return Path(run_dir) if command == "fit" else Path(run_dir) / command


def run_name() -> str:
    """A name for a run, the same in all its processes, although they start at different times.

    Raises:
        UsageError: there are several processes, and nothing names what they share.
    """
    environment = os.environ
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return f"{environment['SLURM_JOB_ID']}_{environment['SLURM_STEP_ID']}"
    if environment.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return environment["TORCHELASTIC_RUN_ID"]
    if _is_rank_zero() and "TORCHELASTIC_RUN_ID" not in environment:
        environment[RUN_NAME] = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"  # Lightning starts the other processes with it
    if RUN_NAME not in environment:
        raise UsageError("several processes need a common folder: give --run_dir (or torchrun --standalone)")
    return environment[RUN_NAME]


def refuse_used_folder(folder: Path) -> None:
    """A fresh fit must not overwrite the checkpoints of an earlier one. (SLURM requeues find theirs by themselves.)"""
    # in every process, so that none waits for one that has left
    if (folder / "checkpoints").exists() and not any(folder.glob("hpc_ckpt_*")):
        raise UsageError(
            f"run folder {folder} holds the checkpoints of an earlier fit: continue that one with --ckpt_path last, "
            "or choose another --run_dir"
        )


def last_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What ``last.ckpt`` of the run in ``folder`` holds; None if there is none, or it is damaged."""
    try:
        content = torch.load(folder / "checkpoints" / "last.ckpt", "cpu", weights_only=True, mmap=True)
    except Exception:  # of whatever kind: a fit that goes on from it will say
        return None
    return content if isinstance(content, dict) and {"loops", "callbacks"} <= content.keys() else None


def stopped_early(checkpoint: dict[str, Any]) -> bool:
    """Whether EarlyStopping has ended the fit that ``checkpoint`` is from, so that there is nothing left to train."""
    return any(isinstance(state, dict) and state.get("stopped_epoch") for state in checkpoint["callbacks"].values())


@contextmanager
def undone_if(mistake: Callable[[Exception], Any], folder: Path) -> Iterator[None]:
    """Leave ``folder`` as it was if a command ends in a user's mistake before it has saved a checkpoint."""

    def checkpoints() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")}

    def logs() -> set[Path]:
        written = (
            *("config.yaml", "environment.yaml", "hparams.yaml", "metrics*.csv", "replicas.csv", "replicas_test.csv"),
            f"events.out.tfevents.*.{os.getpid()}.*",
        )
        return {path for kind in written for path in folder.glob(kind)}

    missing = [path for path in (folder / "checkpoints", folder, *folder.parents) if not path.exists()]
    saved, before = checkpoints(), logs()
    contents = {path: path.read_bytes() for path in before if path.suffix in (".csv", ".yaml")}
    try:
        yield
    except Exception as error:
        if _is_rank_zero() and mistake(error) is not None and checkpoints() == saved:
            for path in logs() - before:
                path.unlink()
            for path, content in contents.items():
                path.write_bytes(content)
            for path in missing:
                with suppress(OSError):  # somebody else has written there
                    path.rmdir()
        raise


@contextmanager
def earlier_kept(path: Path) -> Iterator[None]:
    """Give a log of an earlier start in the same folder another name, because the logger would wipe it."""
    if not (path.exists() and _is_rank_zero()):
        yield
        return
    number = 1
    while (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(earlier)
    try:
        yield
    finally:
        if not path.exists():  # nothing was logged here: a fit that was at its end already, or somebody's own logger
            earlier.rename(path)


def environment(device: str) -> dict[str, Any]:
    """What a run depends on beside its config: versions, commit of this package's repository, device and threads."""
    packages = ("lightning-danns", "torchvision", "pytorch-lightning", "torchmetrics", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "torch": str(torch.__version__),  # with its build
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} ({_processor()})",
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit that this package's files are from, marked if they have been changed since; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # it may lie installed in somebody else's repository
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    with suppress(OSError):  # Linux, where platform.processor() is empty
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
