"""Networks and data of these tests."""

import torch
from torch import nn
from torch.nn import functional

import normkit as nk

NUM_CLASSES = 5


def trained(model, seed=0):
    """Give a model's norms running statistics and affines that are not the first ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "_running"):
                for name, low in [("running_mean", -1.0), ("running_var", 0.5)]:
                    if getattr(module, name, None) is not None:
                        values = getattr(module, name)
                        values.copy_(torch.rand(values.shape, generator=generator) + low)
                if module.weight is not None:
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


class Louder(nn.Module):
    """Makes the answers sure, so that losses differ."""

    def forward(self, x):
        return 6 * x


def plain_net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return trained(nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 8, 3, stride=2), norm(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, NUM_CLASSES), Louder(),
    ))  # fmt: skip


class Bypass(nn.Module):
    """A residual block whose first norm is in the branch, so the shortcut bypasses it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, NUM_CLASSES)
        trained(self)

    def forward(self, x):
        return self.head((x + functional.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Branches(nn.Module):
    """Two parallel norms, whose inputs do not depend on each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, NUM_CLASSES)
        trained(self)

    def forward(self, x):
        return self.head((self.first(x) * self.second(x)).mean((2, 3)))


class Mixed(nn.Module):
    """Looks at its whole batch, so that copies of it are not told apart."""

    def __init__(self):
        super().__init__()
        self.body = plain_net()

    def forward(self, x):
        y = self.body(x)
        return y - y.mean(0)


class FixedSize(nn.Module):
    """Takes only batches of four."""

    def __init__(self):
        super().__init__()
        self.body = plain_net()

    def forward(self, x):
        return self.body(x).reshape(4, NUM_CLASSES)


def data(num_batches=3, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 9, 9, generator=generator, dtype=dtype) * 1.5 + 0.5,
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for _ in range(num_batches)
    ]


def answers(weights, num_batches=4, size=8):
    """What the net puts out with these weights of its norms: data that just these suit."""
    model = plain_net(nk.BatchNorm)
    for layer, weight in zip((model[1], model[5]), weights, strict=True):
        layer.example_weight = weight
    with torch.no_grad():
        return [(x, model(x)) for x, _ in data(num_batches, size)]


def distance(output, batch):
    """How far outputs are from the answers; smaller is better."""
    return (output - batch[1]).square().mean(1)


def tune_to(batches, **options):
    """A new net, tuned to answers."""
    options = {"metric": distance, "larger_is_better": False} | options
    return nk.tune_example_weight(plain_net(), batches, **options)
