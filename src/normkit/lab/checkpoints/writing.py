"""A model's weights written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from normkit.lab.files import whole_file
from normkit.text import shortened


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write a model's weights as safetensors; the file appears whole or not at all.

    Args:
        model: The model, left as it is, or its weights and buffers by name. Tensors that it shares
            are written under each name.
        path: Ends in ``.safetensors``; its folder exists.
        metadata: Written into the file.

    Raises:
        DataError: If the file cannot be written.
    """
    given = model.state_dict() if isinstance(model, nn.Module) else model
    state = {k: v.detach().cpu().clone().contiguous() for k, v in given.items()}
    with whole_file(path, "--save") as draft:
        try:
            save_file(state, draft, metadata=dict(metadata))
        except SafetensorError as error:  # what the system says of the file
            raise OSError(shortened(error, 160)) from error
