"""What a record says about the machine and the code that made it."""

import hashlib
import os
import platform
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from normkit.kernels.cpu import instruction_set
from normkit.kernels.select import decide
from normkit.lab.frozen import Frozen
from normkit.version import __version__

PACKAGE = Path(__file__).parents[1]
CODE_SUFFIXES = (".py", ".so")  # the compiled kernels stand for their sources
# cannot change what a run of compare does
UNINVOLVED = ("cli/", "lab/bench/", "lab/report/", "lab/reproduce/")


class Environment(Frozen):
    """Versions and hardware of one run; older records do not say their kernels and version."""

    torch: str
    python: str
    platform: str
    device: str
    threads: int
    date: str
    kernels: str | None = None
    normkit: str | None = None


def describe_environment(device: torch.device, threads: int) -> Environment:
    """Environment of a run that starts now.

    Args:
        device: Where the run computes.
        threads: CPU threads that it may use.
    """
    return Environment(
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        device=_device_name(device),
        threads=threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        kernels=_kernels_name(device),
        normkit=__version__,
    )


def memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kernels_name(device: torch.device) -> str:
    kernels = decide(torch.empty(1, device=device), is_computed=False).kernels
    return f"cpu ({instruction_set()})" if kernels == "cpu" else kernels


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


@cache
def code_hash(*involved: str) -> str:
    """Twelve hexadecimal digits over sources and compiled kernels that decide what a run does.

    Args:
        involved: Folders that a run of ``compare`` does without and this one does not.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in CODE_SUFFIXES):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(involved) or not name.startswith(UNINVOLVED):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
