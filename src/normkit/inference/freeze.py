"""Running statistics that stand still, whatever mode the model is put in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from normkit.errors import OptionError
from normkit.inference.tracked import Where, chosen, tracked
from normkit.passes import all_or_nothing, unwrap

SUFFIX = "Frozen"
BEFORE = "frozen_from"


class _Frozen(nn.Module):
    """A layer that never trains its statistics; its class is made at run time from another."""

    @property
    def training(self) -> bool:
        """False. The mode that it was put in waits for ``thaw_statistics``."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:  # type: ignore[override]
        vars(self)["training"] = mode

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401 - object's own
        make, arguments, *state = super().__reduce_ex__(protocol)
        kind = type(self)
        own = tuple(vars(kind)[BEFORE] if part is kind else part for part in arguments)
        return _made_frozen, (make, own), *state


@all_or_nothing
def freeze_statistics(model: nn.Module, where: Where | None = None) -> tuple[str, ...]:
    """Let layers with running statistics do in training what they do at evaluation.

    They normalise by their running statistics, which no longer move; ``weight`` and ``bias`` still
    learn. ``model.train()`` does not undo it, nor does setting ``training``; copying and pickling
    keep it, and state dicts stay as they are. Only ``thaw_statistics`` undoes it.

    Args:
        model: Changed in place; torch's norms and ours, the stages of composites included. It may
            be inside DistributedDataParallel, or compiled.
        where: ``where(layer, name)`` says which layers are meant; by default all.

    Returns:
        Names of the chosen layers, all of which are frozen now; those that were before too.

    Raises:
        OptionError: If no layer has running statistics, ``where`` chooses none, or one does not
            know its number of channels yet; then nothing is changed.

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
            f"freeze; those of one example, such as GroupNorm, have none unless they track them"
        )
    found = chosen(layers, where)
    kinds = [(layer, _class(type(layer))) for layer in found.values()]
    for layer, kind in kinds:
        layer.__class__ = kind  # type: ignore[assignment]
    return tuple(found)


@all_or_nothing
def thaw_statistics(model: nn.Module, where: Where | None = None) -> tuple[str, ...]:
    """Undo ``freeze_statistics``: layers are as if they had never been frozen.

    A layer has the mode that its model was last put in, or that was set since.

    Args:
        model: Changed in place.
        where: ``where(layer, name)`` says which layers are meant; by default all.

    Returns:
        Names of the layers that were frozen and no longer are; none if none was.

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
    found = chosen(frozen, where) if frozen else {}
    for layer in found.values():
        layer.__class__ = vars(type(layer))[BEFORE]
    return tuple(found)


def is_frozen(layer: nn.Module) -> bool:
    """Whether ``freeze_statistics`` holds for this layer."""
    return isinstance(layer, _Frozen)


@cache
def _class(kind: type[nn.Module]) -> type[nn.Module]:
    """Class of the frozen layers of a class; it passes for one of the same module."""
    if issubclass(kind, _Frozen):
        return kind
    attributes = {BEFORE: kind, "__module__": kind.__module__}
    metaclass: Any = type(kind)
    return metaclass(f"{kind.__name__}{SUFFIX}", (_Frozen, kind), attributes)


def _made_frozen(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """Make a frozen layer, for copying and unpickling."""
    layer: nn.Module = make(*arguments)
    layer.__class__ = _class(type(layer))  # type: ignore[assignment]
    return layer
