"""Saving the state of models, optimizers and other objects, and restoring it."""

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

from normkit.passes.cleanup import CleanupStep, run_cleanup
from normkit.passes.settings import save_settings

TORCH_CONTAINERS = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)
)
"""Names of the attributes where torch keeps a module's parameters, buffers, children and hooks."""


class Snapshot:
    """The current state of some objects and of torch's settings, which ``put_back`` restores.

    Of a model, it saves the classes, attributes and modes of all modules; their parameters,
    buffers, children and hooks, with the order of these; the ``.grad`` objects and
    ``requires_grad`` of parameters; and the values of buffers and of parameters with one axis, such
    as those of norms. Of an optimizer, it saves the groups and the state, with their order. Of any
    other object, it saves the attributes. Of torch, it saves the settings that ``save_settings``
    lists. Values of larger parameters are only copied where ``values`` lists them, because that
    takes memory.

    Args:
        things: Models, optimizers, and other objects with attributes.
        values: Further tensors whose values are saved.
        attributes: Whether to save attributes that neither torch nor normkit has set, such as a
            counter in the user's own module.
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
        self._steps: list[CleanupStep] = [_save_attributes(each) for each in others]
        self._steps += [_save_attributes(m, attributes or _is_known(m)) for m in modules]
        self._steps += [_save_mode(module) for module in modules if "training" not in vars(module)]
        optimizers = [each for each in others if isinstance(each, Optimizer)]
        self._steps += chain(*map(_save_optimizer, optimizers))
        self._steps += [_save_storage(tensor) for tensor in (*parameters, *buffers)]
        self._steps += [_save_gradient(parameter) for parameter in parameters]
        small = [p for p in parameters if _is_plain(p) and not is_lazy(p) and p.ndim <= 1]
        self._steps += [_save_values(each) for each in dict.fromkeys((*buffers, *small, *values))]
        self._steps += save_settings({parameter.device for parameter in parameters})
        _TAKEN.references = [ref for ref in _TAKEN.references if ref()] + [weakref.ref(self)]

    def put_back(self) -> None:
        """Restore everything; a second call does nothing more.

        Later snapshots of this thread are disabled. An interruption may have left one of them in a
        suspended generator, and when Python closes that generator it would restore a later state.
        """
        if self._is_over:
            return
        taken = [snapshot for ref in _TAKEN.references if (snapshot := ref()) is not None]
        if self in taken:
            for later in taken[taken.index(self) + 1 :]:
                later._is_over = True
        run_cleanup(self._steps)


class _Taken(threading.local):
    """The snapshots of a thread that still exist, oldest first."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Snapshot]] = []


_TAKEN = _Taken()


def _is_known(module: nn.Module) -> bool:
    """Whether the module's class is torch's or normkit's."""
    return type(module).__module__.partition(".")[0] in ("torch", "normkit")


def _save_attributes(owner: Any, every: bool = True) -> CleanupStep:
    """Save an object's class and attributes, or, unless ``every``, only those that torch manages.

    The content of torch's containers is saved too.
    """
    kind, attributes = type(owner), dict(vars(owner))
    if not every:
        known = {*TORCH_CONTAINERS, "training"}
        attributes = {name: value for name, value in attributes.items() if name in known}
    # A ScriptModule has containers of other classes, which cannot be refilled.
    containers = [
        held
        for name, held in attributes.items()
        if name in TORCH_CONTAINERS and isinstance(held, dict | set)
    ]
    contents = [_copied(held) if held else () for held in containers]  # most are empty

    def put_back() -> None:
        if type(owner) is not kind:
            owner.__class__ = kind
        if every:
            _refill(vars(owner), attributes)
        else:
            vars(owner).update(attributes)
        for held, before in zip(containers, contents, strict=True):
            _refill(held, before)

    return put_back


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is a dense ``torch.Tensor``, not a subclass such as ``DTensor``."""
    return type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_nested


def _copied(held: Any) -> Any:
    if isinstance(held, dict):
        return dict(held)  # ten times as fast as copy.copy() of an OrderedDict
    return set(held) if isinstance(held, set) else list(held)


def _save_content(held: Any) -> CleanupStep:
    before = _copied(held)
    return lambda: _refill(held, before)


def _refill(held: Any, before: Any) -> None:
    """Restore the content and order of a container; the container stays the same object."""
    if not _has_content(held, before):
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(before)


def _has_content(held: Any, before: Any) -> bool:
    if not held or not before:
        return not held and not before
    if isinstance(held, set):
        return held == before
    if isinstance(held, dict):
        keys = zip(held, before, strict=False)
        same = all(a is b or (isinstance(a, str | int) and a == b) for a, b in keys)
        return same and _has_content([*held.values()], [*before.values()])
    return [*map(id, held)] == [*map(id, before)]


def _save_mode(module: nn.Module) -> CleanupStep:
    """Save the mode of a module that keeps it outside of ``vars()``, such as a ScriptModule."""
    mode = getattr(module, "training", None)  # a frozen ScriptModule has no mode

    def put_back() -> None:
        if getattr(module, "training", None) != mode:
            setattr(module, "training", mode)  # noqa: B010 - torch types modules' attributes

    return put_back


def _save_optimizer(optimizer: Optimizer) -> Iterator[CleanupStep]:
    groups, state = optimizer.param_groups, optimizer.state
    inside = [value for group in groups for value in group.values() if isinstance(value, list)]
    states = [each for each in state.values() if isinstance(each, dict)]
    return map(_save_content, (groups, *groups, *inside, state, *states))


def _save_storage(tensor: Tensor) -> CleanupStep:
    """Save a tensor's class and storage; a forward changes both for lazy parameters."""
    kind, data, is_plain = type(tensor), tensor.data, _is_plain(tensor)

    def put_back() -> None:
        if type(tensor) is not kind:
            tensor.__class__ = kind  # type: ignore[assignment]
        if is_plain and not _is_same_view(tensor.data, data):
            tensor.data = data

    return put_back


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    views = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (a, b))
    return next(views) == next(views)


def _save_gradient(parameter: nn.Parameter) -> CleanupStep:
    requires_grad, grad = parameter.requires_grad, parameter.grad

    def put_back() -> None:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        if parameter.grad is not grad:
            parameter.grad = grad

    return put_back


def _save_values(tensor: Tensor) -> CleanupStep:
    """Save a tensor's values; they are only written back if they changed.

    Some tensors, such as expanded ones, cannot be written to.
    """
    local = tensor.data if is_lazy(tensor) else tensor.detach()
    if hasattr(local, "to_local"):  # a DTensor: save the part on this process
        local = local.to_local()  # type: ignore[operator]
    if not _is_plain(local) or local.is_meta:
        return lambda: None
    values = local.clone()

    def put_back() -> None:
        # ``local`` is detached, so no_grad() is not needed; leaving it could be interrupted.
        if not _equal(local, values):
            local.copy_(values)

    return put_back


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, where NaN equals NaN."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
