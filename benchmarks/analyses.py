"""What the papers derive, measured in networks before and after training.

    python benchmarks/analyses.py run   # trains and measures; the record in docs/records
    python benchmarks/analyses.py docs  # the table of docs/analyses.md from the record

Small residual networks with batch norm, group norm, and group norm with standardised weights learn
a part of fashion-mnist in batches of 32; every analysis sees held-out training images.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import normkit as nk
from normkit.lab.bench.markdown import table
from normkit.lab.data import load
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.models import build_model
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import train

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs" / "records" / "analyses.json", ROOT / "docs" / "analyses.md"
PROTOCOL = Protocol(data="fashion-mnist", limit=2000, epochs=3, threads=1)
ARMS, SEEDS, BATCH_SIZE, NUM_BATCHES, RATE = ("bn", "gn:8", "gn:8+ws"), (0, 1, 2), 32, 4, 0.1
MARKED = re.compile(r"(<!-- begin analyses.json -->\n).*?(<!-- end -->)", re.DOTALL)
Pairs = list[tuple[Tensor, Tensor]]


def mean_of(rows: Any, name: str) -> float:
    """Mean of a column over the layers."""
    return statistics.fmean(getattr(row, name) for row in rows)


def measured(model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Every analysis that this network has something for, as means over layers."""
    similar = nk.similarity_propagation(model, pairs).layers[1:]  # the first sees the picture
    bound = nk.output_bound(model, pairs).layers
    found = {
        "singularity ratio": nk.singularity_ratio(model).ratio,
        "channels differ before convolutions": mean_of(similar, "input_difference"),
        "channels differ after them": mean_of(similar, "output_difference"),
        "predicted by eq. 37": mean_of(similar, "predicted_difference"),
        "largest share of the bound in training": max(row.share for row in bound),
        "norms beyond it at evaluation": sum(r.largest_evaluation > r.bound for r in bound),
    }
    try:
        hessian = nk.hessian_norms(model, pairs[:1], num_filters=2, num_probes=8).layers
    except nk.OptionError:  # no standardised weight
        return found
    steps = nk.projected_updates(model, pairs, rate=RATE).layers
    return found | {
        "taken out of the squared Hessian": mean_of(hessian, "reduction"),
        "guaranteed by eq. 24": mean_of(hessian, "least_reduction"),
        "turned by a projected step, degrees": mean_of(steps, "projected_degrees"),
        "turned by a step of the raw weight, degrees": mean_of(steps, "standardized_degrees"),
        "rate ratio": statistics.geometric_mean(row.rate_ratio for row in steps),
    }


def run() -> None:
    """Train, measure and write the record."""
    data = load(PROTOCOL.data, PROTOCOL.limit)
    held = data.validation
    pairs = [
        (held.inputs[at : at + BATCH_SIZE], held.targets[at : at + BATCH_SIZE])
        for at in range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE)
    ]
    rows = []
    for arm in ARMS:
        for seed in SEEDS:
            spec = TrainingSpec(protocol=PROTOCOL, norm=arm, batch_size=BATCH_SIZE, seed=seed)
            with threads_of(1):
                new = build_model(
                    PROTOCOL.model,
                    num_classes=data.num_classes,
                    input_shape=data.input_shape,
                    norm=arm,
                    batch_size=BATCH_SIZE,
                    seed=seed,
                ).model
                found = {"before": measured(new, pairs), "after": measured(train(spec), pairs)}
            rows.append({"arm": arm, "seed": seed, **found})
            print(arm, seed, flush=True)
    environment = describe_environment(parse_device("cpu"), 1).model_dump(mode="json")
    record = {"code_hash": code_hash(), "environment": environment, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def docs() -> None:
    """Write the table into the page."""
    record = json.loads(RECORD.read_text())
    head = ["", *(f"{arm}, {when}" for arm in ARMS for when in ("before", "after"))]
    names = list(dict.fromkeys(n for row in record["rows"] for n in row["after"]))
    lines = [[name, *_cells(record["rows"], name)] for name in names]
    text = f"{table(head, lines)}\n\n{_made(record)}\n\n"
    page = MARKED.sub(lambda m: f"{m[1]}\n{text}{m[2]}", PAGE.read_text())
    PAGE.write_text(page)


def _cells(rows: list[dict], name: str) -> list[str]:
    cells = []
    for arm in ARMS:
        for when in ("before", "after"):
            values = [row[when][name] for row in rows if row["arm"] == arm and name in row[when]]
            spread = f" ± {statistics.stdev(values):.2g}" if values else ""
            cells.append(f"{statistics.fmean(values):.3g}{spread}" if values else "-")
    return cells


def _made(record: dict) -> str:
    env = record["environment"]
    return (
        f"Means over layers, then mean and standard deviation of {len(SEEDS)} seeds. "
        f"{env.get('device', 'cpu')}, torch {env.get('torch', '?')}, code `{record['code_hash']}`."
    )


COMMANDS: dict[str, Callable[[], None]] = {"run": run, "docs": docs}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]]()
