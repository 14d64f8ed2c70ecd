"""Inference before and after ``nk.fold``: whole networks, in turns.

    python benchmarks/folding.py          # measures; two minutes
    python benchmarks/folding.py --page   # only writes the table of docs/fold.md anew

Writes ``benchmarks/results/folding.json`` and the table between the markers of ``docs/fold.md``.
"""

import os
import re
import sys
from pathlib import Path

import torch

import normkit as nk
from normkit.lab.bench.markdown import table
from normkit.lab.bench.records import write_record
from normkit.lab.bench.timing import Budget, Call, Times, time_in_turns
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import Environment, code_hash, describe_environment
from normkit.lab.frozen import Frozen
from normkit.lab.torchvision_ops import register_missing_operators

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "folding.json"
PAGE = ROOT / "docs" / "fold.md"
MARKED = re.compile(r"(<!-- begin folding.json -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = ("resnet18", "resnet50", "mobilenet_v2")
BATCH_SIZES = (1, 8)
SIZE, THREADS = 128, 1  # one thread: the other core is rarely idle
BUDGET = Budget(seconds=15.0, repeats=200)


class Result(Frozen):
    """A network's time of one forward, as it is and folded."""

    model: str
    batch_size: int
    size: int
    num_folded: int
    difference: float
    before: Times
    after: Times

    @property
    def ratio(self) -> float:
        """How many times as fast it is folded."""
        return self.before.median_s / self.after.median_s


class FoldingRecord(Frozen):
    """What was found, where and when."""

    results: tuple[Result, ...]
    environment: Environment
    code_hash: str
    load_average: float


def measure(name: str, batch_size: int) -> Result:
    """Time a network of torchvision with statistics drawn at random."""
    import torchvision  # its operators must be there first

    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    x = torch.randn(batch_size, 3, SIZE, SIZE)
    done = nk.fold(model, x)
    calls = {"before": Call(run=lambda: model(x)), "after": Call(run=lambda: done.model(x))}
    with torch.inference_mode():
        times = time_in_turns(calls, BUDGET, torch.device("cpu"))
    difference = float("nan") if done.difference is None else done.difference
    return Result(
        model=name,
        batch_size=batch_size,
        size=SIZE,
        num_folded=len(done.folded),
        difference=difference,
        **times,
    )


def run() -> FoldingRecord:
    """Measure every network at every batch size."""
    load = os.getloadavg()[0]
    with threads_of(THREADS), torch.random.fork_rng():
        torch.manual_seed(0)
        results = tuple(measure(m, n) for m in MODELS for n in BATCH_SIZES)
    return FoldingRecord(
        results=results,
        environment=describe_environment(parse_device("cpu"), THREADS),
        code_hash=code_hash("lab/bench/"),
        load_average=load,
    )


def markdown(record: FoldingRecord) -> str:
    """The record as a table for the page."""
    machine = record.environment
    head = ("network", "images", "norms folded", "before, ms", "folded, ms", "times as fast")
    rows = (
        (
            r.model,
            f"{r.batch_size} of {r.size}x{r.size}",
            str(r.num_folded),
            _shown(r.before),
            _shown(r.after),
            f"**{r.ratio:.2f}**",
        )
        for r in record.results
    )
    largest = max(r.difference for r in record.results)
    fewest = min(r.before.repeats for r in record.results)
    return (
        f"float32, {machine.device}, threads: {machine.threads}, torch {machine.torch}, "
        f"{machine.date[:10]}, code `{record.code_hash}`, load of the machine when it began "
        f"{record.load_average:.1f}; medians (20th to 80th percentile) of {fewest} or more "
        f"forwards in turns. The outputs differ by at most {largest:.1e} of their largest value."
        f"\n\n{table(head, rows)}\n"
    )


def _shown(times: Times) -> str:
    return f"{1e3 * times.median_s:.1f} ({1e3 * times.low_s:.1f} to {1e3 * times.high_s:.1f})"


def main() -> None:
    """Measure unless only the page is asked for, and write the page."""
    register_missing_operators()
    if "--page" not in sys.argv[1:]:
        write_record(RECORD, run())
    record = FoldingRecord.model_validate_json(RECORD.read_bytes())
    page = PAGE.read_text(encoding="utf-8")
    new = MARKED.sub(lambda m: f"{m[1]}\n{markdown(record)}\n{m[2]}", page)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
