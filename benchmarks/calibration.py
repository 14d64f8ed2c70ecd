"""How near a converted network starts to the original: a plain swap of its norms, and calibrated.

A network is trained with batch norm on fashion-mnist, its norms are converted to others, and the
outputs on the untouched test set are compared with the original's. Writes
``docs/records/calibration.json``; the table in ``docs/convert.md`` is made of it.
"""

import json
import statistics
from pathlib import Path

from torch import nn

import normkit as nk
from normkit.convert.agreement import Outputs, agreement, tensors_of
from normkit.lab.data import Dataset, load
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import describe_environment
from normkit.lab.evaluation import evaluate
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import train

RECORD = Path(__file__).parents[1] / "docs" / "records" / "calibration.json"
SPECS = ("gn:8", "ln", "in", "bcn:8", "bgn:1", "ghost:2", "gnplus:8", "sn", "gn:8+ws")
SEEDS = (0, 1, 2)
NUM_BATCHES, BATCH_SIZE = 8, 64
PROTOCOL = Protocol(data="fashion-mnist", limit=6000, epochs=4, threads=2)


def measure(seed: int) -> list[dict]:
    """Train one network and convert copies of it to every norm."""
    dataset = load(PROTOCOL.data, PROTOCOL.limit)
    model = train(TrainingSpec(protocol=PROTOCOL, norm="bn", batch_size=32, seed=seed))
    batches = list(dataset.train.inputs.split(BATCH_SIZE)[:NUM_BATCHES])
    expected = outputs(model, dataset)
    rows = [{"seed": seed, "spec": "original", "accuracy": evaluate(model, dataset.test)[1]}]
    for spec in SPECS:
        for state, calibrate in [("plain", None), ("calibrated", batches)]:
            converted = nk.convert_norm(model, spec, calibrate=calibrate).model
            found = agreement(outputs(converted, dataset), expected)
            row = {"seed": seed, "spec": spec, "state": state}
            row |= {"top1": found.top1, "r2": found.r2, "relative_error": found.relative_error}
            rows.append(row | {"accuracy": evaluate(converted, dataset.test)[1]})
    return rows


def outputs(model: nn.Module, dataset: Dataset) -> Outputs:
    """Scores of all test examples, batch by batch."""
    return [tensors_of(model(part).detach()) for part in dataset.test.inputs.split(500)]


def main() -> None:
    """Measure every seed and write the record."""
    with threads_of(2):
        rows = [row for seed in SEEDS for row in measure(seed)]
    record = {
        "protocol": PROTOCOL.model_dump(mode="json"),
        "train_batch_size": 32,
        "calibration": {"num_batches": NUM_BATCHES, "batch_size": BATCH_SIZE},
        "environment": describe_environment(parse_device("cpu"), 2).model_dump(mode="json"),
        "rows": rows,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for spec in SPECS:
        for state in ("plain", "calibrated"):
            mine = [r for r in rows if (r["spec"], r.get("state")) == (spec, state)]
            print(spec, state, statistics.mean(r["top1"] for r in mine))


if __name__ == "__main__":
    main()
