"""With Hugging Face's Trainer.

Models of `transformers` hold torch's layers: convert them in place, then train as ever. Here a
small ResNet of theirs is trained from scratch on the digits.

    pip install ".[lab,trainers]"  # in the folder of the project
    python examples/huggingface_trainer.py
"""

import tempfile

import torch
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import normkit as nk
from normkit.lab.data import load

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.manual_seed(0)

# %% Convert
# A model of `from_pretrained` is converted in the same way. Then pass some batches as `calibrate=`,
# so that it keeps most of what it knows.

config = ResNetConfig(
    num_channels=1, num_labels=10, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
    layer_type="basic",
)  # fmt: skip
model = ResNetForImageClassification(config)
done = nk.convert_norm_(model, "gn:8")
print(len(done.changes), "norms converted")

# > 6 norms converted

# %% Train with two images at a time

data = load("digits", limit=400)
examples = [
    {"pixel_values": image, "labels": target}
    for image, target in zip(data.train.inputs, data.train.targets, strict=True)
]
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=3,
    learning_rate=2e-3,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    logging_strategy="no",
    dataloader_pin_memory=False,
)
trainer = Trainer(model=model, args=arguments, train_dataset=examples)
trainer.remove_callback(PrinterCallback)  # prints the time it took
result = trainer.train()
print("steps:", result.global_step)

# > steps: 150

# %% Evaluate

with torch.no_grad():
    outputs = model.eval()(data.test.inputs).logits
print("good enough:", (outputs.argmax(1) == data.test.targets).float().mean().item() > 0.5)

# > good enough: True
