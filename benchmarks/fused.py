"""Measure norm, activation and residual in one pass, beside one after the other and beside torch's.

    python benchmarks/fused.py [--budget-s 60] [--out benchmarks/results/fused.json]

Batch norm and ReLU over ResNet-50's shapes, alone and after a sum; training steps of ResNet-50 and
MobileNetV2; and the most memory that a step of ResNet-50 takes. All in one run, in turns, float32.
"""

import argparse
import json
import time
from pathlib import Path

from normkit.lab.bench.end_to_end import Setting
from normkit.lab.bench.fused import FusedRecord, measure_peaks, run_fused
from normkit.lab.bench.records import write_record

THREADS = 1  # whose processor time is taken: the machine may be used by others too


def main() -> None:
    """Measure, print the ratios, and write the record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument(
        "--steps", type=int, default=20, help="training steps of a network, at most"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    said = {"on_row": lambda name: print(name, flush=True), "clock": time.process_time}
    maps = Setting(threads=THREADS, repeats=100, budget_s=options.budget_s)
    steps = Setting(threads=THREADS, repeats=options.steps, budget_s=options.budget_s)
    layers = run_fused(maps, workloads=(), **said)
    record = run_fused(steps, shapes=(), **said).model_copy(update={"layers": layers.layers})
    if options.out is not None:
        write_record(options.out, record)
    networks = [with_peaks(row) if is_large(row) else row for row in record.networks]
    record = FusedRecord(**dict(record) | {"networks": tuple(networks)})
    for residual in (False, True):
        ratios = {side: record.mean_ratio(side, residual) for side in ("torch", "separate")}
        print("after a sum" if residual else "alone", json.dumps(ratios))
    for row in record.networks:
        print(row.workload.model, row.workload.batch_size, row.ratio("torch"), row.peak_bytes)
    if options.out is not None:
        write_record(options.out, record)


def is_large(row):
    """Whether a step's memory is measured."""
    return row.workload.batch_size > 2 and "resnet" in row.workload.model


def with_peaks(row):
    """The same row with the memory of a step on each side."""
    return row.model_copy(update={"peak_bytes": measure_peaks(row.workload, THREADS)})


if __name__ == "__main__":
    main()
