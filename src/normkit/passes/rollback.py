"""Work that is done whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.passes.finish import LEVELS, surely
from normkit.passes.snapshot import Snapshot

P = ParamSpec("P")
T = TypeVar("T")


def attempt(work: Callable[[], T], *things: object, values: Iterable[Tensor] = ()) -> T:
    """Do the work and give its result; if it raises, everything becomes what it was before.

    Args:
        work: What is done.
        things: What it may change, see ``Snapshot``.
        values: Parameters whose values it may change.

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
    if torch.compiler.is_compiling():  # traced, not run: there is nothing to put back
        return work()
    return _or_back(work, Snapshot(*things, values=values), LEVELS)


def _or_back(work: Callable[[], T], before: Snapshot, levels: int) -> T:
    try:
        return work() if levels == 0 else _or_back(work, before, levels - 1)
    except BaseException:  # also where a line further inside was interrupted
        before.put_back()
        raise


def all_or_nothing(tool: Callable[P, T]) -> Callable[P, T]:
    """Let models and optimizers that a function is given be as they were when it raises."""

    @functools.wraps(tool)
    def attempted(*args: P.args, **kwargs: P.kwargs) -> T:
        return attempt(lambda: tool(*args, **kwargs), *_things(*args, *kwargs.values()))

    return attempted


def changes_nothing(tool: Callable[P, T]) -> Callable[P, T]:
    """Let models and optimizers that a function is given be as they were whatever it does."""

    @functools.wraps(tool)
    def undone(*args: P.args, **kwargs: P.kwargs) -> T:
        before = Snapshot(*_things(*args, *kwargs.values()))
        return surely(lambda: tool(*args, **kwargs), before.put_back)

    return undone


def _things(*given: object) -> list[nn.Module | Optimizer]:
    return [each for each in given if isinstance(each, nn.Module | Optimizer)]
