"""A good model, and copies that are each broken in one way."""

import copy

import torch
from torch import nn

from normkit.lab.data import load

BATCH = 32


def network(norm=nn.BatchNorm2d):
    """Six norms on maps of 8x8 to 2x2; dropouts that do nothing until they are told to."""
    widths = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    blocks = []
    for inner, outer, stride in widths:
        conv = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        blocks += [conv, nn.Dropout(0.0), norm(outer), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def batches(examples, size=BATCH):
    pairs = zip(examples.inputs.split(size), examples.targets.split(size), strict=True)
    return list(pairs)


def data():
    """Training batches, the last one of usual size, and test batches."""
    digits = load("digits")
    count = 24 * BATCH
    train = digits.train.take(torch.arange(count))
    return batches(train), batches(digits.test, 45)


def train(model, pairs, epochs=6, rate=0.1, after_step=lambda model: None):
    """Plain SGD with a rate that falls to zero, in a new order each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs * len(pairs))
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(pairs), generator=order):
            x, target = pairs[index]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            schedule.step()
            after_step(model)
    return model.eval()


def follow(model, pairs, after_step=lambda model: None):
    """Let running statistics follow forwards in training mode; no weight moves."""
    model.train()
    with torch.no_grad():
        for x, _ in pairs:
            model(x)
            after_step(model)
    return model.eval()


def good(pairs):
    torch.manual_seed(0)
    return train(network(), pairs)


def stale(model, pairs):
    """Statistics from before half of the training."""
    torch.manual_seed(0)
    early = train(network(), pairs, epochs=1)
    for layer, other in zip(norms(model), norms(early), strict=True):
        layer.load_state_dict({**layer.state_dict(), **dict(other.named_buffers())})
    return model


def stalled(model, pairs):
    """Running statistics of bfloat16 with momentum 0.001, from a start at 0 and 1."""

    def to_bfloat16(model):
        for layer in norms(model):
            for buffer in (layer.running_mean, layer.running_var):
                buffer.copy_(buffer.bfloat16())

    for layer in norms(model):
        layer.reset_running_stats()
        layer.momentum = 0.001
    for _ in range(12):
        follow(model, pairs, to_bfloat16)
    return model


def hasty(model, pairs):
    """Momentum 0.9 and batches of two."""
    for layer in norms(model):
        layer.momentum = 0.9
    two = [(x[:2], target[:2]) for x, target in pairs]
    return follow(model, two)


def thawed(model, pairs):
    """Layers that do not learn, whose statistics have followed a few batches of one class."""
    for layer in norms(model):
        layer.requires_grad_(False)
    ones = [(x[target == 1], target[target == 1]) for x, target in pairs]
    return follow(model, ones)


def dropped(model, pairs):
    """Statistics taken with dropout before each norm."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    torch.manual_seed(0)
    for _ in range(3):
        follow(model, pairs)
    return model


def ended_by_one(model, pairs):
    """An epoch whose last batch is a single example."""
    return follow(model, pairs)


def never_set(model, pairs):
    """Buffers that were not loaded."""
    for layer in norms(model):
        layer.reset_running_stats()
    return model


def overflown(model, pairs):
    """Statistics that one infinity has reached."""
    norms(model)[2].running_var.fill_(float("nan"))
    return model


def broken(how, model, pairs):
    return how(copy.deepcopy(model), pairs)


def one_bright_example(train):
    """An epoch whose last batch is one scan that is far too bright."""
    x, target = train[3]
    return [*train, (4 * x[5:6], target[5:6])]


def case(name, good, digits):
    """A broken model with its training and test data."""
    train, test = digits
    if name == "small last batch":
        train = one_bright_example(train)
        return broken(ended_by_one, good, train), train, test
    if name == "shifted test data":
        return good, train, [(2 * x + 2, target) for x, target in test]
    how = {
        "stale statistics": stale,
        "16-bit statistics": stalled,
        "averages of few examples": hasty,
        "thawed statistics": thawed,
        "dropout before the norm": dropped,
        "statistics never set": never_set,
        "broken statistics": overflown,
    }[name]
    return broken(how, good, train), train, test


def loss_of(model, pairs):
    """Mean cross entropy at evaluation."""
    losses = []
    with torch.no_grad():
        for x, target in pairs:
            scores = model.eval()(x).double()
            losses += (scores.logsumexp(1) - scores.gather(1, target[:, None])[:, 0]).tolist()
    return sum(losses) / len(losses)
