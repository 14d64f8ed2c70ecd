"""Kill `normkit compare` at random moments, again and again, and compare its records at the end.

    python benchmarks/killed.py [--kills 20] [--out benchmarks/results/killed.json]

A user's file with a timm network of his own head, 200 PNG files in two class folders, bfloat16 with
float32 weights, accumulation, cosine. Once to the end; then in another folder the same command,
killed by SIGKILL at a random moment and given again, until it has been killed so often; then to its
end. The outcomes of both have to be equal, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from normkit.lab.device import parse_device
from normkit.lab.environment import describe_environment

MY = '''\
"""A network of one's own: a body of timm's, and a head that looks at means and maxima."""

import timm
import torch
from torch import nn


class Head(nn.Module):
    """Classes from the mean and the maximum of each channel."""

    def __init__(self, num_channels, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * num_channels)
        self.drop = nn.Dropout(0.1)
        self.linear = nn.Linear(2 * num_channels, num_classes)

    def forward(self, x):
        found = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return self.linear(self.drop(self.norm(found)))


class Net(nn.Module):
    """Maps of a small residual network, and what the head says of them."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = timm.create_model("test_resnet", num_classes=0, global_pool="")
        self.squeeze = nn.Conv2d(self.body.num_features, 32, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.head = Head(32, num_classes)

    def forward(self, x):
        x = self.body(x)
        x = self.norm(self.squeeze(x)).relu()
        return self.head(x)


def make_model(num_classes):
    return Net(num_classes)
'''
CLASSES, PER_CLASS, SIZE = ("cat", "dog"), 100, 32
BATCH_SIZE = 8
SECONDS = 0.2  # between two checkpoints


def draw(folder):
    """Write pictures of noise, brighter in one class, to a folder for each class."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for at in range(PER_CLASS):
            values = generator.integers(0, 216 + 40 * number, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{at}.png")


def command(out, num_epochs):
    """What is run, in the folder of ``my.py`` and the pictures."""
    options = {
        "--model": "my.py:make_model",
        "--data": "folder:photos",
        "--norms": "bn,gn:8",
        "--batch-sizes": BATCH_SIZE,
        "--seeds": "1,2",
        "--epochs": num_epochs,
        "--precision": "bf16-mixed",
        "--accumulate": 2,
        "--schedule": "cosine",
        "--augment": "flip",
        "--workers": 1,
        "--checkpoint-seconds": SECONDS,
        "--out": out,
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "normkit", "compare", *words]


def started(folder, out, num_epochs):
    """The command, in a group of processes of its own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    arguments = command(out, num_epochs)
    return subprocess.Popen(arguments, cwd=folder, start_new_session=True, **quiet)


def outcomes(folder):
    """What was trained, by what was asked for."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {json.dumps(r["spec"], sort_keys=True): r["outcome"] for r in records}


def whole(folder, num_epochs):
    """Run to the end; seconds until the first checkpoint, and from there."""
    begun = time.monotonic()
    process = started(folder, "whole", num_epochs)
    while not list((folder / "whole").glob("checkpoints/*.safetensors")):
        if process.poll() is not None:
            raise SystemExit("the command ended before its first checkpoint; give it more epochs")
        time.sleep(0.01)
    first = time.monotonic()
    if process.wait():
        raise SystemExit(f"the command ended with {process.returncode}")
    return first - begun, time.monotonic() - first


def kill(folder, num_epochs, seconds):
    """Start the command and kill it, and whatever it has started; False if it has ended before."""
    process = started(folder, "killed", num_epochs)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def measure(folder, num_kills, num_epochs, seed=0):
    """Kill a command so often, let it end, and compare."""
    (folder / "my.py").write_text(MY)
    draw(folder / "photos")
    start_s, left_s = whole(folder, num_epochs)
    moments, kills, found = random.Random(seed), 0, 0
    while kills < num_kills:
        # On average the same share of the work is done before each kill, and one before the end.
        share_s = 2 * left_s / (num_kills - kills + 1)
        seconds = moments.uniform(0, start_s + share_s)
        if not kill(folder, num_epochs, seconds):
            break
        kills += 1
        left_s -= max(seconds - start_s, 0)
        found += bool(list((folder / "killed").glob("checkpoints/*.safetensors")))
    finish = started(folder, "killed", num_epochs)
    if finish.wait():
        raise SystemExit(f"the command ended with {finish.returncode}")
    expected = outcomes(folder / "whole")
    return {
        "kills": kills,
        "found_a_checkpoint": found,
        "runs": len(expected),
        "steps": sum(outcome["num_steps"] for outcome in expected.values()),
        "same": outcomes(folder / "killed") == expected,
        "seed": seed,
    }


def main():
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.kills, given.epochs)
    found["duration_s"] = round(time.monotonic() - begun)
    found["command"] = command("OUT", given.epochs)[1:]
    found["environment"] = describe_environment(parse_device("cpu"), 1).model_dump()
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not found["same"])


if __name__ == "__main__":
    main()
