"""Starting processes that talk through gloo, and collecting what they found."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent.parent


def start(module, size, folder, *arguments):
    """Start ``python -m MODULE RANK SIZE FOLDER ...`` for each rank."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(size), str(folder), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def results(module, size, folder, *arguments):
    """Run the processes to their end; what each has saved as ``FOLDER/RANK.pt``."""
    processes = start(module, size, folder, *arguments)
    try:
        for process in processes:
            _, errors = process.communicate(timeout=570)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def work(jobs, rank, size, folder, *names):
    """Be one of the processes: join the others, do the jobs of these names, save what they find."""
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/m", rank=rank, world_size=size)
    torch.save({name: jobs[name](rank, size) for name in names}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def kill(process):
    """End a process as a crash does."""
    process.send_signal(signal.SIGKILL)


def wait_for(path, timeout_s=120):
    """Wait for a file."""
    end = time.monotonic() + timeout_s
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
