"""Benchmarks: time our layers and torch's in turns, in one run, if their results agree."""

from normkit.lab.bench.errors import BenchError
from normkit.lab.bench.records import BenchRecord, Row, read_record, write_record
from normkit.lab.bench.run import Job, jobs_of, run_bench
from normkit.lab.bench.spec import BenchSpec, read_shapes
from normkit.lab.bench.summary import cells_of, targets_of

__all__ = [
    "BenchError",
    "BenchRecord",
    "BenchSpec",
    "Job",
    "Row",
    "cells_of",
    "jobs_of",
    "read_record",
    "read_shapes",
    "run_bench",
    "targets_of",
    "write_record",
]
