"""A small network for looking at what conversion does."""

from torch import nn


class Block(nn.Module):
    """Two convolutions and two norms around which the input is added."""

    def __init__(self, num_features=8):
        super().__init__()
        self.conv1 = nn.Conv2d(num_features, num_features, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_features)
        self.conv2 = nn.Conv2d(num_features, num_features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_features)

    def forward(self, x):
        """Compute the output."""
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Net(nn.Module):
    """Two stages and a head, with five norms."""

    def __init__(self, num_features=8):
        super().__init__()
        self.layer1 = nn.Sequential(Block(num_features))
        self.layer2 = nn.Sequential(Block(num_features))
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(num_features * 16))

    def forward(self, x):
        """Compute the output."""
        return self.head(self.layer2(self.layer1(x)))
