"""The contract of the Triton kernels, file by file, in processes that interpret them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parent / "contract"
pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")


@pytest.mark.timeout(900)  # a process of a hundred tests, and machines may be busy
@pytest.mark.parametrize("name", sorted(path.stem for path in CONTRACT.glob("test_*.py")))
def test_the_contract_holds_in_the_interpreter(name):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "NORMKIT_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CONTRACT / f"{name}.py"],
        env=inherited | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert re.search(r"^[1-9]\d* passed in ", done.stdout, re.MULTILINE), report  # none skipped
