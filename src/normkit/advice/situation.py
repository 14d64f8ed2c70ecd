"""What the checks know of a model: its norms, their input shapes, and the layers before them."""

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
"""Attributes that switch gradient checkpointing on in timm, transformers and torchvision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedNorm:
    """A norm of the model, with everything that the checks need to know of it.

    Args:
        name: Its name; of a shared module, the first name.
        module: The layer.
        trains: Whether it normalises as in training. That needs ``training=True``, and it must
            neither be frozen nor be in evaluation mode inside a model in training mode.
        pools: Its statistics groups at the batch size, for each shape of its input; None if its
            class is unknown, empty if it was not called.
        refusal: The error that it raised; None if it raised none.
        called: Whether the forward calls it.
        repeated: Whether the forward calls it under gradient checkpointing.
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
    """A model, the options of ``validate``, and the model's norms in order.

    Args:
        model: The model, in its original mode.
        batch_size: Examples of a batch.
        training: Whether problems in training are looked for, too.
        trained: Whether the model has learned values, which a fix must keep, or say that it cannot.
        norms: The norms.
        feeds: The layers that feed the norms; None if the model cannot be traced.
    """

    model: nn.Module
    batch_size: int
    training: bool
    trained: bool
    norms: tuple[CheckedNorm, ...]
    feeds: Feeds | None
    _refusals: dict[str, Mapping[nn.Module, str]] = field(default_factory=dict)

    def refusals(self, spec: str) -> Mapping[nn.Module, str]:
        """Find the norms that conversion to a spec would refuse, with the reason."""
        if spec not in self._refusals:
            found = refusals(self.model, find_norms(self.model), NormSpec.parse(spec))
            self._refusals[spec] = {module: shortened(error) for module, error in found.items()}
        return self._refusals[spec]

    def norm(self, name: str) -> CheckedNorm | None:
        """The norm of this name."""
        return next((norm for norm in self.norms if norm.name == name), None)


@dataclass(slots=True)
class _Observed:
    """What was observed of one norm in a forward."""

    shapes: dict[Shape, None] = field(default_factory=dict)
    refusal: str | None = None
    repeated: bool = False


def examine(
    model: nn.Module,
    batch_size: int,
    training: bool,
    pretrained: bool | None,
    example_input: Any,
) -> Situation:
    """Send one example through the model, and leave the model as it was.

    Raises:
        InputError: If the model does not take the example, or has lazy layers.
    """
    _require_shapes(model)
    found = find_norms(model)
    trains = {m: training and _would_train(m, model) for m in found}
    with untouched(model, training=False):
        scale = batch_size / _count(example_input)
        observed = _watch(model, list(found), example_input, scale <= 1)
        norms = tuple(
            _norm(names[0], module, trains[module], observed[module], scale)
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
    """Whether statistics, scales or shifts differ from those of a new layer."""
    values = chain(norm.named_buffers(), norm.named_parameters())
    known = ((name, v) for name, v in values if not v.is_meta and v.numel())
    return any(_differs_from_new(name.rpartition(".")[2], value) for name, value in known)


def _differs_from_new(name: str, value: Tensor) -> bool:
    starts = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0, "bias": 0}
    if name in starts:
        return not bool((value == starts[name]).all())
    return name == "weight" and not bool((value == value.flatten()[0]).all())


def _require_shapes(model: nn.Module) -> None:
    """Refuse models with lazy layers.

    Raises:
        InputError: If a layer gets its shape only from its first input.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise InputError(
                f"{name} does not know its shape yet; send one batch through the model first"
            )


def _would_train(norm: nn.Module, model: nn.Module) -> bool:
    """Whether a norm is in training mode when its model is; frozen norms are not."""
    return norm.training if model.training else not is_frozen(norm)


def _norm(
    name: str, module: nn.Module, trains: bool, observed: _Observed, scale: float
) -> CheckedNorm:
    # The pools depend on the mode. ``untouched`` restores it after the examination.
    for part in module.modules():
        part.training = trains
    factor = scale * num_processes(module)
    found = [pools(module, (round(shape[0] * factor), *shape[1:])) for shape in observed.shapes]
    known = tuple(pool for several in found if several is not None for pool in several)
    return CheckedNorm(
        name=name,
        module=module,
        trains=trains,
        pools=None if None in found else known,
        refusal=observed.refusal,
        called=bool(observed.shapes),
        repeated=observed.repeated,
    )


def _follow(model: nn.Module, example_input: Any) -> Feeds | None:
    try:
        return trace_feeds(model, example_input)
    except Exception:  # noqa: BLE001 - the model's own code may raise; a check reports the None
        return None


def _watch(
    model: nn.Module,
    norms: list[nn.Module],
    example_input: Any,
    alone: bool,
) -> dict[nn.Module, _Observed]:
    """Run the model and observe its norms; a norm that raises passes its input on unchanged."""
    observed = {norm: _Observed() for norm in norms}
    # Some models checkpoint only if gradients are computed.
    with ExitStack() as stack, torch.set_grad_enabled(bool(list(switches(model)))):
        for norm in norms:
            stack.enter_context(replaced_forward(norm, _observe(observed[norm], alone)))
        try:
            call_with(model, example_input)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot take {_described(example_input)}: "
                f"{type(error).__name__}: {shortened(error)}; input_shape= is of one example "
                f"without the batch axis, e.g. (3, 224, 224); for other inputs pass "
                f"example_input=: a tuple of arguments, a dict of named arguments, or the only "
                f"argument"
            ) from error
    return observed


def _observe(
    observed: _Observed, alone: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a norm's forward, so that the shapes of its inputs and its errors are observed.

    Args:
        observed: Gets the shapes and the error.
        alone: Whether the batch really has one example. If not, an error counts only if two copies
            of the example raise as well, because many norms refuse a single example.
    """

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def observing(*args: Any, **kwargs: Any) -> Any:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            observed.shapes[tuple(x.shape)] = None
            observed.repeated |= _is_checkpointed(sys._getframe())
            try:
                return forward(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - every error of a norm is a finding
                message = shortened(error)
            with suppress(Exception):
                if not alone:
                    return forward(torch.cat([x, x]))[: x.shape[0]]
            observed.refusal = message
            return x

        return observing

    return make


def switches(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Find modules that checkpoint the layers inside them, with the attribute that says so."""
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
    """Make a fixed random example on the device of the model's first parameter."""
    values = torch.rand((1, *input_shape), generator=torch.Generator().manual_seed(0))
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return values.to(device=device_of(model), dtype=next(dtypes, torch.float32))


def _count(example_input: Any) -> int:
    """Count the examples of an example input, along the first axis of its first argument."""
    first = example_input
    if isinstance(first, dict):
        first = next(iter(first.values()), None)
    elif isinstance(first, tuple):
        first = first[0] if first else None
    if isinstance(first, Tensor) and first.ndim:
        return max(first.shape[0], 1)
    return max(len(first), 1) if isinstance(first, list) else 1


def _described(example_input: Any) -> str:
    if isinstance(example_input, Tensor):
        return f"an input of shape {tuple(example_input.shape)}"
    return f"the example input, a {type(example_input).__name__}"
