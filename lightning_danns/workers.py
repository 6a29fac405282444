"""Processes that share the work in a folder, on one machine or several: who does what, and how they end."""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_danns.errors import UsageError

LEASE_SECONDS = 60.0
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


class ArgumentParser(argparse.ArgumentParser):
    """Options of a tool; those it does not know are for ``train.py fit``. Mistakes are a line, and status 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        print(f"error: {message}\nall options: {self.prog} --help", file=sys.stderr)
        self.exit(2)

    def parse_with_rest(self, args: Sequence[str], given: Sequence[str] = ()) -> tuple[argparse.Namespace, list[str]]:
        """The tool's options, and the arguments for ``train.py fit``, which may not include those it is ``given``.

        Raises:
            UsageError: for an argument that the tool gives to ``fit`` itself, or a number of processes below 1.
        """
        options, rest = self.parse_known_args(args)
        for option in rest:
            if option.partition("=")[0] in ("--run_dir", "--ckpt_path", *given):
                raise UsageError(f"{option}: leave it out, {self.prog} gives it to each run")
        if rest and not rest[0].startswith("-"):
            raise UsageError(f"{rest[0]!r} belongs to no option")
        if options.jobs < 1:
            raise UsageError(f"--jobs {options.jobs}: at least one process must work")
        return options, rest


def configs(fit_args: Sequence[str]) -> list[Path]:
    """The config files among arguments of ``train.py fit``.

    Raises:
        UsageError: one does not exist.
    """
    following = [value for option, value in pairwise(fit_args) if option == "--config"]
    joined = [argument.removeprefix("--config=") for argument in fit_args if argument.startswith("--config=")]
    for path in [*following, *joined]:
        if not Path(path).is_file():
            raise UsageError(f"config {path} does not exist")
    return [Path(path) for path in [*following, *joined]]


def lease(path: Path, lost: Callable[[], Any] | None = None) -> Any:
    """A lock that one process holds while it lives, also among machines that share a file system.

    The file ``path`` is created exclusively and touched every few seconds. Others take it over at once if it names a
    process of their machine that is dead, and else if they have not seen it touched for `LEASE_SECONDS` by their own
    clock. ``lost`` is called if that happens although this process lives: it was stopped or cut off.

    Raises:
        UsageError: filelock is too old.
    """
    try:
        from filelock import SoftFileLease
    except ImportError as error:
        raise UsageError('this needs filelock 3.30 or newer: pip install -e ".[study]"') from error
    return SoftFileLease(
        path.resolve(),
        lease_duration=LEASE_SECONDS,
        on_compromise=(lambda _: lost()) if lost else None,
        thread_local=False,
        poll_interval=0.2,
    )


def taken(lock: Any) -> bool:
    """Whether ``lock`` is now held here: it was free, or its holder is dead."""
    from filelock import Timeout

    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def start(module: str, args: Iterable[str], log: Path, jobs: int, index: int = 0) -> subprocess.Popen[bytes]:
    """Start ``python -m module args``, one of ``jobs`` processes, which appends its output to ``log``.

    It has its share of the cores (unless OMP_NUM_THREADS is set) and, if CUDA_VISIBLE_DEVICES lists several, one of
    the GPUs. Ctrl-C does not reach it, and it ends with this process if it calls `end_with_parent`.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // jobs)), **os.environ}
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if jobs > 1 and len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process, started by `start`, when its parent has ended in whatever way: its standard input closes."""

    def watch() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock would be in the way of an ordinary end
        os._exit(1)  # at once: checkpoints are replaced whole, and all else is continued by the next start

    threading.Thread(target=watch, daemon=True).start()


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End them in order: at the end of a step if they train, after half a minute in any case."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_lines(log: Path) -> str:
    """The last line of a log that holds something, or its last mistake, if that is among the last five."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines[-5:], start=max(0, len(lines) - 5)):
        if line.startswith("error: "):
            return "\n".join(lines[number:])
    return lines[-1] if lines else "no output"


def exit_on_mistake(work: Callable[[], int]) -> int:
    """The exit status of ``work``; 2 and a line of text for a user's mistake, 130 for Ctrl-C."""
    try:
        return work()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130
