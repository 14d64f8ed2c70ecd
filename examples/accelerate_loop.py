"""With Accelerate.

Accelerate accumulates gradients over several forwards. `nk.accumulate_statistics` updates running
statistics by the same whole batches.

    pip install ".[lab,trainers]"  # in the folder of the project
    python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk
from normkit.lab.data import load
from normkit.lab.models import build_model

torch.manual_seed(0)
data = load("digits", limit=384)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model

# %% Prepare
# On several processes this is the place for `nk.synchronize_(model)`: before `prepare` wraps the
# model.

print(nk.synchronize_(model))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loader = DataLoader(TensorDataset(data.train.inputs, data.train.targets), 8, shuffle=True)
network, optimizer, loader = accelerator.prepare(model, optimizer, loader)

# > statistics over all processes: 1, 3.norm1, 3.norm2, 4.norm1, 4.norm2
# > replaced by layers of normkit: 1, 3.norm1, 3.norm2, 4.norm1, 4.norm2

# %% Train
# Eight images at a forward, four forwards a step. Running statistics move once a step, by 32
# images.

network.train()
with nk.accumulate_statistics(model, steps=4):
    for _ in range(3):
        for inputs, targets in loader:
            with accelerator.accumulate(network):
                accelerator.backward(F.cross_entropy(network(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
norm = next(layer for layer in model.modules() if isinstance(layer, nk.BatchNorm))
print(len(loader) * 3, "forwards,", norm.num_batches_tracked.item(), "updates of the statistics")

# > 144 forwards, 36 updates of the statistics

# %% Evaluate

accuracy = (model.eval()(data.test.inputs).argmax(1) == data.test.targets).float().mean().item()
print("good enough:", accuracy > 0.5)

# > good enough: True
