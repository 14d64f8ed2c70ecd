"""Calls that restore models and optimizers if they fail."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.passes.cleanup import LEVELS, call_with_cleanup
from normkit.passes.snapshot import Snapshot

P = ParamSpec("P")
T = TypeVar("T")


def attempt(work: Callable[[], T], *things: object, values: Iterable[Tensor] = ()) -> T:
    """Call ``work`` and return its result; if it raises, restore everything it may have changed.

    Args:
        work: The function to call.
        things: Models, optimizers and other objects that it may change, see ``Snapshot``.
        values: Large parameters whose values it may change; ``Snapshot`` does not copy these
            otherwise.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> def stop_half_way():
        ...     norm.eps, norm.training = 1.0, False
        ...     raise KeyboardInterrupt
        >>> try:
        ...     attempt(stop_half_way, norm)
        ... except KeyboardInterrupt:
        ...     print(norm.eps, norm.training)
        1e-05 True
    """
    if torch.compiler.is_compiling():  # the code is traced, not run: there is nothing to restore
        return work()
    return _call_or_restore(work, Snapshot(*things, values=values), LEVELS)


def _call_or_restore(work: Callable[[], T], before: Snapshot, levels: int) -> T:
    """Nest ``levels`` try blocks around ``work``; see ``normkit.passes.cleanup``."""
    try:
        return work() if levels == 0 else _call_or_restore(work, before, levels - 1)
    except BaseException:  # an inner block may have been interrupted before it restored
        before.put_back()
        raise


def all_or_nothing(tool: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function: if it raises, its model and optimizer arguments are restored."""

    @functools.wraps(tool)
    def attempted(*args: P.args, **kwargs: P.kwargs) -> T:
        return attempt(lambda: tool(*args, **kwargs), *_things(*args, *kwargs.values()))

    return attempted


def changes_nothing(tool: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function: its model and optimizer arguments are restored when it returns."""

    @functools.wraps(tool)
    def undone(*args: P.args, **kwargs: P.kwargs) -> T:
        before = Snapshot(*_things(*args, *kwargs.values()))
        return call_with_cleanup(lambda: tool(*args, **kwargs), before.put_back)

    return undone


def _things(*given: object) -> list[nn.Module | Optimizer]:
    return [each for each in given if isinstance(each, nn.Module | Optimizer)]
