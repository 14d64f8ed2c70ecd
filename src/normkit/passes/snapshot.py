"""What models, optimizers and other objects are at one moment, and the way back there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normkit.passes.finish import Step, finish
from normkit.passes.settings import settings_now

OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
"""Names under which torch keeps a module's parameters, buffers, children and hooks."""


class Snapshot:
    """Everything that some objects are now, and how torch is set.

    Of a model: the classes and attributes of all of its modules, their modes, their parameters,
    buffers, children and hooks in this order, the ``.grad`` objects and ``requires_grad`` of
    parameters, and the values of buffers and of parameters with one axis, such as those of norms.
    Of an optimizer: groups and state, in this order. Of any other object: its attributes. Of torch:
    see ``settings_now``. Values of other parameters take memory: they are kept where ``values``
    asks for it.

    Args:
        things: Models, optimizers, and other objects with attributes.
        values: Tensors that may be written to, besides those.
        attributes: Whether attributes of modules are kept that are neither torch's nor ours, such
            as what the user's own forward counts.
    """

    def __init__(
        self, *things: object, values: Iterable[Tensor] = (), attributes: bool = True
    ) -> None:
        self._is_over = False
        models = [thing for thing in things if isinstance(thing, nn.Module)]
        others = [thing for thing in things if not isinstance(thing, nn.Module)]
        modules = dict.fromkeys(module for model in models for module in model.modules())
        parameters = dict.fromkeys(p for model in models for p in model.parameters())
        buffers = dict.fromkeys(b for m in modules for b in m._buffers.values() if b is not None)
        self._steps: list[Step] = [_attributes(each) for each in others]
        self._steps += [_attributes(m, attributes or _is_known(m)) for m in modules]
        self._steps += [_mode(module) for module in modules if "training" not in vars(module)]
        self._steps += chain(*(_optimizer(each) for each in others if isinstance(each, Optimizer)))
        self._steps += [_memory(tensor) for tensor in (*parameters, *buffers)]
        self._steps += [_gradient(parameter) for parameter in parameters]
        small = [p for p in parameters if _is_plain(p) and not is_lazy(p) and p.ndim <= 1]
        self._steps += [_values(each) for each in dict.fromkeys((*buffers, *small, *values))]
        self._steps += settings_now({parameter.device for parameter in parameters})
        _TAKEN.references = [ref for ref in _TAKEN.references if ref()] + [weakref.ref(self)]

    def put_back(self) -> None:
        """Make everything what it was, from whatever it is now; twice is once.

        Snapshots that this thread has taken since do nothing from now on. An interruption may have
        left one in a suspended generator, and Python would finish that at any time.
        """
        if self._is_over:
            return
        taken = [snapshot for ref in _TAKEN.references if (snapshot := ref()) is not None]
        if self in taken:
            for later in taken[taken.index(self) + 1 :]:
                later._is_over = True
        finish(self._steps)


class _Taken(threading.local):
    """Snapshots that a thread has taken and that are still there, in their order."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Snapshot]] = []


_TAKEN = _Taken()


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("torch", "normkit")


def _attributes(owner: Any, every: bool = True) -> Step:  # noqa: ANN401 - any with attributes
    kind, attributes = type(owner), dict(vars(owner))
    if not every:
        attributes = {n: v for n, v in attributes.items() if n in OWN or n == "training"}
    own = [held for name, held in attributes.items() if name in OWN and _can_be_filled(held)]
    inside = [_copied(held) if held else () for held in own]  # most are empty

    def put_back() -> None:
        if type(owner) is not kind:
            owner.__class__ = kind
        if every:
            _refill(vars(owner), attributes)
        else:
            vars(owner).update(attributes)
        for held, before in zip(own, inside, strict=True):
            _refill(held, before)

    return put_back


def _can_be_filled(held: object) -> bool:
    """Whether this is a container of Python's; those of a ScriptModule are not."""
    return isinstance(held, dict | set)


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is torch's own kind with its values here, not in parts on several devices."""
    return type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_nested


def _copied(held: Any) -> Any:  # noqa: ANN401 - a dict, a list or a set
    if isinstance(held, dict):
        return dict(held)  # copy.copy() of an OrderedDict takes ten times as long
    return set(held) if isinstance(held, set) else list(held)


def _content(held: Any) -> Step:  # noqa: ANN401
    before = _copied(held)
    return lambda: _refill(held, before)


def _refill(held: Any, before: Any) -> None:  # noqa: ANN401
    """Give a container what it held, in the old order; it stays the same object."""
    if not _holds(held, before):
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(before)


def _holds(held: Any, before: Any) -> bool:  # noqa: ANN401
    if not held or not before:
        return not held and not before
    if isinstance(held, set):
        return held == before
    if isinstance(held, dict):
        keys = zip(held, before, strict=False)
        same = all(a is b or (isinstance(a, str | int) and a == b) for a, b in keys)
        return same and _holds([*held.values()], [*before.values()])
    return [*map(id, held)] == [*map(id, before)]


def _mode(module: nn.Module) -> Step:
    """The mode of a module that does not have it among its attributes, such as a ScriptModule."""
    mode = getattr(module, "training", None)  # a frozen one has none at all

    def put_back() -> None:
        if getattr(module, "training", None) != mode:
            setattr(module, "training", mode)  # noqa: B010 - torch types modules' attributes

    return put_back


def _optimizer(optimizer: Optimizer) -> Iterator[Step]:
    groups, state = optimizer.param_groups, optimizer.state
    inside = [value for group in groups for value in group.values() if isinstance(value, list)]
    states = [each for each in state.values() if isinstance(each, dict)]
    return map(_content, (groups, *groups, *inside, state, *states))


def _memory(tensor: Tensor) -> Step:
    """Where the values are, and of what class the tensor is: a forward makes lazy ones others."""
    kind, data, is_plain = type(tensor), tensor.data, _is_plain(tensor)

    def put_back() -> None:
        if type(tensor) is not kind:
            tensor.__class__ = kind  # type: ignore[assignment]
        if is_plain and not _is_same_memory(tensor.data, data):
            tensor.data = data

    return put_back


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    places = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (a, b))
    return next(places) == next(places)


def _gradient(parameter: nn.Parameter) -> Step:
    requires_grad, grad = parameter.requires_grad, parameter.grad

    def put_back() -> None:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        if parameter.grad is not grad:
            parameter.grad = grad

    return put_back


def _values(tensor: Tensor) -> Step:
    """Values, which are only written if they have changed: not every tensor can be written."""
    here = tensor.data if is_lazy(tensor) else tensor.detach()
    local = getattr(here, "to_local", None)
    here = here if local is None else local()  # the part that this process has of it
    if not _is_plain(here) or here.is_meta:
        return lambda: None
    values = here.clone()

    def put_back() -> None:
        if not _equal(here, values):
            here.copy_(values)  # detached: no_grad() has an end, which could be interrupted

    return put_back


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same, NaN being itself."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
