"""A model as the checks see it: its norms, what goes into each, and who feeds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from normkit.advice.pools import Pool, Shape, num_processes, pools
from normkit.convert.plan import refusals
from normkit.convert.selection import find_norms
from normkit.errors import InputError
from normkit.inference.freeze import is_frozen
from normkit.passes import call_with, device_of, replaced_forward, untouched
from normkit.spec import NormSpec
from normkit.text import shortened
from normkit.tracing import Feeds, trace_feeds

SWITCHES = ("grad_checkpointing", "gradient_checkpointing", "memory_efficient")
"""Attributes by which timm, transformers and torchvision are told to checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm of the model.

    Args:
        name: Its name; the first one of a shared module.
        module: The layer.
        trains: Whether it normalises as in training: asked for, and neither in evaluation mode
            while the model trains nor frozen by ``freeze_statistics``.
        pools: What its statistics are taken over at the batch size, for each shape of its input;
            None if it is of an unknown kind, empty if it was not called.
        refusal: What it raised, if it did.
        called: Whether the forward calls it.
        repeated: Whether the forward calls it under activation checkpointing.
    """

    name: str
    module: nn.Module
    trains: bool
    pools: tuple[Pool, ...] | None
    refusal: str | None
    called: bool
    repeated: bool

    @property
    def usable(self) -> Iterator[Pool]:
        """Pools whose groups fit the input."""
        return (pool for pool in self.pools or () if pool.refusal is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A model, what is asked of it, and its norms in order.

    Args:
        model: The model, in the mode it was in.
        batch_size: Examples of a batch.
        training: Whether training is asked about, too.
        trained: Whether its values are learned ones, which a fix must keep or say what it costs.
        norms: The norms.
        feeds: Who feeds them; None if the model cannot be followed.
    """

    model: nn.Module
    batch_size: int
    training: bool
    trained: bool
    norms: tuple[Norm, ...]
    feeds: Feeds | None
    _refusals: dict[str, Mapping[nn.Module, str]] = field(default_factory=dict)

    def refusals(self, spec: str) -> Mapping[nn.Module, str]:
        """Say which norms conversion would not turn into a spec, and why."""
        if spec not in self._refusals:
            found = refusals(self.model, find_norms(self.model), NormSpec.parse(spec))
            self._refusals[spec] = {module: shortened(error) for module, error in found.items()}
        return self._refusals[spec]

    def norm(self, name: str) -> Norm | None:
        """The norm of this name."""
        return next((norm for norm in self.norms if norm.name == name), None)


@dataclass(slots=True)
class _Seen:
    """What one forward shows of a norm."""

    shapes: dict[Shape, None] = field(default_factory=dict)
    refusal: str | None = None
    repeated: bool = False


def examine(
    model: nn.Module,
    batch_size: int,
    training: bool,
    pretrained: bool | None,
    example_input: Any,  # noqa: ANN401
) -> Situation:
    """Send an example through the model, once, and leave the model as it was.

    Raises:
        InputError: If the model does not take the example, or has lazy layers.
    """
    _require_shapes(model)
    found = find_norms(model)
    trains = {m: training and _would_train(m, model) for m in found}
    with untouched(model, training=False):
        scale = batch_size / _count(example_input)
        seen = _watch(model, list(found), example_input, scale <= 1)
        norms = tuple(
            _norm(names[0], module, trains[module], seen[module], scale)
            for module, names in found.items()
        )
        feeds = _follow(model, example_input)
    return Situation(
        model=model,
        batch_size=batch_size,
        training=training,
        trained=any(map(_has_learned, found)) if pretrained is None else pretrained,
        norms=norms,
        feeds=feeds,
    )


def _has_learned(norm: nn.Module) -> bool:
    """Whether statistics have moved, or scales and shifts are not those of a new layer."""
    values = {**dict(norm.named_buffers()), **dict(norm.named_parameters())}
    known = {name: v for name, v in values.items() if not v.is_meta and v.numel()}
    return any(_has_moved(name.rpartition(".")[2], value) for name, value in known.items())


def _has_moved(name: str, value: Tensor) -> bool:
    starts = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0, "bias": 0}
    if name in starts:
        return not bool((value == starts[name]).all())
    return name == "weight" and not bool((value == value.flatten()[0]).all())


def _require_shapes(model: nn.Module) -> None:
    """Refuse layers that wait for their first input.

    Raises:
        InputError: With the first one's name.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise InputError(
                f"{name} does not know its shape yet; send one batch through the model first"
            )


def _would_train(norm: nn.Module, model: nn.Module) -> bool:
    """Whether a norm trains with the model; where that is in evaluation mode, after ``train()``."""
    return norm.training if model.training else not is_frozen(norm)


def _norm(name: str, module: nn.Module, trains: bool, seen: _Seen, scale: float) -> Norm:
    for part in module.modules():
        part.training = trains
    factor = scale * num_processes(module)
    found = [pools(module, (round(shape[0] * factor), *shape[1:])) for shape in seen.shapes]
    known = tuple(pool for several in found if several is not None for pool in several)
    return Norm(
        name=name,
        module=module,
        trains=trains,
        pools=None if None in found else known,
        refusal=seen.refusal,
        called=bool(seen.shapes),
        repeated=seen.repeated,
    )


def _follow(model: nn.Module, example_input: Any) -> Feeds | None:  # noqa: ANN401
    try:
        return trace_feeds(model, example_input)
    except Exception:  # noqa: BLE001 - the model's own code; None is reported by a check
        return None


def _watch(
    model: nn.Module,
    norms: list[nn.Module],
    example_input: Any,  # noqa: ANN401
    alone: bool,
) -> dict[nn.Module, _Seen]:
    """Run the model; a norm that refuses its input gives it on as it is."""
    seen = {norm: _Seen() for norm in norms}
    with ExitStack() as stack, torch.set_grad_enabled(bool(list(switches(model)))):
        for norm in norms:
            stack.enter_context(replaced_forward(norm, _noting(seen[norm], alone)))
        try:
            call_with(model, example_input)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot take {_described(example_input)}: "
                f"{type(error).__name__}: {shortened(error)}; input_shape= is of one example "
                f"without the batch axis, e.g. (3, 224, 224); for other inputs pass "
                f"example_input=, a tuple of arguments, a dict of named ones, or the only one"
            ) from error
    return seen


def _noting(seen: _Seen, alone: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a norm's forward note its inputs.

    Args:
        seen: Takes what is noted.
        alone: Whether a refusal of the example counts though it may be that of a batch of one.
    """

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            seen.shapes[tuple(x.shape)] = None
            seen.repeated |= _is_checkpointed(sys._getframe())
            try:
                return forward(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever a layer raises is a finding
                refused = shortened(error)
            with suppress(Exception):
                if not alone:
                    return forward(torch.cat([x, x]))[: x.shape[0]]
            seen.refusal = refused
            return x

        return noting

    return make


def switches(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules that are told to checkpoint what is in them, and by which attribute.

    Some do so only where gradients are computed, so their forward is watched with gradients.
    """
    for module in model.modules():
        for name in SWITCHES:
            if module.__dict__.get(name) is True:
                yield module, name


def _is_checkpointed(frame: FrameType | None) -> bool:
    """Whether ``torch.utils.checkpoint`` is among the callers."""
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def example_of(model: nn.Module, input_shape: Shape) -> Tensor:
    """Make an example of a shape, always the same, where the model's first parameter is."""
    values = torch.rand((1, *input_shape), generator=torch.Generator().manual_seed(0))
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return values.to(device=device_of(model), dtype=next(dtypes, torch.float32))


def _count(example_input: Any) -> int:  # noqa: ANN401
    """Count the examples in an example input: its first argument's first axis."""
    first = example_input
    if isinstance(first, dict):
        first = next(iter(first.values()), None)
    elif isinstance(first, tuple):
        first = first[0] if first else None
    if isinstance(first, Tensor) and first.ndim:
        return max(first.shape[0], 1)
    return max(len(first), 1) if isinstance(first, list) else 1


def _described(example_input: Any) -> str:  # noqa: ANN401
    if isinstance(example_input, Tensor):
        return f"an input of shape {tuple(example_input.shape)}"
    return f"the example input, a {type(example_input).__name__}"
