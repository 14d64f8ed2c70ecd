"""What a conversion did: which norms became what, what was carried and what was lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from normkit.convert.agreement import Calibration, rows
from normkit.convert.swap import Swap
from normkit.passes import attempt
from normkit.text import module_name, table_lines
from normkit.tracing.graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One norm that became another.

    Args:
        name: Its name in the model; the first one of a shared layer.
        old: What it was.
        new: What it became, as a spec without open questions.
        carried: What the new layer took over.
        lost: What it could not take over.
        warnings: What to know before training or evaluating it.
    """

    name: str
    old: str
    new: str
    carried: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """One norm that was left as it was.

    Args:
        name: Its name in the model.
        old: What it is.
        why: Why it was left.
    """

    name: str
    old: str
    why: str


FUNCTIONS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})
CALLED_AS_FUNCTION = "the forward calls it as a function, and holds no module of it"


def called_as_functions(graph: Graph) -> Iterator[Left]:
    """List the norms of a forward that are no modules, once for each call."""
    for call in graph.calls:
        if call.kind == "other" and call.name in FUNCTIONS:
            yield Left(name=call.name, old="a function", why=CALLED_AS_FUNCTION)


@dataclass(kw_only=True, eq=False, repr=False)
class Conversion:
    """A converted model and everything that was done to it; prints as a table.

    Args:
        model: The converted model; of a dry run the model as it is.
        changes: The norms that became others, in the order of the model.
        left: All other norms, with the reason.
        standardized: Convolutions whose weights ``+ws`` standardised.
        unchecked: Classes with a forward of their own around these norms, where no forward was run.
        dry_run: Whether nothing was done.
        calibration: How near the outputs are to the original's, if it was calibrated.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    left: tuple[Left, ...] = ()
    standardized: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    dry_run: bool = False
    calibration: Calibration | None = None
    _swap: Swap = field(kw_only=True)

    def revert(self) -> nn.Module:
        """Put the old layers, weights and parameter groups back; return the model.

        The old layers come back as they were: the same modules with their own running statistics,
        hooks and optimizer state. Parameters that both layers shared have the values that they
        have now: a conversion is undone, training is not. A second time changes nothing.

        Raises:
            OptionError: If the layers were replaced again since; nothing is changed then.
        """
        if self.dry_run:
            return self.model
        return attempt(self._revert, self, *self._swap.changed)

    def _revert(self) -> nn.Module:
        self.model = self._swap.revert()
        return self.model

    def __repr__(self) -> str:
        return f"<Conversion: {self._summary()}>"

    def __str__(self) -> str:
        lines = [self._summary()]
        head = ("name", "old", "new", "carried", "lost")
        rows = [
            (module_name(c.name), c.old, c.new, _list(c.carried), _list(c.lost))
            for c in self.changes
        ]
        lines += table_lines([head, *rows]) if rows else []
        lines += _warnings(self.changes)
        if self.standardized:
            lines.append(f"weights standardised: {', '.join(self.standardized)}")
        lines += _left_alone(self.left)
        lines += _not_run(self.unchecked) if self.changes else ()
        lines += [] if self.calibration is None else _calibrated(self.calibration)
        return "\n".join(lines)

    def _summary(self) -> str:
        verb = "would convert" if self.dry_run else "converted"
        return f"{verb} {len(self.changes)} of {len(self.changes) + len(self.left)} norms"


def _warnings(changes: Sequence[Change]) -> Iterator[str]:
    """Say each warning once, with all of its norms."""
    for warning in dict.fromkeys(each for change in changes for each in change.warnings):
        names = [module_name(c.name) for c in changes if warning in c.warnings]
        yield f"  {', '.join(names)}: {warning}"


def _not_run(classes: Sequence[str], at_most: int = 4) -> Iterator[str]:
    if classes:
        named = ", ".join(classes[:at_most]) + (", ..." if len(classes) > at_most else "")
        yield f"not run: the forward of {named}; with example_input= it is, before and after"


def _left_alone(left: Sequence[Left]) -> Iterator[str]:
    """Say each reason once, with all of its norms."""
    for why in dict.fromkeys(each.why for each in left):
        names = [f"{module_name(each.name)} ({each.old})" for each in left if each.why == why]
        yield f"left alone, {why}: {', '.join(names)}"


def _calibrated(done: Calibration) -> list[str]:
    several = "es" if done.num_batches > 1 else ""
    lines = [f"calibrated {done.num_layers} norms on {done.num_batches} batch{several}; "]
    lines[0] += "outputs against the original's:"
    states = {"original": done.original, "plain swap": done.plain, "calibrated": done.calibrated}
    lines += table_lines(rows(list(states.items())))
    return lines + [f"not calibrated: {module_name(name)}: {why}" for name, why in done.skipped]


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"
