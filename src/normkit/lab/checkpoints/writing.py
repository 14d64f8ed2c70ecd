"""A model's weights written to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from normkit.errors import DataError
from normkit.text import printable, shortened


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a model's weights as safetensors; the file appears whole or not at all.

    Args:
        model: The model, left as it is. Tensors that it shares are written under each name.
        path: Ends in ``.safetensors``; its folder exists.
        metadata: Written into the file.

    Raises:
        DataError: If the file cannot be written.
    """
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    partial = path.with_name(f".{os.getpid()}.partial")  # a short name fits where a long one does
    try:
        save_file(state, partial, metadata=dict(metadata))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{printable(path)} cannot be written: {printable(shortened(error), 160)}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
