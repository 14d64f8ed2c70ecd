"""The record of a GPU as tables."""

import contextlib
import json
import platform
import statistics
import subprocess
from datetime import UTC, datetime

import torch
import triton


def environment(dry, stand_in):
    """What the figures were measured on, and with."""
    device = "CPU, triton's interpreter: a dry run, no figure means anything"
    driver = None
    if not dry:
        device = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            driver = subprocess.run(
                query, capture_output=True, text=True, check=True
            ).stdout.split()[0]
    return {
        "device": device, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "dry_run": dry,
        "jaxtyping": "absent, stood in for" if stand_in else "installed",
    }  # fmt: skip


def ratios(record, peers):
    """Geometric means by norm, batch size, dtype and layout, beside the targets."""
    groups = {}
    for row in record["layers"]:
        name = next(n for n, (spec, *_) in peers.items() if spec == row["norm"])
        groups.setdefault((name, row["shape"][0], row["dtype"], row["layout"]), []).append(row)
    for (name, size, dtype, layout), rows in groups.items():
        for way, peer in (("calls_s", "torch"), ("graph_s", "torch"), ("calls_s", "compile")):
            found = [r[way][peer] / r[way]["ours"] for r in rows if peer in r.get(way, ())]
            wanted = 1.0 if peer == "compile" else peers[name][2]
            if found:
                mean = statistics.geometric_mean(found)
                yield name, size, dtype, layout, peer, way[:-2], wanted, mean, min(found)


def markdown(record, peers):
    """The record as tables."""
    lines = ["# Triton kernels on a GPU", "", json.dumps(record["environment"]), ""]
    held = sum(c["held"] for c in record["checks"])
    lines += [f"Checks against float64: {held} of {len(record['checks'])} held.", ""]
    lines += [f"- failed: {c['what']}: {c['error']:.2g}" for c in record["checks"] if not c["held"]]
    if "contract" in record:
        status = record["contract"]["status"]
        said = "cut off, see the record" if status is None else f"exit status {status}"
        lines += [f"Contract by pytest: {said}.", ""]
    lines += [
        "",
        "| kernel | dtype | layout | GB/s | of a copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in record["bandwidth"]:
        words = (r["kernel"], r["dtype"], r["layout"])
        figures = f"{r['gigabytes_per_s']:.0f} | {r['of_copy']:.2f}"
        lines.append(f"| {' | '.join(words)} | {figures} |")
    lines += ["", "| norm | batch | dtype | layout | against | by | wanted | mean | slowest |",
              "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for *words, wanted, mean, slowest in ratios(record, peers):
        lines.append(f"| {' | '.join(map(str, words))} | {wanted} | {mean:.2f} | {slowest:.2f} |")
    lines += [
        "",
        "| training step of ResNet-50 with | batch | ms | peak MiB |",
        "| --- | --- | --- | --- |",
    ]
    for r in record["training"]:
        lines.append(f"| {r['norm']} | {r['batch_size']} | {1e3 * r['step_s']:.2f} | "
                     f"{r['peak_bytes'] / 2**20:.0f} |")  # fmt: skip
    lines += ["", "Errors:", "", *(f"- {e['what']}: {e['error']}" for e in record["errors"])]
    lines += ["", f"Took {record['duration_s']:.0f} s. Left out for want of time or tools:", ""]
    return "\n".join(lines + [f"- {what}" for what in record["left_out"]]) + "\n"
