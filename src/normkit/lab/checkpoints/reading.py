"""Weights in files: safetensors, or what ``torch.save`` wrote of tensors alone."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normkit.errors import DataError

WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
SHOWN = 5


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a model's weights from a file, all or none.

    Args:
        model: Changed in place, once everything fits.
        path: Ends in ``.safetensors``, or was written by ``torch.save(model.state_dict(), path)``;
            also inside of a dict under ``state_dict``, ``model`` or ``model_state_dict``, and with
            the prefixes of a wrapped model.

    Raises:
        DataError: If the file cannot be read, holds code, or does not fit the model.
    """
    found = _plain_names(_unwrapped(read_tensors(path), path))
    expected = model.state_dict()
    counts = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - found.keys() - counts)  # old checkpoints have no counts
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} ({tuple(found[key].shape)}, the model has {tuple(value.shape)})"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems = {"missing": missing, "unknown to the model": unexpected, "of another shape": shapes}
    said = [f"{what}: {_few(names)}" for what, names in problems.items() if names]
    if said:
        raise DataError(
            f"{path} does not fit the model; {'; '.join(said)}. Check --model and --num-classes, "
            f"and convert to other norms after loading, not before"
        )
    model.load_state_dict(found, strict=not counts - found.keys())


def read_tensors(path: Path) -> Mapping[str, object]:
    """Read a checkpoint without running code that it may hold.

    Raises:
        DataError: If it cannot be read, or would have to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # about how the pickle was written
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds code or objects and not only tensors, so it was not loaded; if you "
            f"trust it, write its tensors anew: torch.save(model.state_dict(), ...) or safetensors"
        ) from error
    except Exception as error:  # bytes that are no checkpoint can end in anything
        raise DataError(
            f"{path} is no checkpoint ({_first_line(error)}); give a .safetensors file or one that "
            f"torch.save(model.state_dict(), ...) wrote"
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path} holds a {type(found).__name__}; a checkpoint is a state dict")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; other files, and unreadable ones, say nothing."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError:
        return {}  # reading its tensors will say what is wrong


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
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(state, partial, metadata=dict(metadata))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be written: {_first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _unwrapped(found: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        inner = found.get(key)
        if isinstance(inner, Mapping):
            found = inner
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        other = _few([str(key) for key in found if key not in tensors])
        raise DataError(
            f"{path} holds other things than tensors: {other or 'nothing'}; a checkpoint is a "
            f"state dict, or a dict that has it as one of {', '.join(WRAPPERS)}"
        )
    return tensors


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _few(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__
