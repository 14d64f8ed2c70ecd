"""Measure what the lab's engine adds to a training step: its loop and a bare one, in turns.

    python benchmarks/engine.py [--out benchmarks/results/engine.json]

Both train a small-resnet on digits, float32, one thread, on the same batches: forward, backward,
update, loss and accuracy read. The engine's time has the loading of batches in it. All in CPU time,
which other programs hardly change.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional

from normkit.lab.data import open_data
from normkit.lab.device import parse_device, threads_of
from normkit.lab.environment import describe_environment
from normkit.lab.loading import Loading
from normkit.lab.loop import Loop
from normkit.lab.models import build_model
from normkit.lab.spec import Protocol
from normkit.lab.tasks.classification import ClassificationRun

CPU = parse_device("cpu")
MODEL = "small-resnet:width=16:blocks=2"
ROUNDS, STEPS = 15, 30


def bare_round(model, optimizer, dataset, parts):
    """Seconds of a step of a loop as one writes it by hand."""
    started = time.process_time()
    for part in parts:
        batch = dataset.train.take(part)
        optimizer.zero_grad(set_to_none=True)
        scores = model(batch.inputs)
        loss = functional.cross_entropy(scores, batch.targets)
        loss.backward()
        optimizer.step()
        loss.item()
        int((scores.argmax(1) == batch.targets).sum())
    return (time.process_time() - started) / len(parts)


def engine_round(loop, dataset, order, batch_size):
    """Seconds of a step of the engine."""
    started = time.process_time()
    num_steps = 0
    for parts in loop.epoch(dataset.train, order, batch_size, Loading(), 0):
        loop.set_rate(0.01)
        loop.step(parts)
        num_steps += 1
    return (time.process_time() - started) / num_steps


def measure(batch_size):
    """Medians over rounds, which take turns."""
    dataset = open_data("digits")
    options = {"num_classes": 10, "input_shape": dataset.input_shape, "norm": "bn"}
    protocol = Protocol(model=MODEL)
    network = build_model(MODEL, **options).model.train()
    run = ClassificationRun(network, protocol, dataset)
    loop = Loop(network, protocol, 0.01, CPU, run)
    model = build_model(MODEL, **options).model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)
    bare, engine = [], []
    for turn in range(ROUNDS):
        order = torch.randperm(len(dataset.train))[: STEPS * batch_size]
        parts = list(order.split(batch_size))
        both = [
            lambda parts=parts: bare.append(bare_round(model, optimizer, dataset, parts)),
            lambda order=order: engine.append(engine_round(loop, dataset, order, batch_size)),
        ]
        for work in both if turn % 2 else reversed(both):
            work()
    ratios = [e / b for e, b in zip(engine, bare, strict=True)]
    return {
        "batch_size": batch_size,
        "bare_ms": 1000 * statistics.median(bare),
        "engine_ms": 1000 * statistics.median(engine),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main():
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with threads_of(1):
        cells = [measure(size) for size in (8, 32, 80)]
    record = {
        "environment": describe_environment(CPU, 1).model_dump(),
        "model": MODEL,
        "rounds": ROUNDS,
        "cells": cells,
    }
    for cell in cells:
        print(
            f"batch {cell['batch_size']}: bare {cell['bare_ms']:.2f} ms, engine "
            f"{cell['engine_ms']:.2f} ms, ratio {cell['ratio']:.3f}"
        )
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
