"""Train networks on that were converted to `gn:8+ws`, by plain SGD with two examples a step.

    python benchmarks/preserved.py [--out benchmarks/results/preserved.json]

A small-resnet learns digits with batch norm, is converted with `calibrate=`, and trains an epoch
at a rate of 0.001, in four ways: with the lengths and shifts of filters that `+ws` learns; with a
rate for these that is fan-in times larger, which is a step of gains and offsets themselves, as
normkit had them before; with both fixed; and converted to `gn:8` without `+ws`.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from torch.nn import functional

import normkit as nk
from normkit.lab.data import load
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import describe_environment
from normkit.lab.models import build_model

MODEL = "small-resnet:width=32:blocks=2"
SEEDS, RATE = (1, 2, 3, 4, 5), 1e-3


def accuracy(model, split):
    """Share of a split that is right."""
    with torch.no_grad():
        return (model.eval()(split.inputs).argmax(1) == split.targets).double().mean().item()


def train(model, split, batch_size, optimizer, num_epochs=1):
    """Train in place."""
    model.train()
    for _ in range(num_epochs):
        for part in torch.randperm(len(split)).split(batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(split.inputs[part]), split.targets[part]).backward()
            optimizer.step()
    return model


def groups(model, factor):
    """Optimizer groups; lengths and shifts of a layer have ``factor(fan_in)`` times the rate."""
    rules = [m for m in model.modules() if isinstance(m, nk.weights.WeightStandardization)]
    own = {parameter for rule in rules for parameter in rule.parameters()}
    found = [{"params": [p for p in model.parameters() if p not in own]}]
    return found + [
        {"params": [*rule.parameters()], "lr": RATE * factor(rule.fan_in)} for rule in rules
    ]


def of_seed(seed, data):
    """Accuracies of one seed."""
    torch.manual_seed(seed)
    network = build_model(MODEL, num_classes=10, input_shape=data.input_shape, seed=seed).model
    train(network, data.train, 32, torch.optim.SGD(network.parameters(), 0.05, 0.9), num_epochs=2)
    batches = data.train.inputs[:512].split(64)
    found = {"batch norm": accuracy(network, data.test)}
    ws, plain = (
        nk.convert_norm(network.eval(), spec, calibrate=batches).model
        for spec in ("gn:8+ws", "gn:8")
    )
    found["calibrated"] = accuracy(ws, data.test)
    factors = {"lengths": lambda _: 1, "gains": lambda fan_in: fan_in, "fixed": lambda _: 0}
    starts = {name: (copy.deepcopy(ws), factor) for name, factor in factors.items()}
    for name, (model, factor) in (starts | {"without ws": (plain, factors["lengths"])}).items():
        torch.manual_seed(seed)
        train(model, data.train, 2, torch.optim.SGD(groups(model, factor), RATE))
        found[name] = accuracy(model, data.test)
    return found


def main():
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    data = load("digits")
    with threads_of(1):
        rows = [of_seed(seed, data) for seed in SEEDS]
    for name in rows[0]:
        values = [100 * row[name] for row in rows]
        print(f"{name}: {statistics.mean(values):.1f} +- {statistics.stdev(values):.1f} %")
    environment = describe_environment(parse_device("cpu"), 1).model_dump()
    record = {"environment": environment, "model": MODEL, "seeds": SEEDS, "accuracies": rows}
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
