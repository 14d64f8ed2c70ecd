"""Editing an optimizer to match a converted model: old parameters leave it, new ones join it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import LBFGS, Optimizer

from normkit.errors import OptionError

Named = Sequence[tuple[str, nn.Parameter]]


class Exchange(NamedTuple):
    """The named parameters of a layer before and after the conversion."""

    old: Named
    new: Named


class GroupEdit(NamedTuple):
    """The lists of an optimizer's group before and after: parameters and, if present, names."""

    group: dict[str, Any]
    before: dict[str, list[Any]]
    after: dict[str, list[Any]]


class OptimizerEdit:
    """The changes to an optimizer, computed once, which ``apply`` makes and ``undo`` reverts.

    A parameter that stays keeps its group, position and state. A new parameter takes the position
    of the old layer's parameter of the same name, else of its weight or first parameter.

    Args:
        optimizer: Changed by ``apply``.
        exchanges: The parameters of each layer before and after the conversion.
        kept: The parameters that the model still has afterwards.

    Raises:
        OptionError: If the optimizer holds no parameter of the model, or cannot be edited.
    """

    def __init__(
        self, optimizer: Optimizer, exchanges: Iterable[Exchange], kept: Iterable[nn.Parameter]
    ) -> None:
        self.optimizer = optimizer
        exchanges, kept = list(exchanges), set(kept)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        old = {p for exchange in exchanges for _, p in exchange.old}
        if not held & (old | kept):
            raise OptionError("optimizer= holds no parameter of the model; pass the model's own")
        self._joining, self.without_group = _joining(exchanges, held, optimizer)
        gone = old - kept
        joining = [p for several in self._joining.values() for _, p in several]
        _require_editable(optimizer, joining, gone)
        self._edits = [_edited(g, self._joining, gone) for g in optimizer.param_groups]
        self._before = list(optimizer.state)
        self._state = {p: optimizer.state[p] for p in gone if p in optimizer.state}

    def apply(self) -> None:
        """Replace the parameters and drop the state of the old ones."""
        for edit in self._edits:
            _write(edit.group, edit.after)
        for parameter in self._state:
            self.optimizer.state.pop(parameter, None)

    def undo(self) -> None:
        """Restore the parameters and their state; states added since come last."""
        for edit in self._edits:
            _write(edit.group, edit.before)
        joined = {parameter for several in self._joining.values() for _, parameter in several}
        states = {**self.optimizer.state, **self._state}
        order = dict.fromkeys([*self._before, *states])
        self.optimizer.state.clear()
        for parameter in order:
            if parameter in states and parameter not in joined:
                self.optimizer.state[parameter] = states[parameter]


def _require_editable(
    optimizer: Optimizer, joining: Sequence[nn.Parameter], gone: set[nn.Parameter]
) -> None:
    """Refuse an optimizer whose internal state is tied to its original parameters.

    Raises:
        OptionError: If it is one; the error says why.
    """
    kind = type(optimizer).__name__
    held = {p for group in optimizer.param_groups for p in group["params"]}
    why = ""
    if isinstance(optimizer, LBFGS) and (joining or held & gone):
        why = "keeps one history for all parameters together"
    elif kind == "Muon" and any(parameter.ndim != 2 for parameter in joining):
        why = "takes matrices only"
    elif any(
        isinstance(value, Optimizer) and value.param_groups is not optimizer.param_groups
        for value in vars(optimizer).values()
    ):
        why = "contains another optimizer with its own parameter groups"
    if why:
        raise OptionError(
            f"{kind} {why}, so it cannot be edited; nothing was changed: convert without "
            f"optimizer=, and create the optimizer afterwards"
        )


def require_optimizer(optimizer: object) -> None:
    """Refuse an object that is not an optimizer.

    Raises:
        OptionError: If it is not; the error names its type.
    """
    if not isinstance(optimizer, Optimizer):
        raise OptionError(
            f"optimizer= was given a {type(optimizer).__name__}; it takes a torch.optim.Optimizer"
        )


def _joining(
    exchanges: Iterable[Exchange], held: set[nn.Parameter], optimizer: Optimizer
) -> tuple[dict[nn.Parameter, list[tuple[str, nn.Parameter]]], list[str]]:
    """Decide the position of each new parameter in the optimizer.

    Returns:
        For each parameter in the optimizer, the new named parameters that follow it; and the names
        of the new parameters that have no related one and so join the first group.
    """
    joining: dict[nn.Parameter, list[tuple[str, nn.Parameter]]] = {}
    without_group: list[str] = []
    first = next(p for group in optimizer.param_groups for p in group["params"])
    for old, new in exchanges:
        own = {_last(name): p for name, p in reversed(old) if p in held}
        known = {p for _, p in old} | held
        for name, parameter in new:
            if parameter in known:
                continue
            beside = next((own[key] for key in (_last(name), "weight", *own) if key in own), None)
            if beside is None and not old and parameter.requires_grad:
                without_group.append(name)
                beside = first
            if beside is not None:
                joining.setdefault(beside, []).append((name, parameter))
    return joining, without_group


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _edited(
    group: dict[str, Any],
    joining: Mapping[nn.Parameter, Named],
    gone: set[nn.Parameter],
) -> GroupEdit:
    keys = [key for key in ("params", "param_names") if key in group]
    before = {key: list(group[key]) for key in keys}
    names = before.get("param_names", before["params"])
    after: dict[str, list[Any]] = {"params": [], "param_names": []}
    for parameter, name in zip(before["params"], names, strict=True):
        stays = [] if parameter in gone else [(name, parameter)]
        for new_name, new in (*stays, *joining.get(parameter, ())):
            after["params"].append(new)
            after["param_names"].append(new_name)
    return GroupEdit(group, before, {key: after[key] for key in keys})


def _write(group: dict[str, Any], lists: Mapping[str, list[Any]]) -> None:
    for key, values in lists.items():
        group[key][:] = values
