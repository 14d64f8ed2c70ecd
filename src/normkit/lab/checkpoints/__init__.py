"""Weights in files: safetensors, or what ``torch.save`` wrote of tensors alone."""

from normkit.lab.checkpoints.alterations import Alterations, restored
from normkit.lab.checkpoints.fitting import earlier_state, load_weights_
from normkit.lab.checkpoints.writing import save_weights

__all__ = ["Alterations", "earlier_state", "load_weights_", "restored", "save_weights"]
