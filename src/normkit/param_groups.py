"""Optimizer groups that tell norms' weights and biases from the rest, and decay towards one."""

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
from normkit.tracing.kinds import is_norm
from normkit.tracing.trace import trace

GROUPS = ("weights", "biases", "norm_weights", "norm_biases")
TO_ONE = "decay_to_one"
"""Key of a group in which ``decay_gamma_to_one`` finds how much its parameters decay."""


def param_groups(
    model: nn.Module,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    decay_gamma_to: int = 0,
    *,
    example_input: Any = None,  # noqa: ANN401
) -> list[dict[str, Any]]:
    r"""Sort a model's parameters into groups with a weight decay of their own.

    Every parameter is in exactly one group, a tied one too. Decay on :math:`\gamma` and
    :math:`\beta` regularises where a norm has a residual path to the output; in networks without
    such paths (Inception, VGG) a later norm undoes it, and the paper found it to hurt. A warning
    says so if no norm of the model leads into a sum with another branch.

    Args:
        model: The model.
        weight_decay: Of weights.
        norm_weight_decay: Of the weights and biases of norms; None is ``weight_decay``, which the
            paper found better than none.
        bias_weight_decay: Of all other biases; None is ``weight_decay``.
        decay_gamma_to: What the norms' weights decay towards, 0 or 1. For 1 their group has
            ``weight_decay`` 0 and the key ``"decay_to_one"``; pass the optimizer that is made of
            the groups to ``decay_gamma_to_one``, otherwise they do not decay.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it.

    Returns:
        Four groups for any torch optimizer, named ``weights``, ``biases``, ``norm_weights`` and
        ``norm_biases``, in this order; one may be empty. The norms' mixing logits are with their
        biases.

    Raises:
        OptionError: If a decay is negative, ``decay_gamma_to`` is neither 0 nor 1, or it cannot be
            seen which parameters are norms': the model is scripted, exported, quantized, or has its
            parameters flattened into one.

    Warns:
        UserWarning: If norms decay in a model without residual paths, or one that cannot be
            followed while ``norm_weight_decay`` is None.

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
        _require_decay(name, decay)
    if decay_gamma_to not in (0, 1):
        raise OptionError(f"decay_gamma_to={decay_gamma_to} was given; it is 0 or 1")
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
    r"""Make an optimizer's own weight decay pull the norms' weights towards one.

    Around every step, :math:`\gamma` is replaced by :math:`\gamma - 1` and the group's decay is
    switched on, so whichever decay the optimizer has (in the gradient or decoupled) acts on the
    distance from one. Outside of a step, a closure included, parameters and groups are as always,
    also when the step raises. Right for every optimizer whose update depends on a parameter
    through its gradient and decay alone (SGD, Adam, AdamW, RMSprop, ...), not for those that scale
    by the parameter's length (LAMB, LARS).

    Args:
        optimizer: Made of ``param_groups(..., decay_gamma_to=1)``; its ``step`` is wrapped.

    Raises:
        OptionError: If no group of the optimizer asks for it, or its step is wrapped already.

    Example:
        >>> groups = param_groups(nn.BatchNorm2d(4), 0.1, decay_gamma_to=1)
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
        >>> decay_gamma_to_one(optimizer)
    """
    if not any(TO_ONE in group for group in optimizer.param_groups):
        raise OptionError(
            f"no group of the {type(optimizer).__name__} decays towards one; make its groups with "
            f"param_groups(..., decay_gamma_to=1)"
        )
    if hasattr(optimizer.step, "decays_to_one"):
        raise OptionError(f"this {type(optimizer).__name__} decays towards one already")
    step = optimizer.step

    @functools.wraps(step)
    def stepped(
        self: Optimizer,
        closure: Callable[[], Any] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        distance = _DistanceFromOne(self)
        given = () if closure is None else (distance.undone_during(closure),)

        def take_step() -> Any:  # noqa: ANN401
            distance.take_()
            return step(*given, **options)

        return call_with_cleanup(take_step, distance.undo_)

    vars(stepped)["decays_to_one"] = True
    optimizer.step = types.MethodType(stepped, optimizer)  # type: ignore[method-assign]


class _DistanceFromOne:
    """Subtracts one from an optimizer's flagged parameters, with their decay on, and adds it back.

    A parameter without a gradient is not stepped, so it is not touched.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = [group for group in optimizer.param_groups if TO_ONE in group]
        self._moves: list[_Move] = []

    def take_(self) -> None:
        for group in self._groups:
            group["weight_decay"] = group[TO_ONE]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._moves.append(_Move(parameter))
                    self._moves[-1].do_()

    def undo_(self) -> None:
        for group in self._groups:
            group["weight_decay"] = 0.0
        for move in self._moves:
            move.undo_()
        self._moves = []

    def undone_during(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Let a closure see the parameters as they are."""

        def evaluated() -> Any:  # noqa: ANN401
            self.undo_()
            loss = closure()
            self.take_()
            return loss

        return evaluated


class _Move:
    """One parameter, less one for a while.

    Its values before are kept: what the step has not changed gets them back without rounding.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._before = parameter, parameter.detach().clone()
        self._less = self._before - 1
        self._is_moved = False
        self._after: Tensor | None = None

    def do_(self) -> None:
        self._parameter.detach().copy_(self._less)
        self._is_moved = True

    def undo_(self) -> None:
        """Add one again; twice is once."""
        if self._after is None:
            now = self._parameter.detach()
            stepped = torch.where(now == self._less, self._before, now + 1)
            self._after = stepped if self._is_moved else self._before
        self._parameter.detach().copy_(self._after)


def _group_of(model: nn.Module, name: str) -> str:
    """Which group a parameter of this name belongs to."""
    owner, _, last = name.rpartition(".")
    before, parametrized, rest = name.partition("parametrizations.")
    if parametrized:  # owner.parametrizations.weight.original, .0.gain, ...
        owner, last = before.rstrip("."), rest.split(".")[0]
    if _is_of_norm(model, owner):
        return "norm_weights" if last == "weight" else "norm_biases"
    is_bias = last == "bias" or last.startswith("bias_") or last.endswith("_bias")
    return "biases" if is_bias else "weights"


def _is_of_norm(model: nn.Module, owner: str) -> bool:
    """Whether a module is a norm, or a stage of one of ours."""
    if is_norm(model.get_submodule(owner)):
        return True
    parts = owner.split(".") if owner else []
    above = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts)))
    return any(isinstance(module, NormLayer) for module in above)


def _warn_without_residual_paths(
    model: nn.Module,
    example_input: Any,  # noqa: ANN401
    chosen: bool,
) -> None:
    """Warn if norms decay whose effect a later norm undoes, and no norm leads into a sum."""
    try:
        graph = trace(model, example_input)
    except TraceError as error:
        if not chosen:
            warnings.warn(
                f"whether decay on norms helps depends on residual paths to the output, which "
                f"could not be followed: {error}; or say norm_weight_decay=",
                stacklevel=3,
            )
        return
    ends = {graph.calls[index].name: graph.ends(index) for index in graph.of_kind("norm")}
    undone = [name for name, met in ends.items() if met == {"norm"}]
    if undone and not any("sum" in met for met in ends.values()):
        warnings.warn(
            f"{len(undone)} of {len(ends)} norms ({_shortened(undone)}) have no residual path to "
            f"the output: the next norm undoes the decay on their weights and biases, which was "
            f"found to hurt in such networks; norm_weight_decay=0 leaves it off",
            stacklevel=3,
        )


def _shortened(names: list[str], at_most: int = 3) -> str:
    shown = ", ".join(names[:at_most])
    return f"{shown}, ..." if len(names) > at_most else shown


def _require_decay(name: str, decay: float) -> None:
    if not 0 <= decay < math.inf:
        raise OptionError(f"a weight decay of {decay} was given for {name}; it is finite and >= 0")
