"""Examples of one's own, in a safetensors file."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from normkit.errors import DataError
from normkit.lab.data.dataset import Examples

SUFFIX = ".safetensors"
WRITTEN_BY = (
    'safetensors.torch.save_file({"inputs": images, "targets": classes}, path), with images '
    "(N, C, H, W) in floating point, normalised as in training, and classes (N,) as whole numbers"
)


def read_examples(path: Path) -> Examples:
    """Read examples from a file that has tensors ``inputs`` and ``targets``.

    Args:
        path: Ends in ``.safetensors``. Nothing is normalised: the inputs are what the model gets.

    Raises:
        DataError: If it cannot be read or holds something else.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); write it by {WRITTEN_BY}") from error
    missing = {"inputs", "targets"} - found.keys()
    if missing:
        names = ", ".join(sorted(found)) or "nothing"
        raise DataError(
            f"{path} holds {names}, and no {' and no '.join(sorted(missing))}; write it by "
            f"{WRITTEN_BY}"
        )
    inputs, targets = found["inputs"], found["targets"]
    fits = inputs.ndim == 4 and targets.shape == inputs.shape[:1] and len(targets) > 0
    if not fits or not inputs.is_floating_point() or targets.is_floating_point():
        given = (
            f"inputs {inputs.dtype} {tuple(inputs.shape)}, "
            f"targets {targets.dtype} {tuple(targets.shape)}"
        )
        raise DataError(f"{path} holds {given}; write it by {WRITTEN_BY}")
    return Examples(inputs=inputs, targets=targets.long())
