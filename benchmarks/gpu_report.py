"""The record of a GPU: written with a row a line, and as tables.

    python benchmarks/gpu_report.py benchmarks/results/gpu-RECORD.json

Needs nothing but Python, so that pages can be made anywhere.
"""

import json
import statistics
import sys
from pathlib import Path

WANTED = {"bn": 1.0, "gn": 1.3, "ln": 1.3, "in": 1.3, "bgn": 1.3, "pn": 1.3, "bcn": 2.0}
"""How many times torch's speed each norm is to have."""
WANTED_OF_COPY = 0.85
WANTED_OF_STEPS = {
    ("batch", "eager"): {2: 1 / 1.10, 32: 1 / 1.03, 128: 1 / 0.97},
    ("group", "eager"): {2: 1 / 0.85, 32: 1 / 0.85, 128: 1 / 0.85},
    ("batch", "compiled"): {32: 1.0},
    ("group", "compiled"): {32: 1 / 0.90},
}
"""How many times torch's speed a training step is to have, by norm and way, then by batch size."""
FUSED_SIDES = ("torch", "ours", "fused")
WANTED_OF_FUSED = {"eager": 1 / 0.9, "compiled": 1.0}
WAYS = {"calls": "called", "host": "Python alone", "graph": "in a graph"}


def write(record, path):
    """Write a record so that a change of it can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {_block(value)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _block(value):
    """Lists and tables of tables with an item a line."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
    if isinstance(value, dict) and any(isinstance(item, list) for item in value.values()):
        items = [f"  {json.dumps(key)}: {_block(item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n }"
    return json.dumps(value)


def read(path):
    """A record as it was written."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(head, rows):
    """Markdown; all columns but the first to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def setting(record):
    """What the figures were measured on, with which code, and what is to be known of them."""
    where = record["environment"]
    words = (
        f"{where['device']}, driver {where['driver']}, torch {where['torch']}, triton "
        f"{where['triton']}, Python {where['python']}, {where['date'][:10]}, commit "
        f"`{where['commit']}`."
    )
    return "\n\n".join([words, *record.get("notes", [])])


def right(record):
    """What was checked, and held."""
    contract, checks = record["contract"], record["checks"]
    held = sum(c["held"] for c in checks)
    said = [f"{held} of {len(checks)} results of layers agree with float64"]
    for dtype in ("float32", "bfloat16"):
        errors = [c["error"] for c in checks if c["dtype"] == dtype]
        if errors:
            said.append(f"in {dtype} to {max(errors):.1e} of the largest value")
    ran = f"{contract['passed']} passed"
    if contract["status"] is None:
        ran = f"{contract['percent']} % ran before it was cut off"
    return f"{'; '.join(said)}. Of the tests' contract {ran}, {contract['failed']} failed."


def steps(record):
    """Training steps of a ResNet-50, ours beside torch's."""
    found = {}
    for row in record["steps"]:
        key = row.get("network", ""), row["norm"], row["way"], row["batch_size"]
        found.setdefault(key, {})[row["whose"]] = row
    rows = []
    for (network, norm, way, batch_size), by in found.items():
        name = f"{norm} norm, {way}" + (f" ({network})" if network else "")
        wanted = WANTED_OF_STEPS[norm, way].get(batch_size, 1.0)
        rows.append([name, batch_size, *_side_by_side(by.get("torch"), by.get("ours"), wanted)])
    head = ("norm", "batch", "torch, ms", "ours, ms", "torch / ours", "torch, MiB", "ours, MiB")
    return table(head, rows)


def _side_by_side(torch, ours, wanted):
    pair = torch, ours
    ratio = _against(torch["step_ms"] / ours["step_ms"], wanted) if all(pair) else "-"
    times, memory = (
        [_or_dash(row, key, style) for row in pair]
        for key, style in (("step_ms", ".1f"), ("peak_mib", "d"))
    )
    return *times, ratio, *memory


def fused(record):
    """Steps of a ResNet-50 with batch norms, without and with what follows them in their pass."""
    found = {}
    for row in record.get("fused", ()):
        found.setdefault((row["way"], row["batch_size"]), {})[row["whose"]] = row
    rows = []
    for (way, batch_size), by in found.items():
        times = [_or_dash(by.get(side), "step_ms", ".1f") for side in FUSED_SIDES]
        memory = [_or_dash(by.get(side), "peak_mib", "d") for side in FUSED_SIDES]
        ratio = "-"
        if {"torch", "fused"} <= by.keys():
            wanted = WANTED_OF_FUSED[way]
            ratio = _against(by["torch"]["step_ms"] / by["fused"]["step_ms"], wanted)
        rows.append([way, batch_size, *times, ratio, *memory])
    if not rows:
        return "Steps with what follows in the norm's pass: not measured."
    words = [*(f"{side}, ms" for side in FUSED_SIDES), "torch / fused"]
    memory = [f"{side}, MiB" for side in FUSED_SIDES]
    return table(("batch norm and what follows", "batch", *words, *memory), rows)


def largest_steps(record):
    """The eager steps of the largest batch alone."""
    largest = max(row["batch_size"] for row in record["steps"])
    rows = [r for r in record["steps"] if r["batch_size"] == largest and r["way"] == "eager"]
    return steps({"steps": rows})


def _or_dash(row, key, style):
    return "-" if row is None or row.get(key) is None else f"{row[key]:{style}}"


def _against(ratio, wanted):
    """In bold where it misses what is wanted."""
    return f"{ratio:.2f}" if ratio >= wanted else f"**{ratio:.2f}**"


def layers(record):
    """Torch's time over ours: geometric mean over the shapes, and the slowest of them."""
    found, rows = _ratios_of(record, with_others=False), []
    measured = [way for way in WAYS if any((way, "torch") in ways for ways in found.values())]
    for (norm, *words), ways in found.items():
        cells = [_ratios(ways.get((way, "torch")), WANTED[norm]) for way in measured]
        rows.append([f"`{norm}`", *words, WANTED[norm], *cells])
    head = ("norm", "batch", "dtype", "layout", "wanted", *(WAYS[way] for way in measured))
    return table(head, rows)


def others(record):
    """The same of calls, beside torch's layers compiled and beside other libraries'."""
    rows = []
    for (norm, *words), ways in _ratios_of(record, with_others=True).items():
        for (_, whose), values in ways.items():
            rows.append([f"`{norm}`", *words, whose, _ratios(values, 1.0)])
    return table(("norm", "batch", "dtype", "layout", "beside", "its / ours, called"), rows)


def _ratios_of(record, with_others):
    """Others' times over ours by setting, then by way and whose; a list of all shapes'.

    Rows that others than torch take part in are apart: they have shapes of their own.
    """
    found = {}
    for row in record["layers"]:
        us = dict(row["us"])
        ours = us.pop("ours")
        if (us.keys() != {"torch"}) == with_others:
            key = row["norm"], row["shape"][0], row["dtype"], row["layout"]
            for whose, time in us.items():
                ways = found.setdefault(key, {})
                ways.setdefault((row["by"], whose), []).append(time / ours)
    return found


def _ratios(values, wanted):
    if not values:
        return "-"
    return f"{_against(statistics.geometric_mean(values), wanted)} ({min(values):.2f})"


def bandwidth(record):
    """Bytes a second of the primitives, in parts of a copy's."""
    found = {}
    for row in record["bandwidth"]:
        found.setdefault(row["kernel"], {})[f"{row['dtype']}, {row['layout']}"] = row
    settings = list(found.get("copy", ()))
    rows = [
        [f"`{kernel}`" if kernel != "copy" else "copy, GB/s",
         *(_bandwidth(kernel, by[s]) if s in by else "-" for s in settings)]
        for kernel, by in found.items()
    ]  # fmt: skip
    return table(("primitive", *settings), rows)


def _bandwidth(kernel, row):
    if kernel == "copy":
        return f"{row['gb_per_s']:.0f}"
    return _against(row["of_copy"], WANTED_OF_COPY)


def profile(record):
    """Which kernels a step's time goes into."""
    rows = [
        [f"`{norm}`", f"`{event['kernel']}`", event["calls"], f"{event['us']:.1f}"]
        for norm, events in record["profile"].items()
        for event in events
    ]
    return table(("norm", "kernel", "calls", "us"), rows)


def left_out(record):
    """How many items of each part the time did not suffice for; the record has their names."""
    parts = [f"{part}: {len(names)}" for part, names in record["left_out"].items()]
    return f"Left out, and named in the record: {', '.join(parts) or 'nothing'}."


EVERYTHING = (setting, right, steps, fused, layers, others, bandwidth, profile, left_out)
TABLES = {made.__name__: made for made in (*EVERYTHING, largest_steps)}
"""What pages may show, by name."""


def markdown(record):
    """All of the record."""
    errors = [f"- {e['part']}, {e['what']}: {e['error']}" for e in record["errors"]]
    parts = [made(record) for made in EVERYTHING]
    return "\n\n".join([*parts, "\n".join(["Errors:", "", *errors]) if errors else "No errors."])


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]))))
