"""Freeze running statistics, so that they do not change in any mode of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from normkit.errors import OptionError
from normkit.inference.tracked import Where, select_layers, tracked
from normkit.passes import all_or_nothing, unwrap

SUFFIX = "Frozen"
ORIGINAL_CLASS = "frozen_from"


class _Frozen(nn.Module):
    """Base of the classes of frozen layers, which are made at run time from the layers' classes."""

    @property
    def training(self) -> bool:
        """False, whatever was set; ``thaw_statistics`` brings the value that was set back."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:  # type: ignore[override]
        vars(self)["training"] = mode

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, arguments, *state = super().__reduce_ex__(protocol)
        kind = type(self)
        # The frozen class exists only at run time, so a pickle must name the original class.
        own = tuple(vars(kind)[ORIGINAL_CLASS] if part is kind else part for part in arguments)
        return _make_frozen, (make, own), *state


@all_or_nothing
def freeze_statistics(model: nn.Module, where: Where | None = None) -> tuple[str, ...]:
    """Freeze running statistics: layers work in training mode as in evaluation mode.

    Frozen layers normalise by their running statistics and no longer update them; ``weight`` and
    ``bias`` still learn. Neither ``model.train()`` nor setting ``training`` undoes this. Copies and
    pickles stay frozen, and state dicts do not change. Only ``thaw_statistics`` undoes it.

    Args:
        model: Changed in place: norms of torch and normkit, also the stages of composites. It may
            be inside DistributedDataParallel, or compiled.
        where: ``where(layer, name)`` chooses the layers to freeze; by default all.

    Returns:
        Names of the chosen layers, including layers that were frozen before.

    Raises:
        OptionError: If no layer has running statistics, ``where`` chooses none, or a layer does
            not know its number of channels yet; then nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        >>> freeze_statistics(model)
        ('1',)
        >>> _ = model.train()
        >>> model[1].training
        False
    """
    layers = tracked(unwrap(model, "freeze"))
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no layer with running statistics, so there is nothing to "
            f"freeze; norms of single examples, such as GroupNorm, have none unless they track them"
        )
    found = select_layers(layers, where)
    # All classes are made before the first layer is changed, because making one can fail.
    kinds = [(layer, _frozen_class(type(layer))) for layer in found.values()]
    for layer, kind in kinds:
        layer.__class__ = kind  # type: ignore[assignment]
    return tuple(found)


@all_or_nothing
def thaw_statistics(model: nn.Module, where: Where | None = None) -> tuple[str, ...]:
    """Undo ``freeze_statistics``: layers are as if they had never been frozen.

    Each layer gets the mode that was last set for it or for its model.

    Args:
        model: Changed in place.
        where: ``where(layer, name)`` chooses the layers to thaw; by default all.

    Returns:
        Names of the layers that were thawed; empty if none was frozen.

    Raises:
        OptionError: If ``where`` chooses none of the frozen layers.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(6))
        >>> _ = freeze_statistics(model)
        >>> thaw_statistics(model)
        ('0',)
        >>> model[0].training
        True
    """
    frozen = {name: m for name, m in unwrap(model, "thaw").named_modules() if is_frozen(m)}
    found = select_layers(frozen, where) if frozen else {}
    for layer in found.values():
        layer.__class__ = vars(type(layer))[ORIGINAL_CLASS]
    return tuple(found)


def is_frozen(layer: nn.Module) -> bool:
    """Whether ``freeze_statistics`` has frozen this layer."""
    return isinstance(layer, _Frozen)


@cache
def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Make the class of the frozen layers of a class; its ``__module__`` is the original's."""
    if issubclass(kind, _Frozen):
        return kind
    attributes = {ORIGINAL_CLASS: kind, "__module__": kind.__module__}
    metaclass: Any = type(kind)
    return metaclass(f"{kind.__name__}{SUFFIX}", (_Frozen, kind), attributes)


def _make_frozen(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """Make a frozen layer when it is copied or unpickled."""
    layer: nn.Module = make(*arguments)
    layer.__class__ = _frozen_class(type(layer))  # type: ignore[assignment]
    return layer
