"""What recalibration changes on digits, what torch's update_bn does there, and what both cost.

Run ``python benchmarks/recalibration.py``; it prints the tables of ``docs/recalibrate.md``.
"""

import copy
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import update_bn

import normkit as nk

SEEDS = range(5)
NUM_TRAIN = 1200
ROUNDS = 25  # of the timings, in turns


def digits():
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return x, torch.tensor(labels)


def block(num_in, num_out):
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU()
    )


def trained(x, y, batch_size, seed):
    """Three passes of SGD at a learning rate in proportion to the batch, up to 0.1."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        block(1, 16), nn.Dropout(0.3), block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=min(0.1, 0.025 * batch_size), momentum=0.9)
    for _ in range(3):
        for chosen in torch.randperm(NUM_TRAIN).split(batch_size):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def quality(model, x, y):
    scores = model.eval()(x)
    loss = nn.functional.cross_entropy(scores, y).item()
    return (scores.argmax(1) == y).double().mean().item() * 100, loss


def variants(model, x, batch_size):
    """Copies of a model with statistics from the training data."""
    yield "as trained", copy.deepcopy(model)
    small, large = x[:NUM_TRAIN].split(batch_size), x[:NUM_TRAIN].split(200)
    theirs = copy.deepcopy(model)
    update_bn(small, theirs)
    yield f"update_bn, batches of {batch_size}", theirs
    yield (
        f"one pass, batches of {batch_size}",
        nk.recalibrate(copy.deepcopy(model), small).apply().model,
    )
    yield "one pass, batches of 200", nk.recalibrate(copy.deepcopy(model), large).apply().model
    yield "sequential", nk.recalibrate(copy.deepcopy(model), large, sequential=True).apply().model


def accuracies():
    x, y = digits()
    for batch_size in (4, 32):
        found = {}
        for seed in SEEDS:
            model = trained(x, y, batch_size, seed)
            for name, variant in variants(model, x, batch_size):
                found.setdefault(name, []).append(quality(variant, x[NUM_TRAIN:], y[NUM_TRAIN:]))
        for name, values in found.items():
            accuracy, loss = zip(*values, strict=True)
            print(
                f"{batch_size:3} {name:26} {statistics.mean(accuracy):5.1f} "
                f"({min(accuracy):.1f} to {max(accuracy):.1f})  {statistics.mean(loss):.3f}"
            )


def errors():
    """Relative errors of update_bn's variance, of seeds of the first layer."""
    x, y = digits()
    ordered = x[torch.argsort(y, stable=True)]
    cases = {
        "maps, 8 + 8 + 1 random": (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), [8, 8, 1]),
        "vectors, 128s random": (nn.Linear(64, 16), nn.BatchNorm1d(16), 128),
        "vectors, 128s by class": (nn.Linear(64, 16), nn.BatchNorm1d(16), 128),
    }
    for name, (first, norm, sizes) in cases.items():
        theirs, ours = [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            first.reset_parameters()
            data = ordered if "class" in name else x[torch.randperm(len(x))]
            data = data[:17] if isinstance(sizes, list) else data.flatten(1)
            with torch.no_grad():
                var = first(data).double().movedim(1, 0).flatten(1).var(dim=1)
            model = nn.Sequential(first, norm)
            update_bn(data.split(sizes), model)
            theirs.append((norm.running_var / var - 1).abs())
            nk.recalibrate(model, data.split(sizes)).apply()
            ours.append((norm.running_var / var - 1).abs())
        mean = torch.stack(theirs).mean() * 100
        worst = [torch.stack(e).max().item() for e in (theirs, ours)]
        print(f"{name:26} {mean:.1f} %  {worst[0] * 100:.0f} %  {worst[1]:.0e}")


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cost():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [block(3, 32)] + [block(32, 32) for _ in range(7)]
    model, batches = nn.Sequential(*layers), torch.randn(128, 3, 32, 32).split(32)

    def forward():
        with torch.no_grad():
            for batch in batches:
                model.train()(batch)

    ways = {
        "forward passes": forward,
        "update_bn": lambda: update_bn(batches, model),
        "one pass": lambda: nk.recalibrate(model, batches),
        "sequential": lambda: nk.recalibrate(model, batches, sequential=True),
    }
    rounds = [[seconds(work) for work in ways.values()] for _ in range(ROUNDS + 1)][1:]
    plain = statistics.median(first for first, *_ in rounds)
    for name, times in zip(ways, zip(*rounds, strict=True), strict=True):
        low, *_, high = statistics.quantiles(times, n=5)
        found = (f"{t / plain:.2f}" for t in (statistics.median(times), low, high))
        print("{:26} {} ({} to {}) of the forward passes".format(name, *found))


if __name__ == "__main__":
    for part in (errors, cost, accuracies):
        part()
