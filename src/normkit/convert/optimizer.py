"""An optimizer follows its model: parameters that are gone leave it, new ones join it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import LBFGS, Optimizer

from normkit.errors import OptionError

Named = Sequence[tuple[str, nn.Parameter]]


class Exchange(NamedTuple):
    """Named parameters of a layer before and after."""

    old: Named
    new: Named


class GroupEdit(NamedTuple):
    """The parameters of a group, and their names if it has them, before and after."""

    group: dict[str, Any]
    before: dict[str, list[Any]]
    after: dict[str, list[Any]]


class OptimizerEdit:
    """What changes in an optimizer: planned at once, then done and undone at will.

    A parameter that stays keeps its group, place and state. A new one takes the place of the old
    layer's parameter of the same name, or stands beside its first one.

    Args:
        optimizer: Changed by ``apply``.
        exchanges: Layers with their parameters, before and after.
        staying: Parameters that the model still has afterwards.

    Raises:
        OptionError: If it is no optimizer of these parameters, or one that cannot follow.
    """

    def __init__(
        self, optimizer: Optimizer, exchanges: Iterable[Exchange], staying: Iterable[nn.Parameter]
    ) -> None:
        self.optimizer = optimizer
        exchanges, kept = list(exchanges), set(staying)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        old = {p for exchange in exchanges for _, p in exchange.old}
        if not held & (old | kept):
            raise OptionError("optimizer= holds no parameter of the model; pass the model's own")
        self._joining, self.homeless = _joining(exchanges, held, optimizer)
        gone = old - kept
        _require_open(
            optimizer, [p for several in self._joining.values() for _, p in several], gone
        )
        self._edits = [_edited(g, self._joining, gone) for g in optimizer.param_groups]
        self._before = list(optimizer.state)
        self._state = {p: optimizer.state[p] for p in gone if p in optimizer.state}

    def apply(self) -> None:
        """Let the parameters change places."""
        for edit in self._edits:
            _write(edit.group, edit.after)
        for parameter in self._state:
            self.optimizer.state.pop(parameter, None)

    def undo(self) -> None:
        """Put everything back as it was, states in their old order; others come after them."""
        for edit in self._edits:
            _write(edit.group, edit.before)
        joined = {parameter for several in self._joining.values() for _, parameter in several}
        states = {**self.optimizer.state, **self._state}
        order = dict.fromkeys([*self._before, *states])
        self.optimizer.state.clear()
        for parameter in order:
            if parameter in states and parameter not in joined:
                self.optimizer.state[parameter] = states[parameter]


def _require_open(
    optimizer: Optimizer, joining: Sequence[nn.Parameter], gone: set[nn.Parameter]
) -> None:
    """Refuse an optimizer whose own accounts go by the parameters that it was made with.

    Raises:
        OptionError: With what it keeps.
    """
    kind = type(optimizer).__name__
    held = {p for group in optimizer.param_groups for p in group["params"]}
    why = ""
    if isinstance(optimizer, LBFGS) and (joining or held & gone):
        why = "keeps one history of all parameters together"
    elif kind == "Muon" and any(parameter.ndim != 2 for parameter in joining):
        why = "takes matrices only"
    elif any(inner.param_groups is not optimizer.param_groups for inner in _inner(optimizer)):
        why = "has an optimizer inside with parameters of its own"
    if why:
        raise OptionError(
            f"{kind} {why}, and cannot follow this change; nothing was changed: convert without "
            f"optimizer=, and make it afterwards"
        )


def _inner(optimizer: Optimizer) -> Iterable[Optimizer]:
    return (value for value in vars(optimizer).values() if isinstance(value, Optimizer))


def require_optimizer(optimizer: object) -> None:
    """Refuse what is no optimizer.

    Raises:
        OptionError: With the type that was given.
    """
    if not isinstance(optimizer, Optimizer):
        raise OptionError(
            f"optimizer= was given a {type(optimizer).__name__}; it takes a torch.optim.Optimizer"
        )


def _joining(
    exchanges: Iterable[Exchange], held: set[nn.Parameter], optimizer: Optimizer
) -> tuple[dict[nn.Parameter, list[tuple[str, nn.Parameter]]], list[str]]:
    """Say beside which parameter each new one joins, and which have no such neighbour."""
    joining: dict[nn.Parameter, list[tuple[str, nn.Parameter]]] = {}
    homeless: list[str] = []
    first = next(p for group in optimizer.param_groups for p in group["params"])
    for old, new in exchanges:
        own = {_last(name): p for name, p in reversed(old) if p in held}
        known = {p for _, p in old} | held
        for name, parameter in new:
            if parameter in known:
                continue
            beside = next((own[key] for key in (_last(name), "weight", *own) if key in own), None)
            if beside is None and not old and parameter.requires_grad:
                homeless.append(name)
                beside = first
            if beside is not None:
                joining.setdefault(beside, []).append((name, parameter))
    return joining, homeless


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
