"""Good in training, bad at test.

The loss falls, evaluation is awful, and in `train()` mode the network is good again. With batch norm
this has a dozen possible causes. `nk.diagnose` measures which of them it is, how much of the loss
it explains, and what helps.

    python examples/bad_at_test.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit.lab.data import load

torch.manual_seed(0)

# %% A training that goes well
# The data are the digits. The author of this network has translated a `momentum` of 0.999 from
# TensorFlow, where it weighs the old value, to torch's 0.001, which weighs the new one. That is far
# too small here: in 240 steps the running statistics do not reach those of the data.

data = load("digits")


def block(num_in, num_out):
    convolution = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out, momentum=0.001), nn.ReLU())


head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = nn.Sequential(block(1, 16), nn.MaxPool2d(2), block(16, 32), block(32, 32), head)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(6):
    for index in torch.randperm(len(data.train)).split(32):
        batch = data.train.take(index)
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    return (model(data.test.inputs).argmax(1) == data.test.targets).float().mean().item()


training, evaluation = accuracy(model.train()), accuracy(model.eval())
print(f"in training mode: {training:.0%}, in evaluation mode: {evaluation:.0%}")

# > in training mode: 98%, in evaluation mode: 42%

# %% Ask the doctor
# It needs training batches as the training saw them, and test batches with targets. The model is
# left as it was.


def batches(examples):
    return list(zip(examples.inputs.split(32), examples.targets.split(32), strict=True))


found = nk.diagnose(model, batches(data.train), batches(data.test), try_fixes=True)
print(found)

# > Stale statistics: running statistics of 3 layers are not those of the training data; the farthest are in 2.1: its means are 1.1 standard deviations off, and the data's standard deviations are 1.2 to 1.8 times the running ones; that explains 12.4 of the test loss of 12.44 (99 %).
# > 1. stale statistics: explains +12.38 (95 % interval +10.96 to +13.79)
# >    what: running statistics of 3 layers are not those of the training data; the farthest are in 2.1: its means are 1.1 standard deviations off, and the data's standard deviations are 1.2 to 1.8 times the running ones
# >    why: evaluation normalises by statistics of earlier weights or of other data
# >    fix: nk.recalibrate(model, train_batches).apply()
# > on 359 test examples
# >   statistics                          loss     accuracy  gain
# >   as the model is                     12.44    41.78 %   +0 (+0 to +0)
# >   measured anew on the training data  0.06781  98.33 %   +12.38 (+10.96 to +13.79)
# >   measured anew on other test inputs  0.0673   97.77 %   +12.38 (+10.96 to +13.79)
# >   of each test batch                  0.05392  98.61 %   +12.39 (+10.97 to +13.81)
# > layers whose statistics cost most
# >   name  loss that returns  mean shift  std ratio      symptom
# >   2.1   +10.04             1.13        1.17 to 1.76   stale statistics
# >   3.1   +0.4623            0.599       0.672 to 1.35  stale statistics
# >   0.1   +0.1052            0.0708      0.993 to 1.43  stale statistics
# > tried on copies, gains on the same examples
# >   tried                                     loss     accuracy  gain                       note
# >   recalibrate                               0.06781  98.33 %   +12.38 (+10.96 to +13.79)
# >   recalibrate on test inputs                0.0673   97.77 %   +12.38 (+10.96 to +13.79)  measured on one half of the test inputs, judged on the other, without labels
# >   recalibrate, then weigh examples          0.06781  98.33 %   +12.38 (+10.96 to +13.79)  alpha 0
# >   recalibrate, then XBN blocks, calibrated  -        -         -                          cannot be done: Sequential has no residual blocks that could be recognised: modules whose own forward adds a shortcut to a branch with a...
# >   recalibrate, then gn:max=64, calibrated   2.461    13.93 %   +9.982 (+8.546 to +11.42)  not trained further yet; layers changed: 0.1, 2.1, 3.1
# > loss with means and variances scaled by random factors from 1 - delta to 1 + delta
# >   delta  loss          draws
# >   0.1    12.97 ± 0.36  3
# >   0.3    14.91 ± 1.2   3
# > Estimation shift of the later half of the 3 layers is 6.9 times that of the earlier half; it is largest in 3.1 (5.58 in the standard deviations, 17 in the means).
# > None of the 80 rectified channels is off everywhere in the data.

# %% Mend it
# The first fix needs no training: statistics measured anew over the training data. `apply()` puts
# them in, `undo()` takes them out.

patch = nk.recalibrate(model, batches(data.train))
patch.apply()
print(f"after recalibration: {accuracy(model.eval()):.0%}")

# > after recalibration: 98%

# %% So that it does not come back
# Train with `momentum=0.1`, torch's default, or with `momentum=None`, which averages all batches.
# `nk.Probe` in the training loop shows the distance of running statistics from those of the data
# while there is time to act. The doctor as a command, which writes a page with charts:
#
#     normkit diagnose --model my.py:make_model --checkpoint weights.safetensors --train-data folder:photos --test-data folder:photos --try
