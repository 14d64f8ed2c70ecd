"""Options that the constructors of several layers share, and the errors for wrong calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, TypedDict

import torch
from torch import nn

from normkit.core.check import require_known
from normkit.core.ranks import ProcessGroup
from normkit.errors import ArgumentError
from normkit.kernels.activations import ActivationName

Device = torch.device | str | None


class SharedOptions(TypedDict, total=False):
    """Options of every layer.

    Args:
        eps: Added to the variance; unit of ``x`` squared. Default 1e-5.
        affine: Learn ``weight`` and ``bias``, ``(C,)`` each, in every stage. Default True.
        bias: Whether ``affine`` learns a shift; if not, there is a scale alone. Default True.
        activation: Activation that the layer applies last: ``"relu"``, ``"leaky_relu"``,
            ``"silu"``, ``"gelu"`` (by the error function), ``"hardswish"``, ``"sigmoid"``,
            ``"tanh"`` or ``"relu6"``. Default None: no activation.
        negative_slope: Slope of ``"leaky_relu"`` below 0. Default 0.01.
        device: Device of parameters and buffers.
        dtype: Dtype of the parameters; buffers are at least float32.
    """

    eps: float
    affine: bool
    bias: bool
    activation: ActivationName | None
    negative_slope: float
    device: Device
    dtype: torch.dtype | None


class TrackingOptions(TypedDict, total=False):
    """Options of every layer that may keep running statistics.

    Args:
        eps: Added to the variance; unit of ``x`` squared. Default 1e-5.
        momentum: Weight of the new value in the running statistics; None averages all batches.
            Default 0.1.
        affine: Learn ``weight`` and ``bias``, ``(C,)`` each, in every stage. Default True.
        bias: Whether ``affine`` learns a shift; if not, there is a scale alone. Default True.
        track_running_stats: Keep running statistics; without them evaluation uses the batch's.
            Default True.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1. Default 0.
        process_group: The processes whose batches count as one batch in training: a
            ``torch.distributed`` group, ``"world"`` for all, or None for this process alone.
        activation: Activation that the layer applies last, as in ``SharedOptions``. Default None.
        negative_slope: Slope of ``"leaky_relu"`` below 0. Default 0.01.
        device: Device of parameters and buffers.
        dtype: Dtype of the parameters; buffers are at least float32.
    """

    eps: float
    momentum: float | None
    affine: bool
    bias: bool
    track_running_stats: bool
    example_weight: float
    process_group: ProcessGroup
    activation: ActivationName | None
    negative_slope: float
    device: Device
    dtype: torch.dtype | None


def stage_options(shared: SharedOptions) -> SharedOptions:
    """Options that a composite passes to its stages: all but the activation after the last one."""
    kept = shared.copy()
    kept.pop("activation", None)
    kept.pop("negative_slope", None)
    return kept


_SHARED = {kind.__name__: kind.__annotations__ for kind in (SharedOptions, TrackingOptions)}
_ORDER = {option: place for place, option in enumerate(TrackingOptions.__annotations__)}


class ConstructorSignature:
    """``__signature__`` of a layer's class, in which ``help`` finds the shared options by name."""

    def __get__(self, layer: nn.Module | None, owner: type[nn.Module]) -> inspect.Signature:
        if layer is not None:
            raise AttributeError("__signature__")  # calling a layer has the signature of forward
        return signature_of(owner)


@cache
def signature_of(layer: type[nn.Module]) -> inspect.Signature:
    """Parameters of a layer's constructor, including those that it passes on to its base class.

    ``**shared: Unpack[SharedOptions]`` stands for those options; any other ``**name`` stands for
    all options of the base class.
    """
    found: dict[str, inspect.Parameter] = {}
    known: Mapping[str, Any] | None = None  # options that are passed on; None means all
    for kind in (kind for kind in layer.__mro__ if "__init__" in vars(kind)):
        parameters = list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        is_first = not any(p.kind is p.POSITIONAL_OR_KEYWORD for p in found.values())
        for p in named:
            is_option = p.kind is p.KEYWORD_ONLY and (known is None or p.name in known)
            if is_option or (is_first and p.kind is not p.KEYWORD_ONLY):
                found.setdefault(p.name, p)
        rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
        if rest is None:
            break
        named_there = [keys for name, keys in _SHARED.items() if name in str(rest.annotation)]
        known = named_there[0] if named_there else known
    ordered = sorted(found.values(), key=lambda p: (p.kind, _ORDER.get(p.name, -1)))
    return inspect.Signature(ordered, __validate_parameters__=False)


def default_of(layer: type[nn.Module], option: str) -> Any:
    """Default of a constructor option of the class or one of its bases; None if there is none."""
    for kind in (kind for kind in layer.__mro__ if "__init__" in vars(kind)):
        parameter = inspect.signature(vars(kind)["__init__"]).parameters.get(option)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return None


def require_arguments(
    layer: type[nn.Module], given: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    """Refuse arguments that a constructor of ours does not take, and say what to write instead.

    Raises:
        ArgumentError: If several arguments have no name, or one has an unknown name.
    """
    if not layer.__init__.__module__.startswith("normkit."):
        return  # a user's subclass has its own constructor, which may take anything
    name, known = layer.__name__, list(signature_of(layer).parameters)
    require_known(name, [each for each in options if each != known[0]], known[1:])
    if len(given) > 1:
        raise ArgumentError(
            f"{name}({', '.join(map(repr, given))}) was written; the first argument is the number "
            f"of channels, and all others have names: write {_with_names(name, given, known)}"
        )


def _with_names(name: str, given: tuple[Any, ...], known: list[str]) -> str:
    """The call that was probably meant, if the arguments are in torch's order."""
    names = [option for option in known[1:] if option != "bias"]
    numbers = [value for value in given[:2] if isinstance(value, int)]
    if names[0] == "num_groups" and len(numbers) == 2:  # torch's GroupNorm has the groups first
        given = (max(numbers), min(numbers), *given[2:])
    texts = [f"{option}={value!r}" for option, value in zip(names, given[1:], strict=False)]
    return f"{name}({', '.join([repr(given[0]), *texts])})"
