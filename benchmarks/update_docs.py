"""Put the measured results into the pages of docs/ and README.md that have markers.

    python benchmarks/update_docs.py

Each marker ``<!-- begin FILE -->`` names a file of ``benchmarks/results``: a record of
``normkit bench`` (JSON), whose chart is drawn anew, a record of ``normkit bench --end-to-end``
(``end-to-end*.json``), or Markdown; ``<!-- begin gpu-RECORD.json#TABLE -->`` a table of a record of
``benchmarks/gpu.py``; ``<!-- begin fused.json -->`` that of ``benchmarks/fused.py``,
``<!-- begin host.json -->`` the record of ``benchmarks/host.py``.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import gpu_report

from normkit.lab.bench import read_record
from normkit.lab.bench.chart import write_chart
from normkit.lab.bench.end_to_end import EndToEndRecord
from normkit.lab.bench.fused import FusedRecord
from normkit.lab.bench.markdown import markdown, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "docs" / "fusing.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "triton.md",
    ROOT / "README.md",
)
MARKED = re.compile(r"(<!-- begin (\S+\.\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the pages."""
    for path in PAGES:
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")


def rewritten(page: str) -> str:
    """A page with what its records say now."""
    return MARKED.sub(lambda m: f"{m[1]}\n{_content(*m[2].split('#'))}\n{m[3]}", page)


def _content(name: str, part: str = "") -> str:
    path = RESULTS / name
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if name.startswith("gpu-"):
        return gpu_report.TABLES[part](gpu_report.read(path)) + "\n"
    if name == "fused.json":
        return _fused(FusedRecord.model_validate_json(path.read_bytes()), part)
    if name == "host.json":
        return _host_times(json.loads(path.read_text(encoding="utf-8")))
    if name.startswith("end-to-end"):
        return _steps(EndToEndRecord.model_validate_json(path.read_bytes()))
    record = read_record(path)
    chart = path.with_suffix(".svg")
    write_chart(chart, record)
    return f"![Ratios of every shape](../benchmarks/results/{chart.name})\n\n{markdown(record)}"


def _fused(record: FusedRecord, part: str) -> str:
    """Norm and activation together: how many times as long the others take, and memory."""
    machine = record.environment
    rows = []
    for residual in (False, True):
        name = "norm, sum and ReLU" if residual else "norm and ReLU"
        ratios = (record.mean_ratio(side, residual) for side in ("torch", "separate"))
        rows.append((f"{name}, both ways, mean of shapes", *(f"**{r:.2f}**" for r in ratios), ""))
    for row in record.networks:
        size = "x".join(map(str, (row.workload.batch_size, *row.workload.input_shape)))
        ratios = (f"**{row.ratio(side):.2f}**" for side in ("torch", "separate"))
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in row.peak_bytes.values())
        rows.append((f"step of {row.workload.model}, {size}", *ratios, peaks))
    head = ("in one pass", "torch's / ours", "ours one by one / ours", "memory of a step, MiB")
    said = table(head, rows)
    if part == "ratios":
        return f"{said}\n"
    setting = (
        f"{machine.device}, processor time of {machine.threads} thread, torch {machine.torch}, "
        f"{machine.date[:10]}, code `{record.code_hash}`, load {record.load_average:.1f}. Memory "
        f"is of torch's layers, ours one by one, and ours in one pass."
    )
    return f"{setting}\n\n{said}\n"


def _host_times(record: dict[str, Any]) -> str:
    """A norm a row: the shapes' median of time over torch's, and the most launches of any shape."""
    head = ("norm", "of torch's time", "launches forward", "launches backward")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["norm"], []).append(row)
    lines = (
        (
            f"`{norm}`",
            f"{statistics.median(row['of_torch_cpu'] for row in found):.2f}",
            str(max(row["launches_forward"] for row in found)),
            str(max(row["launches_backward"] for row in found)),
        )
        for norm, found in rows.items()
    )
    return f"torch {record['torch']}, triton {record['triton']}.\n\n{table(head, lines)}\n"


def _steps(record: EndToEndRecord) -> str:
    machine = record.environment
    head = ("training step of", "input", "torch's batch norm, ms", "ours, ms", "torch / ours")
    rows = (
        (
            result.workload.model,
            "x".join(map(str, (result.workload.batch_size, *result.workload.input_shape))),
            f"{1e3 * result.torch.median_s:.2f}",
            f"{1e3 * result.ours.median_s:.2f}",
            f"**{result.ratio:.2f}**",
        )
        for result in record.results
    )
    setting = (
        f"{machine.device}, {machine.threads} threads, torch {machine.torch}, "
        f"{machine.date[:10]}, code `{record.code_hash}`, load {record.load_average:.1f}."
    )
    return f"{setting}\n\n{table(head, rows)}\n"


if __name__ == "__main__":
    main()
