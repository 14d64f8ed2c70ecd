"""Making parametrised layers picklable; torch's own cannot be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def make_picklable_(layer: nn.Module) -> None:
    """Make a layer with parametrised tensors picklable, by itself and inside a model.

    ``torch.nn.utils.parametrize`` gives the layer a new class that other processes cannot import.
    The pickle stores the layer's original class and the names of its parametrised tensors instead.
    """
    type(layer).__reduce_ex__ = _reduced  # type: ignore[method-assign, assignment]


def _reduced(layer: nn.Module, protocol: object) -> tuple[Any, ...]:
    base = parametrize.type_before_parametrizations(layer)
    names = tuple(name for name, _ in layer.get_submodule("parametrizations").named_children())
    return _empty, (base, names), vars(layer)


def _empty(base: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """Create a parametrised layer without state, for copying and unpickling."""
    layer = object.__new__(base)
    parametrize._inject_new_class(layer)
    for name in names:
        parametrize._inject_property(layer, name)
    make_picklable_(layer)
    return layer
