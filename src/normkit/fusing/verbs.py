"""Fusing activations and sums into the norms of a model, and reverting it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.convert import Conversion, convert_norm_
from normkit.errors import ConversionError
from normkit.fusing.forward import rewritten
from normkit.fusing.plan import Plan, Step, plan
from normkit.passes import all_or_nothing, attempt, call_with, copied, require_unwrapped, untouched
from normkit.text import module_name, table_lines

TOLERANCE = 1e-3  # largest difference of outputs, relative to their largest value
ROUNDINGS = 16  # of an output's dtype, that may explain a difference if it has 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A norm that now applies an activation.

    Args:
        name: Its name in the model.
        activation: The activation.
        residual: Whether a residual is added before the activation.
        how: ``"nn.Identity"`` if that replaced the activation; ``"rewritten"`` if the module around
            both has a new forward.
        converted: Class of the norm that our layer replaced; empty if the norm was ours.
    """

    name: str
    activation: str
    residual: bool
    how: str
    converted: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFused:
    """A norm that was left as it was.

    Args:
        name: Its name in the model.
        why: The reason.
    """

    name: str
    why: str


@dataclass(kw_only=True, eq=False, repr=False)
class Fusion:
    """The result of fusing; prints as a table.

    Args:
        model: The model.
        fused: Norms that now apply an activation.
        left: Norms that stayed as they were, with the reasons.
    """

    model: nn.Module
    fused: tuple[Fused, ...]
    left: tuple[NotFused, ...]
    _undo: list[tuple[Any, ...]] = field(kw_only=True)
    _conversion: Conversion | None = field(kw_only=True, default=None)

    def revert(self) -> nn.Module:
        """Restore the modules, classes and norms from before, and return the model.

        Parameters and running statistics keep their present values. A second call changes nothing.
        """
        converted = [] if self._conversion is None else [self._conversion]
        return attempt(self._revert, self, self.model, *converted)

    def _revert(self) -> nn.Module:
        statistics = self._statistics() if self._undo else {}
        for what, owner, key, value in reversed(self._undo):
            _put(what, owner, key, value)
        self._undo = []
        if self._conversion is not None:
            self._conversion.revert()
        for name, present in statistics.items():
            for key, buffer in self.model.get_submodule(name).named_buffers():
                buffer.copy_(present[key])
        return self.model

    def _statistics(self) -> dict[str, dict[str, Tensor]]:
        """Buffers of the layers that replaced norms: a conversion's ``revert`` loses them."""
        modules = dict(self.model.named_modules())
        names = [each.name for each in self.fused if each.converted and each.name in modules]
        return {name: dict(modules[name].named_buffers()) for name in names}

    def __repr__(self) -> str:
        return f"<Fusion: {self._summary()}>"

    def __str__(self) -> str:
        head = ("name", "goes on to", "by", "was")
        rows = [(module_name(f.name), _ending(f), f.how, f.converted or "-") for f in self.fused]
        lines = [self._summary(), *(table_lines([head, *rows]) if rows else [])]
        return "\n".join([*lines, *self._left_alone()])

    def _summary(self) -> str:
        return f"fused {len(self.fused)} of {len(self.fused) + len(self.left)} norms"

    def _left_alone(self) -> Iterator[str]:
        for why in dict.fromkeys(each.why for each in self.left):
            names = [module_name(each.name) for each in self.left if each.why == why]
            yield f"left alone, {why}: {', '.join(names)}"


def _ending(fused: Fused) -> str:
    return f"sum, {fused.activation}" if fused.residual else fused.activation


@all_or_nothing
def fuse_activations_(model: nn.Module, example_input: Any = None) -> Fusion:
    """Fuse the activations and residual sums of a model, in place, into the norms before them.

    A norm is fused if its result is used only by an activation, or only by a sum whose result is
    used only by an activation. The norm then has the option ``activation=``, and in the second case
    it is called with ``residual=``. If the activation is a module that is called once and nothing
    is added, ``nn.Identity`` replaces it. Otherwise the forward around both is rewritten: the
    module gets a new class, a subclass of its old one. The state dict stays the same. Batch, group
    and instance norms of torch and timm, also timm's ``BatchNormAct2d`` with its activation, are
    replaced by ours first, which hold the same parameters.

    A rewritten forward reads its module's attributes (flags, sizes) once, when it is written, so
    later changes of them have no effect. A forward is not rewritten if it differs between training
    and evaluation.

    Args:
        model: Any model.
        example_input: The model's only argument, a tuple of arguments, or a dict of named ones. The
            model is called with it before and after, in evaluation mode, and the outputs must
            agree to a thousandth of the largest (if they have 16 bits, to 16 roundings). Norms
            whose result is added to a map of another shape or dtype are left alone; without an
            example they are fused, and refuse such a map when the model is called.

    Returns:
        The norms that were fused, and the others with the reasons; ``.revert()`` undoes it.

    Raises:
        OptionError: If the model is wrapped or compiled, or hides its layers.
        ConversionError: If our layer cannot replace a norm, or the outputs on the example differ.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(fuse_activations_(model))
        fused 1 of 1 norms
          name  goes on to  by           was
          1     relu        nn.Identity  BatchNorm2d
        >>> model[1].activation, model[2]
        ('relu', Identity())
    """
    require_unwrapped(model, "fuse the activations of")
    planned = plan(model)
    if example_input is None:
        return _fused(model, planned)
    before = _outputs(model, example_input)
    while True:
        done = _fused(model, planned)
        try:
            with _watched(model, planned):
                after = _outputs(model, example_input)
        except _UnlikeSum as found:
            done._revert()
            planned.leave(*found.args)
        else:
            _require_same(before, after)
            return done


def _fused(model: nn.Module, planned: Plan) -> Fusion:
    kinds = {name: type(model.get_submodule(name)).__name__ for name in planned.twins}
    conversion = convert_norm_(model, dict(planned.twins)) if planned.twins else None
    undo = list(_carry_out(model, planned))
    return Fusion(
        model=model,
        fused=tuple(_said(step, kinds) for step in planned.steps),
        left=tuple(NotFused(name=name, why=why) for name, why in planned.left.items()),
        _undo=undo,
        _conversion=conversion,
    )


class _UnlikeSum(Exception):  # noqa: N818 - it says what was found, and is caught
    """A sum of two unlike maps, which a norm cannot take: the norm's name, and the reason."""


@contextmanager
def _watched(model: nn.Module, planned: Plan) -> Iterator[None]:
    """Inside, a norm that is given a residual unlike its input raises ``_UnlikeSum``."""

    def watch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, residual = args[0], kwargs["residual"]
        if not isinstance(residual, Tensor):
            raise _UnlikeSum(name, f"a {type(residual).__name__} is added to its result")
        ours, theirs = ((t.shape, t.dtype, t.device) for t in (x, residual))
        if ours != theirs:
            said = f"{tuple(residual.shape)} in {residual.dtype}"
            own = f"{tuple(x.shape)} in {x.dtype}"
            raise _UnlikeSum(name, f"a map of {said} is added to its result of {own}")

    handles = [
        model.get_submodule(step.name).register_forward_pre_hook(
            lambda _, args, kwargs, name=step.name: watch(name, args, kwargs), with_kwargs=True
        )
        for step in planned.steps
        if step.residual
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _said(step: Step, kinds: dict[str, str]) -> Fused:
    how = "rewritten" if step.own is not None and step.place is None else "nn.Identity"
    return Fused(
        name=step.name,
        activation=step.activation.name,
        residual=step.residual,
        how=how,
        converted=kinds.get(step.name, ""),
    )


def _carry_out(model: nn.Module, planned: Plan) -> Iterator[tuple[Any, ...]]:
    """Change the model; yield the arguments with which ``_put`` undoes each change."""
    steps = planned.steps
    for own in dict.fromkeys(step.own for step in steps if step.own and step.place is None):
        norms = {step.target for step in steps if step.own is own}
        yield "class", own.module, None, type(own.module)
        own.module.__class__ = rewritten(own, norms)
    for step in steps:
        norm = model.get_submodule(step.name)
        if step.own is not None and step.place is not None:
            yield _replace(step.own.module, step.place)
        elif step.own is None:
            yield _replace(norm, "act")
        yield "activation", norm, None, (norm.activation, norm.negative_slope)
        _put("activation", norm, None, step.activation)


def _replace(owner: nn.Module, name: str) -> tuple[Any, ...]:
    """Replace an activation by ``nn.Identity``."""
    path, _, key = name.rpartition(".")
    holder = owner.get_submodule(path)
    old = holder._modules[key]
    identity = nn.Identity()
    identity.training = old.training if old is not None else True
    holder._modules[key] = identity
    return "module", holder, key, old


def _put(what: str, owner: Any, key: Any, value: Any) -> None:
    if what == "class":
        owner.__class__ = value
    elif what == "module":
        owner._modules[key] = value
    else:
        owner.activation, owner.negative_slope = value


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    with untouched(model, training=False), torch.no_grad():
        outputs = call_with(model, copied(example_input))
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _require_same(before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    """Refuse fusing if it changes the outputs.

    Raises:
        ConversionError: If outputs differ by more than ``TOLERANCE``, or ``ROUNDINGS``.
    """
    for old, new in zip(before, after, strict=True):
        finite = old.isfinite()
        distance = (old.double() - new.double())[finite].abs()
        far = distance.max().item() if distance.numel() else 0.0
        largest = max(1.0, old[finite].double().abs().max().item()) if distance.numel() else 1.0
        dtypes = [t.dtype for t in (old, new) if t.is_floating_point()]
        allowed = max(TOLERANCE, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes), 0.0)
        if not far <= allowed * largest or not torch.equal(finite, new.isfinite()):
            raise ConversionError(
                f"with fused activations the outputs on the example input differ by {far:.2g}, and "
                f"the largest is {largest:.2g}; a difference of {allowed:.2g} of that is allowed, "
                f"so the model was left as it was"
            )
