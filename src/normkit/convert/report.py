"""The report of a conversion: which norms became what, what was carried over and what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.agreement import Calibration, rows
from normkit.convert.recipe import ConversionRecipe
from normkit.convert.swap import Swap
from normkit.errors import OptionError
from normkit.passes import attempt
from normkit.text import by_reason, listed, module_name, table_lines
from normkit.tracing.graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One norm that was replaced.

    Args:
        name: Its name in the model; of a shared layer the first of its names.
        old: The old layer, as in ``"BatchNorm2d(64)"``.
        new: The new layer as a resolved spec, as in ``"gn:32"``.
        carried: What the new layer took over from the old one.
        lost: What the new layer could not take over.
        warnings: What the user should know before training or evaluating the model.
    """

    name: str
    old: str
    new: str
    carried: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """One norm that was not replaced.

    Args:
        name: Its name in the model.
        old: The layer, as in ``"BatchNorm2d(64)"``.
        why: Why it was not replaced.
    """

    name: str
    old: str
    why: str


FUNCTIONS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})
CALLED_AS_FUNCTION = "the forward calls it as a function, so there is no module to replace"


def called_as_functions(graph: Graph) -> Iterator[Left]:
    """Yield a row for each call of a norm function, such as ``F.batch_norm``, in a forward."""
    for call in graph.calls:
        if call.kind == "other" and call.name in FUNCTIONS:
            yield Left(name=call.name, old="a function", why=CALLED_AS_FUNCTION)


@dataclass(kw_only=True, eq=False, repr=False)
class Conversion:
    """A converted model and a report of what was done to it; prints as a table.

    Args:
        model: The converted model; after a dry run the unchanged model.
        changes: The norms that were replaced, in the order of the model.
        left: The norms that were not replaced, each with the reason.
        standardized: Names of the convolutions whose weights ``+ws`` standardised.
        unchecked: Classes whose forward may use the norms, if no forward was run to check that.
        dry_run: Whether nothing was changed.
        calibration: How well the outputs agree with the original's, if the model was calibrated.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    left: tuple[Left, ...] = ()
    standardized: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    dry_run: bool = False
    calibration: Calibration | None = None
    _swap: Swap = field(kw_only=True)
    _recipe: ConversionRecipe | None = field(kw_only=True, default=None)
    _to_torch: Callable[..., Conversion] = field(kw_only=True)  # what executes plans imports this

    def recipe(self) -> dict[str, Any]:
        """What was done to the structure, for ``apply_recipe`` on a new model of the same kind.

        Returns:
            A dict that ``json.dumps`` takes, of names and specs. It has no values of parameters.

        Raises:
            OptionError: If the new norms are torch's, which no spec names.

        Example:
            >>> import normkit as nk
            >>> nk.convert_norm_(nn.Sequential(nn.BatchNorm2d(8)), "gn:4").recipe()
            {'format': 1, 'norms': {'0': 'gn:4'}}
        """
        if self._recipe is None:
            raise OptionError(
                "this conversion made norms of torch, which a recipe does not name; the recipe of "
                "the conversion before it has the same names in its state dict: keep that one"
            )
        return self._recipe.as_dict()

    def revert(self) -> nn.Module:
        """Restore the old layers, weights and parameter groups; return the model.

        The old layers are the same modules as before, with their running statistics, hooks and
        optimizer state. Parameters that an old and a new layer share keep their current values:
        this undoes the conversion, not the training since. A second call changes nothing.

        Raises:
            OptionError: If other code has replaced the layers since; nothing is changed then.
        """
        if self.dry_run:
            return self.model
        return attempt(self._revert, self, *self._swap.changed)

    def _revert(self) -> nn.Module:
        self.model = self._swap.revert()
        return self.model

    def back_to_torch(
        self, *, optimizer: Optimizer | None = None, example_input: Any = None
    ) -> Conversion:
        """Replace the new layers by torch's that compute the same, for tools that look for these.

        These are ``BatchNorm1d/2d/3d``, ``SyncBatchNorm`` for ``bn`` over several processes,
        ``InstanceNorm1d/2d/3d``, ``GroupNorm`` for ``gn`` and ``ln``, and ``LayerNorm`` for ``pn``
        with channels on the last axis. Parameters stay the same objects, and names in the state
        dict stay. Layers that torch does not have stay, and the report says why.

        Args:
            optimizer: Checked as in ``convert_norm_``.
            example_input: Sent through the model, as in ``convert_norm_``. It also tells the number
                of spatial axes where the class of the old layer does not.

        Returns:
            A report with the model, which can be reverted.

        Raises:
            OptionError: If torch has none of the layers, or this was a dry run.
            ConversionError: If something that was added to a layer cannot be transferred.
            TraceError: If the model does not accept the example input.

        Example:
            >>> import normkit as nk
            >>> done = nk.convert_norm_(nn.Sequential(nn.BatchNorm2d(8)), "gn:4")
            >>> isinstance(done.back_to_torch().model[0], nn.GroupNorm)
            True
        """
        if self.dry_run:
            raise OptionError("a dry run has changed nothing; convert first")
        olds = self._swap.olds

        def is_new(module: nn.Module, _: str) -> bool:
            return module in olds

        return self._to_torch(self.model, is_new, olds, optimizer, example_input)

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
    """List each warning once, with the names of all its norms."""
    pairs = ((module_name(c.name), warning) for c in changes for warning in c.warnings)
    for warning, names in by_reason(pairs).items():
        yield f"  {names}: {warning}"


def _not_run(classes: Sequence[str]) -> Iterator[str]:
    if classes:
        named = listed(classes, at_most=4)
        yield f"not checked: the forward of {named}; with example_input= it is run before and after"


def _left_alone(left: Sequence[Left]) -> Iterator[str]:
    """List each reason once, with the names of all its norms."""
    rows = ((f"{module_name(each.name)} ({each.old})", each.why) for each in left)
    for why, names in by_reason(rows).items():
        yield f"left alone, {why}: {names}"


def _calibrated(done: Calibration) -> list[str]:
    several = "es" if done.num_batches > 1 else ""
    head = f"calibrated {done.num_layers} norms on {done.num_batches} batch{several}"
    lines = [f"{head}; outputs against the original's:"]
    states = {"original": done.original, "plain swap": done.plain, "calibrated": done.calibrated}
    lines += table_lines(rows(list(states.items())))
    return lines + [f"not calibrated: {module_name(name)}: {why}" for name, why in done.skipped]


def _list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"
