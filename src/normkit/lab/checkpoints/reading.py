"""A file's tensors by name, read without running code that it may hold."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data.files import SUFFIX
from normkit.lab.files import require_file
from normkit.text import listed, printable, shortened

WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights
MAX_WRAPPERS = 4  # a dict in a pickle may hold itself


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under the names that it has for them.

    Args:
        path: Ends in ``.safetensors``, or was written by ``torch.save`` of a state dict, or of a
            dict that has one under ``state_dict``, ``model`` or ``model_state_dict``.

    Raises:
        DataError: If it cannot be read, would have to run code, or holds anything but plain
            tensors by name.
    """
    found = _unwrapped(_read(path))
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    unnamed = [key for key in found if not isinstance(key, str)]
    if unnamed:
        raise DataError(
            f"{printable(path)} has {listed(map(repr, unnamed))} as names; the names of weights "
            f"are texts, such as those of model.state_dict()"
        )
    other = [key for key in found if key not in tensors]
    if other or not tensors:
        raise DataError(
            f"{printable(path)} holds other things than tensors: {listed(other) or 'nothing'}; a "
            f"checkpoint is a state dict, or a dict that has it as one of {', '.join(WRAPPERS)}"
        )
    _require_plain(path, tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; files of ``torch.save`` say nothing.

    Raises:
        DataError: If it cannot be read.
    """
    require_file(path)
    if path.suffix.lower() != SUFFIX:
        return {}
    try:
        _require_single_names(path)
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _no_checkpoint(path, error) from error


def _read(path: Path) -> Mapping[object, object]:
    require_file(path)
    try:
        if path.suffix.lower() == SUFFIX:
            _require_single_names(path)
            return load_file(path)  # type: ignore[return-value]  # a mapping is covariant here
        with warnings.catch_warnings(action="ignore"):  # about how the pickle was written
            found = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{printable(path)} holds code or objects and not only tensors, so it was not loaded; "
            f"if you trust it, write its tensors anew: torch.save(model.state_dict(), ...) or "
            f"safetensors"
        ) from error
    except Exception as error:  # bytes that are no checkpoint can end in anything
        raise _no_checkpoint(path, error) from error
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise DataError(f"{printable(path)} holds a {kind}; a checkpoint is a state dict")
    return found


def _no_checkpoint(path: Path, error: Exception) -> DataError:
    said = printable(shortened(error) or type(error).__name__, 160)
    return DataError(
        f"{printable(path)} is no checkpoint ({said}); give a .safetensors file or one that "
        f"torch.save(model.state_dict(), ...) wrote"
    )


def _require_single_names(path: Path) -> None:
    """Refuse a safetensors file that gives one name twice: its reader would take the last."""
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if 8 + size > path.stat().st_size:
            return  # the reader says what is wrong with it
        header = file.read(size)
    try:
        json.loads(header, object_pairs_hook=lambda pairs: _once(path, pairs))
    except DataError:
        raise
    except (ValueError, RecursionError):
        return  # likewise


def _once(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{printable(path)} names {listed(twice)} twice; write it anew")
    return dict(pairs)


def _unwrapped(found: Mapping[object, object]) -> Mapping[object, object]:
    for _ in range(MAX_WRAPPERS):
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not inner:
            break
        found = inner[0]  # type: ignore[assignment]  # it was asked for above
    return found


def _require_plain(path: Path, found: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose values cannot be copied into a weight."""
    kinds = {key: _kind(value) for key, value in found.items()}
    odd = [f"{printable(key)} ({kind})" for key, kind in kinds.items() if kind]
    if odd:
        raise DataError(
            f"{printable(path)} holds tensors that are not plain: {listed(odd)}; write dense "
            f"tensors of floating point values, for instance by value.to_dense() or "
            f"value.dequantize()"
        )


def _kind(value: Tensor) -> str:
    """What makes a tensor none that a weight can be copied from; empty for plain ones."""
    if value.is_nested:
        return "nested"
    if value.is_quantized:
        return "quantized"
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    return "without values" if value.is_meta else ""
