"""A user's own examples in a safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from normkit.errors import DataError
from normkit.lab.data.dataset import Examples
from normkit.lab.files import require_file
from normkit.text import listed, printable, shortened

SUFFIX = ".safetensors"
MAX_CLASSES = 10**6
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WRITTEN_BY = (
    'safetensors.torch.save_file({"inputs": images, "targets": classes}, path), with images '
    "(N, C, H, W) in floating point, normalised as in training, and classes (N,) as whole numbers"
)


def read_examples(path: Path) -> Examples:
    """Read examples from a file that has tensors ``inputs`` and ``targets``.

    Args:
        path: File whose name ends in ``.safetensors``. The model gets the inputs as they are.

    Raises:
        DataError: If the file cannot be read or does not have these tensors.
    """
    require_file(path)
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        said = printable(shortened(error), 160)
        raise DataError(
            f"{printable(path)} cannot be read ({said}); write it by {WRITTEN_BY}"
        ) from error
    missing = {"inputs", "targets"} - found.keys()
    if missing:
        names = listed(sorted(found)) or "nothing"
        raise DataError(
            f"{printable(path)} holds {names}, and no {' and no '.join(sorted(missing))}; write it "
            f"by {WRITTEN_BY}"
        )
    inputs, targets = found["inputs"], found["targets"]
    fits = inputs.ndim == 4 and targets.shape == inputs.shape[:1] and inputs.numel() > 0
    if not fits or inputs.dtype not in FLOATS or targets.dtype not in WHOLE:
        given = (
            f"inputs {inputs.dtype} {tuple(inputs.shape)}, "
            f"targets {targets.dtype} {tuple(targets.shape)}"
        )
        raise DataError(f"{printable(path)} holds {given}; write it by {WRITTEN_BY}")
    least, largest = int(targets.min()), int(targets.max())
    if least < 0 or largest >= MAX_CLASSES:
        raise DataError(
            f"{printable(path)} holds classes from {least} to {largest}; they are counted from 0, "
            f"and there are at most {MAX_CLASSES}"
        )
    return Examples(inputs=inputs.float(), targets=targets.long())
