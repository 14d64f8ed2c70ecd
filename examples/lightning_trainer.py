"""With Lightning's Trainer.

A `LightningModule` is a module: convert the network in it, and let a probe watch the norms as a
callback.

    pip install ".[lab,trainers]"  # in the folder of the project
    python examples/lightning_trainer.py
"""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk
from normkit.lab.data import load
from normkit.lab.models import build_model

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
seed_everything(0, verbose=False)


class Classifier(LightningModule):
    """A small ResNet."""

    def __init__(self, norm):
        super().__init__()
        self.network = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
        nk.convert_norm_(self.network, norm)  # before the optimizer is made

    def training_step(self, batch, _):
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


# %% Train
# `nk.Probe(...).callback()` is a callback of the Trainer. Every so many steps it records what the
# norms do, without changing the training.

data = load("digits", limit=400)
model = Classifier("gn:8")
probe = nk.Probe(model.network, every=25)
trainer = Trainer(
    max_epochs=2,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[probe.callback()],
)
trainer.fit(
    model, DataLoader(TensorDataset(data.train.inputs, data.train.targets), 8, shuffle=True)
)
print("recorded at steps", [record.step for record in probe.records])

# > recorded at steps [25, 50, 75, 100]

# %% Evaluate

model.eval()
accuracy = (model.network(data.test.inputs).argmax(1) == data.test.targets).float().mean().item()
print("good enough:", accuracy > 0.5)

# > good enough: True
