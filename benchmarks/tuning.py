"""What tuning the example weight gains after training at small batch sizes, and what it costs.

    python benchmarks/tuning.py train   # networks into runs/tuning; goes on where it was stopped
    python benchmarks/tuning.py tune    # each network tuned for loss and accuracy, then tested
    python benchmarks/tuning.py cost    # 11 weights in shared forwards against 11 plain passes
    python benchmarks/tuning.py docs    # record, table and figure of docs/tune.md

A network is trained with batch norm on a part of fashion-mnist at batch sizes 2, 4 and 8, tuned on
3000 held-out training images, and what was chosen is measured on the test set, which had no part in
any choice.
"""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import normkit as nk
from normkit.lab.bench.markdown import table
from normkit.lab.checkpoints import load_weights_, save_weights
from normkit.lab.data import Dataset, Examples, load
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.models import build_model
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import train
from normkit.tune import Tuning
from normkit.tune.grids import GRID

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "tuning"
RECORD, PAGE = ROOT / "docs" / "records" / "tuning.json", ROOT / "docs" / "tune.md"
COST, FIGURE = FOLDER / "cost.json", ROOT / "docs" / "images" / "tuning.png"
PROTOCOL = Protocol(data="fashion-mnist", limit=4000, epochs=4, threads=1)
BATCH_SIZES, SEEDS, METRICS = (2, 4, 8), (0, 1, 2), ("loss", "accuracy")
NUM_HELD_OUT, EVALUATION_BATCH = 3000, 100
NUM_ROUNDS = 5
COST_CASES = (("small-resnet", (1, 28, 28), 100), ("torchvision:resnet18", (3, 64, 64), 8))
NUM_COST_BATCHES = 6
MARKED = re.compile(r"(<!-- begin tuning.json -->\n).*?(<!-- end -->)", re.DOTALL)
TICKS = (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
SHOWN = {"loss": (0.5, 1.0), "accuracy": (65, 83)}
GAIN_HEAD = (
    *("trained at batch", "seed", "tuned for", "best alpha", "gain, judged by held-out images"),
    *("set", "test set at 0", "test set, gain of the best alpha"),
)
COST_HEAD = ("network", "inputs", "batch", "tuned, s", "plain passes, s", "times as fast")
COLOURS = {2: "#c2410c", 4: "#1b6ca8", 8: "#3f7d20"}


def specs() -> Iterator[TrainingSpec]:
    """All networks, seed by seed."""
    for seed in SEEDS:
        for batch_size in BATCH_SIZES:
            yield TrainingSpec(protocol=PROTOCOL, norm="bn", batch_size=batch_size, seed=seed)


def train_all() -> None:
    """Train the networks that there are no weights of."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for spec in specs():
        if not _weights(spec).exists():
            save_weights(train(spec), _weights(spec), {"model": PROTOCOL.model})
            print("trained", spec.batch_size, spec.seed, flush=True)


def tune_all() -> None:
    """Tune the networks that there is no result of."""
    data = load(PROTOCOL.data, PROTOCOL.limit)
    held_out = _pairs(_held_out(), NUM_HELD_OUT)
    for spec in specs():
        path = _weights(spec).with_suffix(".json")
        if path.exists():
            continue
        with threads_of(1):
            row: dict = {"batch_size": spec.batch_size, "seed": spec.seed, **_made()}
            row |= {metric: _tuned(spec, data, held_out, metric) for metric in METRICS}
        path.write_text(json.dumps(row))
        print("tuned", spec.batch_size, spec.seed, flush=True)


def _made() -> dict:
    """With what code and where something is measured that starts now."""
    environment = describe_environment(parse_device("cpu"), 1).model_dump(mode="json")
    return {"code_hash": code_hash(), "environment": environment}


def _tuned(spec: TrainingSpec, data: Dataset, held_out: list, metric: Any) -> dict:
    result = nk.tune_example_weight(_model(spec, data), held_out, metric=metric)
    test = _pairs(data.test, len(data.test))
    found = {"alpha": result.alpha, "best": result.best, "how": result.how}
    found |= {"held_out_gain": asdict(result.gain), "significant": result.significant}
    found |= {"test_gain_of_best": asdict(result.gain_on(test, result.best))}
    found |= {"test_at_zero": _test_value(result, test)}
    return found | {"curve": [point._asdict() for point in result.curve]}


def _test_value(result: Tuning, test: list) -> float:
    nk.set_example_weight(result.model, 0.0)
    with torch.no_grad():
        scores = [result.metric.of(result.model(batch[0]), batch) for batch in test]
    return torch.cat(scores).mean().item()


def _model(spec: TrainingSpec, data: Dataset) -> nn.Module:
    built = build_model(
        PROTOCOL.model, num_classes=data.num_classes, input_shape=data.input_shape
    ).model
    load_weights_(built, _weights(spec))
    return built.eval()


def _held_out() -> Examples:
    """Validation images of the whole data set, normalised by the images that were trained on."""
    whole = load(PROTOCOL.data)
    used = whole.train.inputs[: PROTOCOL.limit]
    std, mean = torch.std_mean(used, (0, 2, 3), correction=0, keepdim=True)
    return Examples(inputs=(whole.validation.inputs - mean) / std, targets=whole.validation.targets)


def _pairs(examples: Examples, number: int) -> list[tuple[Tensor, Tensor]]:
    inputs = examples.inputs[:number].split(EVALUATION_BATCH)
    return list(zip(inputs, examples.targets[:number].split(EVALUATION_BATCH), strict=True))


def _weights(spec: TrainingSpec) -> Path:
    return FOLDER / f"{spec.key}.safetensors"


def measure_cost() -> None:
    """Time the curve of 11 weights in shared forwards and in plain passes, in turns."""
    with threads_of(1):
        rows = [_cost(*case) for case in COST_CASES]
    record = {"rows": rows, "load": os.getloadavg()[0], **_made()}
    COST.write_text(json.dumps(record))
    print(json.dumps(record, indent=1))


def _cost(name: str, shape: tuple[int, int, int], batch_size: int) -> dict:
    torch.manual_seed(0)
    built = build_model(name, num_classes=10, input_shape=shape).model.eval()
    nk.convert_norm_(built, "bn")
    number = NUM_COST_BATCHES * batch_size
    inputs, targets = torch.randn(number, *shape), torch.randint(10, (number,))
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    ways: dict[str, Callable[[], object]] = {
        "tuned": lambda: nk.tune_example_weight(built, batches, refine=False),
        "plain": lambda: _plain_passes(built, batches),
    }
    times = {way: [] for way in ways}
    for _ in range(NUM_ROUNDS + 1):
        for way, measure in ways.items():
            started = time.perf_counter()
            measure()
            times[way].append(time.perf_counter() - started)
    found = {f"{way}_s": statistics.median(several[1:]) for way, several in times.items()}
    return {"model": name, "input_shape": shape, "batch_size": batch_size, **found}


def _plain_passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    means = []
    with torch.no_grad():
        for alpha in GRID:
            nk.set_example_weight(model, alpha)
            losses = [functional.cross_entropy(model(x), t) for x, t in batches]
            means.append(torch.stack(losses).mean().item())
    nk.set_example_weight(model, 0.0)
    return means


def write_docs() -> None:
    """Make the record, the figure and the table."""
    rows = [json.loads(_weights(spec).with_suffix(".json").read_text()) for spec in specs()]
    record = {
        "protocol": PROTOCOL.model_dump(mode="json"),
        "num_held_out": NUM_HELD_OUT,
        "cost": json.loads(COST.read_text()),
        "rows": rows,
    }
    RECORD.write_text(json.dumps(record) + "\n")
    _draw(rows)
    page = MARKED.sub(lambda m: f"{m[1]}\n{_results(record)}\n{m[2]}", PAGE.read_text())
    PAGE.write_text(page)


def _results(record: dict) -> str:
    """The tables of the page."""
    rows = sorted(record["rows"], key=lambda row: (row["batch_size"], row["seed"]))
    gains = [_gain_cells(row, metric) for row in rows for metric in METRICS]
    cost = record["cost"]
    about = (
        f"Cost of the curve of {len(GRID)} weights, one thread, float32, medians of {NUM_ROUNDS} "
        f"rounds in turns; load of the machine {cost['load']:.1f}:"
    )
    parts = [
        *(table(GAIN_HEAD, gains), _where(rows), about),
        *(table(COST_HEAD, map(_cost_cells, cost["rows"])), _where([cost])),
    ]
    return "\n\n".join(parts) + "\n"


def _where(measured: list[dict]) -> str:
    made = measured[0]["environment"]
    codes = ", ".join(sorted({f"`{each['code_hash']}`" for each in measured}))
    return f"{made['device']}, torch {made['torch']}, {made['date'][:10]}, code {codes}."


def _gain_cells(row: dict, metric: str) -> list[str]:
    found = row[metric]
    return [
        *(str(row["batch_size"]), str(row["seed"]), metric, f"{found['best']:.3g}"),
        *(_interval(found["held_out_gain"]), "yes" if found["significant"] else "no"),
        *(f"{found['test_at_zero']:.4f}", _interval(found["test_gain_of_best"])),
    ]


def _cost_cells(row: dict) -> list[str]:
    shape, tuned, plain = "x".join(map(str, row["input_shape"])), row["tuned_s"], row["plain_s"]
    times = [f"{tuned:.2f}", f"{plain:.2f}", f"**{plain / tuned:.2f}**"]
    return [row["model"], shape, str(row["batch_size"]), *times]


def _interval(gain: dict) -> str:
    if gain["low"] == gain["high"] == 0:
        return "0"
    return f"{gain['mean']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"


def _draw(rows: list[dict]) -> None:
    figure = Figure(figsize=(8.4, 3.6), dpi=160, layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        for row in rows:
            curve = row[metric]["curve"]
            scale = 100 if metric == "accuracy" else 1
            label = f"trained at batch {row['batch_size']}" if row["seed"] == 0 else None
            x = [point["alpha"] for point in curve]
            y = [scale * point["mean"] for point in curve]
            axes.plot(x, y, color=COLOURS[row["batch_size"]], linewidth=1.1, label=label)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(0, 1)
        axes.set_ylim(*SHOWN[metric])
        axes.set_xticks(
            [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0", ".02", ".05", ".1", ".2", ".5", "1"]
        )
        axes.set_xlabel("example weight alpha")
        axes.set_ylabel(f"{metric} on held-out images" + (", %" if metric == "accuracy" else ""))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE)


STEPS = {"train": train_all, "tune": tune_all, "cost": measure_cost, "docs": write_docs}

if __name__ == "__main__":
    STEPS[sys.argv[1]]()
