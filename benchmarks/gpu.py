"""Checks and measures the Triton kernels on a GPU: one call, less than eight minutes.

    PYTHONPATH=src python benchmarks/gpu.py

It needs torch and triton; jaxtyping is stood in for where it is absent, and pytest, where it is
there, runs the contract. What the time does not suffice for is named in the record.
``--pretend`` goes the same way without a GPU, in triton's interpreter, on tiny maps and with a
clock of the CPU: no figure of such a record means anything.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def arguments():
    """The command line, read before triton is imported: it looks at the environment once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretend", action="store_true", help="no GPU; figures mean nothing")
    parser.add_argument("--budget-s", type=float, default=465.0, help="seconds for everything")
    parser.add_argument("--commit", help="of the code, where git does not know it")
    parser.add_argument("--out", type=Path, help="where to write the record (JSON)")
    return parser.parse_args()


class _AnyShape:
    """What jaxtyping's names are where it is absent: they are for readers and type checkers."""

    def __class_getitem__(cls, item):
        return item[0]


def stand_in_for_jaxtyping():
    """Let the library be imported where jaxtyping is not installed."""
    if importlib.util.find_spec("jaxtyping") is None:
        module = types.ModuleType("jaxtyping")
        for name in ("Float", "Int", "Shaped", "Bool"):
            setattr(module, name, _AnyShape)
        sys.modules["jaxtyping"] = module


OPTIONS = arguments()
if OPTIONS.pretend:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(ROOT / "src"))
stand_in_for_jaxtyping()
if importlib.util.find_spec("triton") is None:
    sys.exit("triton is not installed; `pip install triton`, in the version torch asks for")

import torch
from gpu_budget import Budget
from gpu_device import environment, pretended
from gpu_parts import TINY, Bench, Sizes, parts_of
from gpu_report import markdown, write

import normkit as nk


def where_to_write(found):
    """A name with the device and the day."""
    words = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    folder = ROOT / "runs" if OPTIONS.pretend else RESULTS
    return OPTIONS.out or folder / f"gpu-{words}-{found['date'][:10]}.json"


def main():
    """Check, measure, write after each part: a run that is cut off has left what it has."""
    budget = Budget(OPTIONS.budget_s)
    device = torch.device("cpu" if OPTIONS.pretend else "cuda")
    bench = Bench(device=device, sizes=TINY if OPTIONS.pretend else Sizes(), budget=budget)
    found = environment(OPTIONS.pretend, OPTIONS.commit)
    out = where_to_write(found)

    def record():
        return {
            "environment": found, "duration_s": round(budget.spent_s, 1),
            "seconds": budget.seconds, **bench.record,
            "left_out": budget.left_out, "errors": budget.errors,
        }  # fmt: skip

    def keep(part):
        write(record(), out)
        print(f"{part}: {budget.spent_s:.0f} s", flush=True)

    budget.run(parts_of(bench), keep)
    print(markdown(record()))
    print(f"record: {out}")
    return 1 if is_bad(bench.record) or budget.errors else 0


def is_bad(record):
    """Whether a check or a test failed; a contract that was cut off has not."""
    return bool(record["contract"].get("failed")) or any(not c["held"] for c in record["checks"])


if __name__ == "__main__":
    if not (OPTIONS.pretend or torch.cuda.is_available()):
        sys.exit("no CUDA device here: nothing can be measured; --pretend tries the script itself")
    with contextlib.ExitStack() as stack:
        if OPTIONS.pretend:
            stack.enter_context(pretended())
            stack.enter_context(nk.use_kernels("triton"))
        status = main()
    sys.exit(status)
