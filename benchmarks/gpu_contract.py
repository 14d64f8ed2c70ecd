"""Whether the kernels are right on this GPU: the tests' contract, and results beside float64."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile

import torch
from gpu_device import ROOT

import normkit as nk

CONTRACT = "tests/kernels/triton/contract"
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 3e-5}  # of the largest value
MOST_PROCESSES = 14


def run_contract(limit_s, only=None):
    """All of the contract by pytest, in as many processes as there are cores.

    Args:
        limit_s: When it is cut off.
        only: A test's words (pytest's ``-k``).

    Returns:
        The exit status (None: cut off), how many tests passed and failed, and the last lines.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
               f"--rootdir={ROOT}", f"--confcutdir={CONTRACT}", "--import-mode=importlib",
               *_processes(), *(["-k", only] if only else []), CONTRACT]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "NORMKIT_"))}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        status = _ended(process, limit_s)
        output.seek(0)
        return {"status": status, **counted(output.read())}


def _processes():
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(min(MOST_PROCESSES, (os.cpu_count() or 2) - 2), 1))]


def _ended(process, limit_s):
    """Its exit status; None if it was ended with all its processes, for they would go on."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def counted(output):
    """How many tests pytest says have passed and failed; of a run cut off, by its dots."""
    end = output.strip().splitlines()[-1:] or [""]
    if " in " in end[0]:
        found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", end[0])}
    else:
        dots = "".join(re.findall(r"^[.sxFE]+", output, re.MULTILINE))
        found = {"passed": dots.count("."), "failed": dots.count("F"), "error": dots.count("E")}
    percent = re.findall(r"\[ *(\d+)%\]", output)[-1:] or ["0"]
    return {
        "percent": int(percent[0]),
        "passed": found.get("passed", 0),
        "failed": found.get("failed", 0) + found.get("error", 0),
        "end": output[-1500:] if found.keys() != {"passed"} else end[0],
    }


def check(norm, x, grad):
    """Largest differences of a norm's results from the formula in float64, of the largest value."""
    layer, twin = (nk.build(norm, x.shape[1]).to(x.device) for _ in range(2))
    why = nk.explain(layer, x)
    found = _results(layer, x, grad)
    with nk.use_kernels("reference"):
        expected = _results(twin.double(), x.double(), grad.double())
    worst = max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )
    held = worst <= TOLERANCE[x.dtype] and why.kernels == "triton"
    return {"norm": norm, "kernels": why.kernels, "error": worst, "held": held}


def _results(layer, x, grad):
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]
