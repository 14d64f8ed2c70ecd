"""The C++ library beside another torch than the one it was built beside: it is on the stable ABI.

``NORMKIT_OTHER_LIBRARY`` names one that was built elsewhere; `make test-oldest` gives each
environment the other's.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import normkit
from normkit.kernels.cpu import library

ROOT = Path(__file__).parents[2]
PRINT_RESULTS = """
import torch, normkit as nk
assert nk.kernels.cpu.why_not() is None, nk.kernels.cpu.why_not()
torch.manual_seed(0)
for layer in (nk.BatchNorm(6), nk.GroupNorm(6, num_groups=3), nk.PositionalNorm(6),
              nk.BatchGroupNorm(6, num_groups=9), nk.GhostBatchNorm(6, ghost_batch_size=2),
              nk.BatchChannelNorm(6, num_groups=2, micro_batch=True), nk.SwitchableNorm(6)):
    for x in (torch.randn(4, 6, 3, 5), torch.randn(4, 6, 3, 5).bfloat16()):
        for training in (True, False):
            x = x.detach().requires_grad_()
            y = layer.train(training)(x)
            grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
            print([t.double().sum().item() for t in (y, *grads, *layer.buffers())])
"""


def results(package):
    """What a process prints that imports the package from this folder."""
    environment = {k: v for k, v in os.environ.items() if k != "NORMKIT_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_RESULTS], capture_output=True, text=True, check=False,
        env=environment | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_library_built_beside_another_torch_gives_the_same(tmp_path):
    other = os.environ.get("NORMKIT_OTHER_LIBRARY")
    if other is None:
        pytest.skip("NORMKIT_OTHER_LIBRARY is not set (make test-oldest sets it)")
    package = Path(normkit.__file__).parent
    copies = {}
    for name, built in (("own", library.LIBRARY), ("other", Path(other))):
        shutil.copytree(package, tmp_path / name / "normkit",
                        ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
        shutil.copy(built, tmp_path / name / "normkit" / "kernels" / "cpu" / "_C.so")
        copies[name] = results(tmp_path / name)
    assert copies["own"].count("\n") == 28
    assert copies["other"] == copies["own"]


def test_the_oldest_torch_is_one_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (promised,) = (d for d in project["project"]["dependencies"] if d.startswith("torch"))
    tried = re.search(r"^torch==(.*)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    built = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "normkit_build.py").read_text())
    oldest = ".".join(built.groups())
    assert promised == f"torch>={oldest}"
    assert tried.group(1) == f"{oldest}.0"
    assert torch.__version__ >= oldest
