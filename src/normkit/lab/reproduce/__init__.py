"""Figures of the papers at small scale: runs, claims, verdicts by rule, figures."""

from normkit.lab.reproduce.catalog import PRESETS, find_preset
from normkit.lab.reproduce.preset import SCALES, Preset, Scale
from normkit.lab.reproduce.report import (
    Result,
    as_markdown,
    as_text,
    conclude,
    read_result,
    results_in,
    write_result,
)
from normkit.lab.reproduce.run import measured, run_missing

__all__ = [
    "PRESETS",
    "SCALES",
    "Preset",
    "Result",
    "Scale",
    "as_markdown",
    "as_text",
    "conclude",
    "find_preset",
    "measured",
    "read_result",
    "results_in",
    "run_missing",
    "write_result",
]
