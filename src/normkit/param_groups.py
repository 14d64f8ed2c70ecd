"""Optimizer groups with separate weight decay for norms, and weight decay towards one."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.errors import OptionError, TraceError
from normkit.layers.base import NormLayer
from normkit.passes import call_with_cleanup, require_inspectable
from normkit.text import listed
from normkit.tracing.kinds import is_norm
from normkit.tracing.trace import trace

GROUPS = ("weights", "biases", "norm_weights", "norm_biases")
TO_ONE = "decay_to_one"
"""Key of an optimizer group with the weight decay that ``decay_gamma_to_one`` uses for it."""


def param_groups(
    model: nn.Module,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    decay_gamma_to: int = 0,
    *,
    example_input: Any = None,
) -> list[dict[str, Any]]:
    r"""Sort a model's parameters into optimizer groups, each with its own weight decay.

    Every parameter is in exactly one group, also if several modules share it. Weight decay on
    :math:`\gamma` and :math:`\beta` regularises a norm that has a residual path to the output. In
    networks without such paths (Inception, VGG) a later norm undoes its effect, and the paper found
    that it hurts. If no norm of the model leads into a sum with another branch, a warning says so.

    Args:
        model: The model.
        weight_decay: Weight decay of weights.
        norm_weight_decay: Weight decay of the weights and biases of norms. None means
            ``weight_decay``, which the paper found better than no decay.
        bias_weight_decay: Weight decay of all other biases. None means ``weight_decay``.
        decay_gamma_to: The value towards which the norms' weights decay, 0 or 1. For 1, their group
            has ``weight_decay`` 0 and the key ``"decay_to_one"``; pass the optimizer to
            ``decay_gamma_to_one``, otherwise they do not decay.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it.

    Returns:
        Four groups for any torch optimizer, named ``weights``, ``biases``, ``norm_weights`` and
        ``norm_biases``, in this order; some may be empty. Mixing logits of norms are in
        ``norm_biases``.

    Raises:
        OptionError: If a decay is negative or not finite, ``decay_gamma_to`` is neither 0 nor 1, or
            the model hides which parameters belong to norms: it is scripted, exported, quantized,
            or its parameters are flattened into one.

    Warns:
        UserWarning: If norms decay in a model without residual paths, or if the model cannot be
            traced and ``norm_weight_decay`` is None.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization,
        section 3.3.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = param_groups(model, 1e-4, norm_weight_decay=0.0)
        >>> [(group["name"], group["weight_decay"]) for group in groups]
        [('weights', 0.0001), ('biases', 0.0001), ('norm_weights', 0.0), ('norm_biases', 0.0)]
    """
    require_inspectable(model, "sort the parameters of", sharded=True)
    of_norms = weight_decay if norm_weight_decay is None else norm_weight_decay
    of_biases = weight_decay if bias_weight_decay is None else bias_weight_decay
    decays = dict(zip(GROUPS, (weight_decay, of_biases, of_norms, of_norms), strict=True))
    for name, decay in decays.items():
        if not 0 <= decay < math.inf:
            raise OptionError(
                f"a weight decay of {decay} was given for {name}; it must be finite and >= 0"
            )
    if decay_gamma_to not in (0, 1):
        raise OptionError(f"decay_gamma_to={decay_gamma_to} was given; it must be 0 or 1")
    if of_norms > 0:
        _warn_without_residual_paths(model, example_input, chosen=norm_weight_decay is not None)
    sorted_: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        sorted_[_group_of(model, name)].append(parameter)
    groups = [{"params": sorted_[n], "weight_decay": decays[n], "name": n} for n in GROUPS]
    if decay_gamma_to == 1:
        groups[2] |= {"weight_decay": 0.0, TO_ONE: of_norms}
    return groups


def decay_gamma_to_one(optimizer: Optimizer) -> None:
    r"""Make an optimizer's weight decay pull the weights of norms towards one.

    During every step, :math:`\gamma` is replaced by :math:`\gamma - 1` and the group's weight decay
    is switched on. So the optimizer's decay, whether in the gradient or decoupled, acts on the
    distance from one. A closure sees the real parameters, and they are restored after the step,
    also if it raises. This is correct for every optimizer whose update depends on a parameter only
    through its gradient and its decay (SGD, Adam, AdamW, RMSprop, ...), but not for optimizers that
    scale by the parameter's norm (LAMB, LARS).

    Args:
        optimizer: An optimizer of the groups of ``param_groups(..., decay_gamma_to=1)``; its
            ``step`` is wrapped.

    Raises:
        OptionError: If no group of the optimizer decays towards one, or its step is wrapped
            already.

    Example:
        >>> groups = param_groups(nn.BatchNorm2d(4), 0.1, decay_gamma_to=1)
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
        >>> decay_gamma_to_one(optimizer)
    """
    if not any(TO_ONE in group for group in optimizer.param_groups):
        raise OptionError(
            f"no group of the {type(optimizer).__name__} decays towards one; create its groups "
            f"with param_groups(..., decay_gamma_to=1)"
        )
    if hasattr(optimizer.step, "decays_to_one"):
        raise OptionError(
            f"this {type(optimizer).__name__} decays towards one already; call this only once"
        )
    step = optimizer.step

    @functools.wraps(step)
    def stepped(
        self: Optimizer,
        closure: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Any:
        distance = _DistanceFromOne(self)
        given = () if closure is None else (distance.suspended_during(closure),)

        def take_step() -> Any:
            distance.take_()
            return step(*given, **options)

        return call_with_cleanup(take_step, distance.undo_)

    vars(stepped)["decays_to_one"] = True
    optimizer.step = types.MethodType(stepped, optimizer)  # type: ignore[method-assign]


class _DistanceFromOne:
    """Subtracts one from the parameters that decay towards one, and adds it back.

    Meanwhile their weight decay is switched on. A parameter without a gradient is not changed,
    because the optimizer does not update it either.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = [group for group in optimizer.param_groups if TO_ONE in group]
        self._shifted: list[_ShiftedParameter] = []

    def take_(self) -> None:
        for group in self._groups:
            group["weight_decay"] = group[TO_ONE]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._shifted.append(_ShiftedParameter(parameter))
                    self._shifted[-1].shift_()

    def undo_(self) -> None:
        for group in self._groups:
            group["weight_decay"] = 0.0
        for parameter in self._shifted:
            parameter.undo_()
        self._shifted = []

    def suspended_during(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap a closure so that it sees the real parameters."""

        def evaluated() -> Any:
            self.undo_()
            loss = closure()
            self.take_()
            return loss

        return evaluated


class _ShiftedParameter:
    """A parameter from which one is subtracted for a while.

    The original values are kept, so that values which the step does not change are restored without
    a rounding error.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._before = parameter, parameter.detach().clone()
        self._less_one = self._before - 1
        self._is_shifted = False
        self._after: Tensor | None = None

    def shift_(self) -> None:
        self._parameter.detach().copy_(self._less_one)
        self._is_shifted = True

    def undo_(self) -> None:
        """Add one again; a second call does nothing more."""
        if self._after is None:
            now = self._parameter.detach()
            stepped = torch.where(now == self._less_one, self._before, now + 1)
            self._after = stepped if self._is_shifted else self._before
        self._parameter.detach().copy_(self._after)


def _group_of(model: nn.Module, name: str) -> str:
    """Return the name of the group to which a parameter of this name belongs."""
    owner, _, last = name.rpartition(".")
    before, parametrized, rest = name.partition("parametrizations.")
    # The name is owner.parametrizations.weight.original, owner.parametrizations.weight.0.gain, ...
    if parametrized:
        owner, last = before.rstrip("."), rest.split(".")[0]
    if _belongs_to_norm(model, owner):
        return "norm_weights" if last == "weight" else "norm_biases"
    is_bias = last == "bias" or last.startswith("bias_") or last.endswith("_bias")
    return "biases" if is_bias else "weights"


def _belongs_to_norm(model: nn.Module, owner: str) -> bool:
    """Whether a module is a norm, or a part of one of normkit's layers."""
    if is_norm(model.get_submodule(owner)):
        return True
    parts = owner.split(".") if owner else []
    above = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts)))
    return any(isinstance(module, NormLayer) for module in above)


def _warn_without_residual_paths(
    model: nn.Module,
    example_input: Any,
    chosen: bool,
) -> None:
    """Warn if later norms undo the decay on norms, and no norm leads into a sum.

    Args:
        model: The model.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it.
        chosen: Whether the user has set ``norm_weight_decay``; then a model that cannot be traced
            gives no warning.
    """
    try:
        undone, num_norms = norms_without_residual_paths(model, example_input)
    except TraceError as error:
        if not chosen:
            warnings.warn(
                f"whether weight decay on norms helps depends on residual paths to the output, "
                f"but the model could not be traced: {error}; or set norm_weight_decay=",
                stacklevel=3,
            )
        return
    if undone:
        warnings.warn(
            f"{len(undone)} of {num_norms} norms ({listed(undone, at_most=3)}) have no residual "
            f"path to the output: the next norm undoes the effect of the decay on their weights "
            f"and biases, and such decay was found to hurt; switch it off with "
            f"norm_weight_decay=0",
            stacklevel=3,
        )


def norms_without_residual_paths(
    model: nn.Module,
    example_input: Any = None,
) -> tuple[list[str], int]:
    """Name the norms whose weight decay a later norm undoes, and count all norms.

    If any norm leads into a sum with another branch, no norm is named.

    Raises:
        TraceError: If the model cannot be traced.
    """
    graph = trace(model, example_input)
    ends = {graph.calls[index].name: graph.ends(index) for index in graph.of_kind("norm")}
    has_paths = any("sum" in met for met in ends.values())
    undone = [name for name, met in ends.items() if met == {"norm"} and not has_paths]
    return undone, len(ends)
