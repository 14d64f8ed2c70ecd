"""The weights of a file put into a model, all of them or none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from normkit.errors import DataError
from normkit.lab.checkpoints.reading import read_weights
from normkit.layers.base import TrackingLayer
from normkit.text import listed, printable
from normkit.weights import WeightStandardization

EXAMPLE_WEIGHT, COUNT = "example_weight", "num_batches_tracked"
COMPILED = "_orig_mod."  # what torch.compile puts into names, also in the middle of them
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Tensors = Mapping[str, Tensor]


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a model's weights from a file, all or none.

    Args:
        model: Changed in place, once everything fits.
        path: Ends in ``.safetensors``, or was written by ``torch.save(model.state_dict(), path)``;
            also inside of a dict under ``state_dict``, ``model`` or ``model_state_dict``, and with
            the names that a wrapped or compiled model has.

    Raises:
        DataError: If the file cannot be read, holds code, or does not fit the model.
    """
    load_tensors_(model, read_weights(path), path)


def earlier_state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Read an earlier checkpoint of a model, which is left as it is.

    Example weights are the model's own, whatever the file has: they were chosen afterwards.

    Returns:
        A state dict that fits the model.

    Raises:
        DataError: As ``load_weights_`` does.
    """
    earlier, tensors = copy.deepcopy(model), read_weights(path)
    names = [name for name in tensors if not _is_example_weight(name)]
    load_tensors_(earlier, {name: tensors[name] for name in names}, path)
    return earlier.state_dict()


def load_tensors_(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load tensors that were read from a file; see ``load_weights_``.

    Counts of batches, which old checkpoints do not have, and example weights may be missing: the
    model keeps its own.

    Raises:
        DataError: If they do not fit the model.
    """
    expected = _state(model)
    found = plain_names(tensors, expected)
    for name, module in model.named_modules():
        if isinstance(module, WeightStandardization):
            module.rename_(found, f"{name}.")
    _require_fit(found, expected, path)
    before = {key: value.clone() for key, value in expected.items()}
    try:
        model.load_state_dict(expected | found)
    except BaseException:
        model.load_state_dict(before)
        raise


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that can be loaded, example weights too where they are the default."""
    named = model.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in named if isinstance(m, TrackingLayer)}
    weights = {f"{n}.{EXAMPLE_WEIGHT}".lstrip("."): m.example_weight for n, m in layers.items()}
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
    return model.state_dict() | given


def plain_names(tensors: Tensors, expected: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors without what wrappers put before the names.

    Args:
        tensors: By the names in a file.
        expected: The names in the model.
    """
    found = {key.replace(COMPILED, ""): value for key, value in tensors.items()}
    if len(found) < len(tensors):
        found = dict(tensors)  # two names became one
    while not expected.keys() & found.keys():
        first = {key.partition(".")[0] for key in found if "." in key}
        if len(first) != 1 or not all("." in key for key in found):
            return dict(tensors)
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found


def _require_fit(found: Tensors, expected: Tensors, path: Path) -> None:
    optional = {key for key in expected if key.endswith((EXAMPLE_WEIGHT, COUNT))}
    both = [(key, found[key], value) for key, value in expected.items() if key in found]
    problems = {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unknown to the model": sorted(found.keys() - expected.keys()),
        "of another shape": list(_told(both, _other_shape)),
        "of another kind": list(_told(both, _other_kind)),
        "not from 0 to 1": [key for key, given, _ in both if _is_no_share(key, given)],
    }
    said = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if said:
        raise DataError(
            f"{printable(path)} does not fit the model; {'; '.join(said)}. Check --model and "
            f"--num-classes, and convert to other norms after loading, not before"
        )


def _told(
    pairs: list[tuple[str, Tensor, Tensor]], problem: Callable[[Tensor, Tensor], str]
) -> Iterator[str]:
    """Names with what is wrong with them."""
    for key, given, wanted in pairs:
        what = problem(given, wanted)
        if what:
            yield f"{key} ({what})"


def _other_shape(given: Tensor, wanted: Tensor) -> str:
    if given.shape == wanted.shape:
        return ""
    return f"{tuple(given.shape)}, the model has {tuple(wanted.shape)}"


def _is_example_weight(name: str) -> bool:
    return name.rpartition(".")[2] == EXAMPLE_WEIGHT


def _is_no_share(name: str, given: Tensor) -> bool:
    real = _is_example_weight(name) and given.numel() == 1 and given.dtype in FLOATS
    return real and not 0 <= given.item() <= 1


def _other_kind(given: Tensor, wanted: Tensor) -> str:
    """Why values cannot be those of the model's tensor: only rounding may change them."""
    if given.shape != wanted.shape:
        return ""
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in (given, wanted)]
    if wanted.dtype in FLOATS and given.dtype in FLOATS:
        lost = given.isfinite() & ~given.to(wanted.dtype).isfinite()
        return f"{names[0]}, beyond the numbers of {names[1]}" if lost.any() else ""
    if given.dtype == wanted.dtype or _is_whole(given, wanted):
        return ""
    return f"{names[0]}, the model has {names[1]}"


def _is_whole(given: Tensor, wanted: Tensor) -> bool:
    """Whether these are whole numbers, though a cast of a whole state dict made them others."""
    if wanted.dtype not in COUNTS or given.dtype not in (*COUNTS, *FLOATS):
        return False
    return bool((given.to(wanted.dtype).to(given.dtype) == given).all())
