"""Several processes of one run, forked from the test, with the variables that torchrun or srun would give them."""

import os
import signal
import socket
import time
import traceback

from pytorch_lightning.utilities import rank_zero_only


def torchrun(rank, count, port):
    return {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "a-run",
    }  # fmt: skip


def srun(rank, count, port):
    return {
        "SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count, "SLURM_PROCID": rank, "SLURM_LOCALID": rank,
        "SLURM_NODEID": 0, "SLURM_NNODES": 1, "SLURM_JOB_ID": 41234, "SLURM_STEP_ID": 0, "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost", "MASTER_PORT": port,
    }  # fmt: skip


def start(work, count, launcher=torchrun):
    """Starts ``work(rank)`` in ``count`` processes; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update({name: str(value) for name, value in launcher(rank, count, port).items()})
                rank_zero_only.rank = rank
                work(rank)
                status = 0
            except SystemExit as exit_:
                status = int(exit_.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return children


def wait(children, timeout=60):
    """Exit statuses of the processes (-9 for a killed one); ends them, and fails, when the time is up."""
    statuses = {}
    end = time.monotonic() + timeout
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (result := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(result[1])
        if time.monotonic() > end:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise TimeoutError(f"still running after {timeout} s; the others ended with {statuses}")
        time.sleep(0.02)
    return [statuses[child] for child in children]
