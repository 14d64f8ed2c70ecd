"""A pretrained model to group norm and weight standardization.

You have a trained network with batch norm, and are going to fine-tune it with a few images at a
time. Batch norm would then learn with statistics that it does not evaluate with. Here the network
gets group norm with weight standardization, keeps most of what it knew, and is fine-tuned with
batches of two.

    python examples/pretrained_to_group_norm.py
"""

import torch
from torch.nn import functional as F

import normkit as nk
from normkit.lab.data import load
from normkit.lab.models import build_model

torch.manual_seed(0)

# %% A pretrained network
# It stands for the one that you have: a small ResNet, trained on the digits with 32 at a time.

data = load("digits")
test = data.test


def train(model, examples, batch_size, learning_rate):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    model.train()
    for index in torch.randperm(len(examples)).split(batch_size):
        batch = examples.take(index)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    model.eval()
    return (model(test.inputs).argmax(1) == test.targets).float().mean().item()


pretrained = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
for _ in range(3):
    train(pretrained, data.train, 32, 0.05)
print(f"batch norm as trained: {accuracy(pretrained):.1%}")

# > batch norm as trained: 98.1%

# %% Look first
# `dry_run=True` changes nothing and reports what would be carried over and what would be lost.

spec = "gn:8+ws"
print(nk.convert_norm_(pretrained, spec, example_input=data.train.inputs[:2], dry_run=True))

# > would convert 5 of 5 norms
# >   name     old              new   carried       lost
# >   1        BatchNorm2d(16)  gn:8  weight, bias  running statistics
# >   3.norm1  BatchNorm2d(32)  gn:8  weight, bias  running statistics
# >   3.norm2  BatchNorm2d(32)  gn:8  weight, bias  running statistics
# >   4.norm1  BatchNorm2d(64)  gn:8  weight, bias  running statistics
# >   4.norm2  BatchNorm2d(64)  gn:8  weight, bias  running statistics
# > weights standardised: 0, 3.conv1, 3.conv2, 4.conv1, 4.conv2
# > not checked: the forward of ResidualBlock; with example_input= it is run before and after

# %% Convert and calibrate
# `calibrate=` takes some training batches. From front to back, each new layer's scale and shift are
# solved so that every channel comes out with the mean and the variance that it had.
# `nk.convert_norm` works on a copy; `nk.convert_norm_` in place, and `.revert()` takes it back.

batches = data.train.inputs[:256].split(64)
plain = nk.convert_norm(pretrained, spec, example_input=batches[0]).model
calibrated = nk.convert_norm(pretrained, spec, calibrate=batches)
print(f"new norms, not calibrated: {accuracy(plain):.1%}")
print(f"new norms, calibrated: {accuracy(calibrated.model):.1%}")
print(calibrated)

# > new norms, not calibrated: 87.2%
# > new norms, calibrated: 96.1%
# > converted 5 of 5 norms
# >   name     old              new   carried       lost
# >   1        BatchNorm2d(16)  gn:8  weight, bias  running statistics
# >   3.norm1  BatchNorm2d(32)  gn:8  weight, bias  running statistics
# >   3.norm2  BatchNorm2d(32)  gn:8  weight, bias  running statistics
# >   4.norm1  BatchNorm2d(64)  gn:8  weight, bias  running statistics
# >   4.norm2  BatchNorm2d(64)  gn:8  weight, bias  running statistics
# > weights standardised: 0, 3.conv1, 3.conv2, 4.conv1, 4.conv2
# > calibrated 5 norms on 4 batches; outputs against the original's:
# >               top-1    R2      relative error
# >   original    100.0 %  1.0000  0.0000
# >   plain swap  63.3 %   0.4177  0.7580
# >   calibrated  98.4 %   0.9210  0.2792

# %% Fine-tune with two images at a time
# On 300 images, with a small learning rate. Each filter now has two more parameters, `length` and
# `shift`, at values with which standardization keeps what the filter did; the optimizer moves them
# with the weights.

few = data.train.take(torch.arange(300))
train(calibrated.model, few, 2, 0.001)
print(f"new norms, calibrated and fine-tuned: {accuracy(calibrated.model):.1%}")

# > new norms, calibrated and fine-tuned: 97.2%

# %% Keep it
# `nk.bake_weights_` writes the standardised weights into plain layers, for deployment; outputs stay
# the same.

x = test.inputs[:8]
before = calibrated.model.eval()(x)
nk.bake_weights_(calibrated.model)
print("same outputs:", torch.allclose(calibrated.model(x), before, atol=1e-4))

# > same outputs: True
