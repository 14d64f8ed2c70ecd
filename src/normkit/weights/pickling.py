"""Parametrised layers that can be pickled, which torch's cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def make_picklable_(layer: nn.Module) -> None:
    """Let a layer with parametrised tensors be pickled, by itself and inside of a model.

    ``torch.nn.utils.parametrize`` gives the layer a class of its own, which no other process knows;
    pickled are the class that the layer had before and the names of its parametrised tensors.
    """
    type(layer).__reduce_ex__ = _reduced  # type: ignore[method-assign, assignment]


def _reduced(layer: nn.Module, protocol: object) -> tuple[Any, ...]:
    base = parametrize.type_before_parametrizations(layer)
    names = tuple(name for name, _ in layer.get_submodule("parametrizations").named_children())
    return _empty, (base, names), vars(layer)


def _empty(base: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """Make a parametrised layer without state, for copying and unpickling."""
    new: Callable[[type[nn.Module]], nn.Module] = object.__new__
    layer = new(base)
    parametrize._inject_new_class(layer)
    for name in names:
        parametrize._inject_property(layer, name)
    make_picklable_(layer)
    return layer
