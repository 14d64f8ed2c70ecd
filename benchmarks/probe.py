"""What a probe costs at ``every=50``: a training step's time with it and without.

Steps of two equal models are interleaved, one with a probe that writes JSON lines and one without,
on one thread, in CPU time, which other programs hardly change (wall time stands beside it).
The cost of 50 steps is put together of medians: what the recorded step takes longer, what
``step`` takes before it (it copies the gradients and puts the hooks in), and 48 times what ``step``
takes otherwise. Writes ``docs/records/probe.json``.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normkit as nk
from normkit.lab.device import parse_device
from normkit.lab.environment import describe_environment
from normkit.lab.models import build_model
from normkit.lab.torchvision_ops import register_missing_operators

RECORD = Path(__file__).parents[1] / "docs" / "records" / "probe.json"
EVERY, CYCLE, THREADS = 50, 4, 1
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
Times = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A model, its batches, how much is timed, and what was expected of the cost."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cycles: int
    predicted_percent: float


def resnet18() -> nn.Module:
    """ResNet-18 of torchvision."""
    register_missing_operators()
    return build_model("torchvision:resnet18", num_classes=10, input_shape=(3, 64, 64)).model


def small_resnet() -> nn.Module:
    """The lab's small network for 8x8 digits, with batch norm."""
    return build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8), norm="bn").model


def mlp() -> nn.Module:
    """Two hidden layers with batch norm: the smallest step that anybody trains."""
    layers = [(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*(part for layer in layers for part in layer), nn.Linear(64, 10))


SUBJECTS = (
    Subject("torchvision:resnet18", resnet18, (8, 3, 64, 64), 8, 1.5),
    Subject("small-resnet", small_resnet, (32, 1, 8, 8), 150, 2.0),
    Subject("mlp", mlp, (32, 64), 500, 10.0),
)


class Run:
    """One model in training, with or without a probe."""

    def __init__(self, subject: Subject, probe: nk.Probe | None, model: nn.Module) -> None:
        self.model, self.probe = model, probe
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.inputs, self.target = torch.randn(subject.shape), torch.randint(10, subject.shape[:1])

    def step(self) -> tuple[Times, Times]:
        """Train for one step: its seconds by each clock, and those of the probe's ``step``."""
        begin = now()
        loss: Tensor = cross_entropy(self.model(self.inputs), self.target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        trained = now()
        if self.probe is not None:
            self.probe.step(loss)
        end = now()
        return since(begin, end), since(trained, end)


def now() -> Times:
    """What each clock says."""
    return {name: clock() for name, clock in CLOCKS.items()}


def since(begin: Times, end: Times) -> Times:
    """Seconds between two times."""
    return {name: end[name] - begin[name] for name in CLOCKS}


def seconds(subject: Subject, folder: str) -> dict[str, list[Times]]:
    """Time each kind of step, the probe recording every fourth."""
    plain, watched = subject.make(), subject.make()
    times = defaultdict(list)
    with nk.Probe(watched, CYCLE, path=Path(folder) / "lines.jsonl") as probe:
        runs = Run(subject, None, plain), Run(subject, probe, watched)
        for cycle in range(1 + subject.cycles):
            for number in range(CYCLE):
                (usual, _), (whole, own) = (run.step() for run in runs)
                if cycle == 0:  # warm up
                    continue
                times["plain"].append(usual)
                if number == CYCLE - 1:
                    times["recorded"].append(whole)
                else:
                    times["call before" if number == CYCLE - 2 else "call"].append(own)
    return times


def cost(times: dict[str, list[float]]) -> dict:
    """Put a period together of the medians of its steps."""
    usual = {kind: median(values) for kind, values in times.items()}
    calls = usual["call before"] + (EVERY - 2) * usual["call"]
    extra = usual["recorded"] - usual["plain"] + calls
    return {
        "percent": 100 * extra / (EVERY * usual["plain"]),
        "median_ms": {kind: 1e3 * value for kind, value in usual.items()},
        "quartiles_ms": {kind: [1e3 * q for q in quantiles(v)] for kind, v in times.items()},
        "n": {kind: len(values) for kind, values in times.items()},
    }


def measure(subject: Subject) -> dict:
    """Cost by each clock."""
    with tempfile.TemporaryDirectory() as folder:
        times = seconds(subject, folder)
    row = {"model": subject.name, "shape": subject.shape}
    row["predicted_percent"] = subject.predicted_percent
    for clock in CLOCKS:
        row[clock] = cost({kind: [t[clock] for t in values] for kind, values in times.items()})
    return row


def main() -> None:
    """Measure all, or those that are named, and write the record."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    known = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    rows = {row["model"]: row for row in known}
    for subject in SUBJECTS:
        if subject.name in (sys.argv[1:] or [subject.name]):
            rows[subject.name] = measure(subject)
            print(json.dumps(rows[subject.name]))
    environment = describe_environment(parse_device("cpu"), THREADS).model_dump(mode="json")
    record = {"every": EVERY, "environment": environment, "rows": list(rows.values())}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
