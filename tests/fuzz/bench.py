"""A small model with everything that a tool could break, data, and a user's code that may raise."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

import normkit as nk
from fuzz.wholeness import Same, state_of


class Calls:
    """Counts calls of a user's code, and raises at one of them."""

    def __init__(self):
        self.arm()

    def arm(self, at=None, error=None, then=lambda: None):
        """Reset the count.

        Args:
            at: Number of the call that raises, from 1; None only counts.
            error: What it raises.
            then: Is called before.
        """
        self.at, self.error, self.then, self.count = at, error, then, 0

    def __call__(self, *_, **__):
        self.count += 1
        if self.count == self.at:
            self.then()
            raise self.error

    def __deepcopy__(self, memo):
        return self  # copies of a model count, too


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.down = nn.MaxPool2d(stride)
        self.relu, self.act = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.act(y + self.down(x))


class Net(nn.Module):
    """Norms of torch and ours, a dropout, a shared convolution, and hooks of the user's.

    Args:
        calls: Is called in the forward, and by all hooks.
        width: Channels.
    """

    def __init__(self, calls, width=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.stage1, self.stage2 = nn.Sequential(Block(width, 1)), nn.Sequential(Block(width, 2))
        self.stage3, self.stage4 = nn.Sequential(Block(width, 1)), nn.Sequential(Block(width, 1))
        self.conv = nn.Conv2d(width, width, 1)
        self.own, self.group = nk.BatchNorm(width), nn.GroupNorm(2, width)
        self.micro = nk.BatchChannelNorm(width, num_groups=2, micro_batch=True)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, 3)
        self.called, self.can_be_traced = [calls], True
        self.register_forward_pre_hook(calls)
        self.register_forward_hook(calls)
        self.stage2[0].bn1.register_forward_pre_hook(calls, with_kwargs=True)
        self.stage3.register_forward_hook(calls, prepend=True)
        self.own.register_forward_hook(calls, always_call=True)
        self.head.register_full_backward_hook(calls)
        self.register_state_dict_post_hook(calls)

    def forward(self, x):
        self.called[0]()
        if not self.can_be_traced and x.sum() > 1e9:
            return x
        self.num_calls = getattr(self, "num_calls", 0) + 1
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        x = self.own(self.conv(x)).relu()
        x = self.micro(self.group(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Bench:
    """The surroundings in which a tool is tested.

    Every call of the user's own code is counted, and may raise.

    Args:
        prepare: ``prepare(bench)`` gets it ready, and gives the call that is interrupted.
        path: A file for what the tool writes.
    """

    def __init__(self, prepare, path):
        torch.manual_seed(0)
        self.path, self.calls = path, Calls()
        self.model = Net(self.calls)
        self.batches = [(torch.randn(n, 3, 6, 6), torch.arange(n) % 3) for n in (3, 2)]
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        of_norms = [p for norm in norms for p in norm.parameters()]
        others = [p for p in self.model.parameters() if not any(p is other for other in of_norms)]
        groups = [{"params": others}, {"params": of_norms}]
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        self.model.stem[0].weight.requires_grad_(False)
        self.train()
        self.model.stage1[0].bn1.eval()
        self.model.drop.eval()
        self.watched = []  # results whose attributes must stay, too
        self.work = prepare(self)

    def train(self):
        """Train for a step on each batch; the gradients of the last one stay."""
        for x, y in self.batches:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def state(self):
        """Everything that a tool must leave as it was."""
        found = state_of(self.model, self.optimizer)
        for index, result in enumerate(self.watched):
            found |= {("result", index, key): Same(value) for key, value in vars(result).items()}
        return found

    def data(self):
        """Give the batches as a loader does."""
        return Loader(self.batches, self.calls)

    def forward(self, model, batch):
        """Send a batch through a model."""
        self.calls()
        return model(batch[0])

    def loss(self, output, batch):
        """Cross entropy of a batch."""
        self.calls()
        return nn.functional.cross_entropy(output, batch[1])

    def metric(self, output, batch):
        """Cross entropy of each example."""
        self.calls()
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    def closure(self):
        """Compute a loss again, as some optimizers ask for."""
        self.calls()
        return torch.tensor(0.0)

    def where(self, module, name):
        """Take every layer."""
        self.calls()
        return True

    def sgd(self, parameters, rate):
        """Make an optimizer whose steps are counted."""
        self.calls()
        optimizer = torch.optim.SGD(parameters, rate)
        optimizer.register_step_pre_hook(self.calls)
        optimizer.register_step_post_hook(self.calls)
        return optimizer


class Loader:
    """Batches that may raise, and draw from the random generators."""

    def __init__(self, batches, calls):
        self.batches, self.calls = batches, calls

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - what old loaders draw from
        for batch in self.batches:
            self.calls()
            yield batch
        self.calls()
