"""The recipe of "Four Things" for a batch size: applied to a model, described and reverted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from normkit.convert import Conversion, convert_norm_
from normkit.convert.report import Change
from normkit.core.check import require_count
from normkit.errors import OptionError, TraceError
from normkit.layers.over_batch import BatchNorm, GeneralBatchGroupNorm, GhostBatchNorm
from normkit.layers.over_example import GroupNorm
from normkit.param_groups import norms_without_residual_paths, param_groups
from normkit.passes import all_or_nothing, require_unwrapped

State = Literal["done", "would be done", "left to you", "not used"]
Doing = tuple[State, str]
"""The state of the changes to norms, and their verb: "became" or, in a dry run, "would become"."""
Where = Callable[[nn.Module, str], bool]
KINDS = (_BatchNorm, nn.GroupNorm, BatchNorm, GhostBatchNorm, GeneralBatchGroupNorm, GroupNorm)
"""Classes of norms that the recipe replaces; all others stay."""
LARGEST_GHOST = 16
"""Largest number of examples in a ghost batch by default; the paper tunes the number."""
SMALLEST_GHOST = 4

READING = (
    "our reading for batches of 3 to 5, where the paper prints no recipe: batch norm degrades at "
    "4 and below (section 4.2), and both norms combined are for small batches (3.4)"
)
Norm = Literal["group", "batch and group", "ghost"]
PRINTED: Mapping[int, tuple[Norm, str]] = {
    1: ("group", "printed for batches of 1 (section 4.2)"),
    2: ("batch and group", "printed for batches of 2 (section 4.2)"),
    4: ("batch and group", READING),
    8: ("ghost", "printed for batches of 8 and more (section 4.2)"),
}
"""The norm and its source by batch size; other sizes take the entry that is nearest in log2."""
ABOVE_READING = (
    "our reading for batches of 6 and 7, where the paper prints no recipe: nearer to 8 than to 4"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One of the four things, at a batch size.

    Args:
        name: Name of the method.
        state: Whether the method is applied (in a dry run: would be), left to the user, or not
            used at this batch size.
        what: What was done, what the user should do, or why the method is not used.
    """

    name: str
    state: State
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.state}: {self.what}"


@dataclass(kw_only=True, eq=False, repr=False)
class FourThings:
    """The recipe for a batch size as it was applied; printing it lists the four things.

    Args:
        model: The model with the recipe's norms; after a dry run, the unchanged model.
        batch_size: Examples that one process normalises together.
        spec: The norm that replaced the model's batch and group norms.
        source: Where the paper prints this recipe, or how we read the paper.
        things: The four things, in the order of the paper.
        conversion: The report of the conversion of norms.
        decays_norms: Whether ``param_groups`` decays the norms' weights and biases.
    """

    model: nn.Module
    batch_size: int
    spec: str
    source: str
    things: tuple[Thing, ...]
    conversion: Conversion
    decays_norms: bool
    _example_input: Any = field(kw_only=True, default=None)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The norms that were replaced."""
        return self.conversion.changes

    @property
    def left(self) -> tuple[Thing, ...]:
        """The things that are left to the user."""
        return tuple(thing for thing in self.things if thing.state == "left to you")

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups with the recipe's weight decay; see ``nk.param_groups``.

        Args:
            weight_decay: Weight decay of weights and biases, and of the norms' ones if
                ``decays_norms``; otherwise the norms have weight decay 0.

        Raises:
            OptionError: As in ``nk.param_groups``.
        """
        of_norms = weight_decay if self.decays_norms else 0.0
        return param_groups(self.model, weight_decay, of_norms, example_input=self._example_input)

    def revert(self) -> nn.Module:
        """Put the old norms back, as ``Conversion.revert`` does, and return the model.

        Raises:
            OptionError: If the norms were replaced again since; then nothing is changed.
        """
        self.model = self.conversion.revert()
        return self.model

    def __repr__(self) -> str:
        return f"<FourThings: {self._summary()}>"

    def __str__(self) -> str:
        lines = [f"{self._summary()}; {self.source}", *(f"  {thing}" for thing in self.things)]
        return "\n".join([*lines, str(self.conversion)])

    def _summary(self) -> str:
        return f"recipe for batches of {self.batch_size}: {self.spec}"


@all_or_nothing
def four_things(  # noqa: PLR0913 - the options that the paper tunes, and those of conversion
    model: nn.Module,
    batch_size: int,
    *,
    num_groups: int | None = None,
    ghost_batch_size: int | None = None,
    where: Where | None = None,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> FourThings:
    """Apply the recipe of "Four Things" for a batch size to a model that is to be trained.

    ============  ==============================  ==================  =====================
    batch size    norms become                    decay on gamma,     example weight tuned
                                                  beta                after training
    ============  ==============================  ==================  =====================
    1             group norm                      yes                 no
    2             batch and group norm together   yes                 yes
    3, 4, 5       the same (our reading)          yes                 yes
    6, 7          ghost batch norm (our reading)  yes                 yes
    8 and more    ghost batch norm                yes                 yes
    ============  ==============================  ==================  =====================

    Norms are replaced in place. Two things are left to the user: build the optimizer from
    ``.param_groups(weight_decay)``, and after training call ``nk.tune_example_weight`` with
    held-out data. The printed result says which of these to do.

    Args:
        model: A model with batch norms or group norms of torch, timm or normkit; other norms stay.
        batch_size: Examples that one process normalises together in training.
        num_groups: Channel groups for batch sizes up to 5; by default the largest divisor of the
            channels that is at most 32.
        ghost_batch_size: Examples in a ghost batch for batch sizes from 6. By default the batch is
            cut into two or more equal parts of at most 16 examples. The paper tunes the number.
        where: ``where(module, name)`` selects the norms to replace; by default all.
        optimizer: Optimizer to adapt, as in ``nk.convert_norm_``; its weight decays stay the same.
        example_input: As in ``nk.convert_norm_``.
        dry_run: Only report what would be done.

    Returns:
        What was done and what is left, with ``changes``, ``param_groups`` and ``revert``.

    Raises:
        OptionError: If a number is not an integer of at least 1 or not used at this batch size, a
            ghost batch is larger than the batch, or the model has no such norm.
        NormError: As in ``nk.convert_norm_``.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, sections
        3 and 4.2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> plan = four_things(model, 8)
        >>> plan.spec, type(model[1]).__name__
        ('ghost:4', 'GhostBatchNorm')
        >>> [thing.name for thing in plan.left]
        ['inference example weighing', 'weight decay on gamma and beta']
        >>> type(plan.revert()[1]).__name__
        'BatchNorm2d'
    """
    norm, source = recipe_for(batch_size)
    spec = _spec(norm, batch_size, num_groups, ghost_batch_size)
    _require_norms(model)
    conversion = convert_norm_(
        model,
        spec,
        where=lambda m, name: isinstance(m, KINDS) and (where is None or where(m, name)),
        optimizer=optimizer,
        example_input=example_input,
        dry_run=dry_run,
    )
    decays, decay = _decay(conversion.model, example_input)
    doing: Doing = ("would be done", "would become") if dry_run else ("done", "became")
    return FourThings(
        model=conversion.model,
        batch_size=batch_size,
        spec=spec,
        source=source,
        things=(
            _weighing(norm),
            _ghost(norm, spec, batch_size, doing),
            decay,
            _combined(norm, spec, batch_size, doing),
        ),
        conversion=conversion,
        decays_norms=decays,
        _example_input=example_input,
    )


def recipe_for(batch_size: int) -> tuple[Norm, str]:
    """Return the norm for a batch size, and the source of this choice.

    Raises:
        OptionError: If the batch size is not an integer of at least 1.

    Example:
        >>> [recipe_for(size)[0] for size in (1, 2, 3, 5, 6, 128)]
        ['group', 'batch and group', 'batch and group', 'batch and group', 'ghost', 'ghost']
    """
    require_count("batch_size", batch_size)
    nearest = min(PRINTED, key=lambda known: abs(math.log2(batch_size / known)))
    norm, source = PRINTED[nearest]
    return norm, ABOVE_READING if nearest == 8 and batch_size < 8 else source


def spec_for(batch_size: int) -> str:
    """Return the spec of what norms become for a batch size, unless the user sets a number.

    Raises:
        OptionError: As ``recipe_for``.

    Example:
        >>> [spec_for(size) for size in (1, 2, 8, 128)]
        ['gn:max=32', 'gbgn:max=32', 'ghost:4', 'ghost:16']
    """
    return _spec(recipe_for(batch_size)[0], batch_size, None, None)


def ghost_size(batch_size: int) -> int:
    """Number of examples in a ghost batch: two or more equal parts of at most 16 examples.

    If no number of parts divides the batch into equal parts of at least 4 examples, the last part
    is a little smaller.

    Example:
        >>> [ghost_size(size) for size in (6, 8, 16, 32, 40, 128, 13)]
        [3, 4, 8, 16, 10, 16, 7]
    """
    fewest = max(2, -(-batch_size // LARGEST_GHOST))
    most = max(fewest, batch_size // SMALLEST_GHOST)
    fitting = [parts for parts in range(fewest, most + 1) if batch_size % parts == 0]
    return -(-batch_size // (fitting[0] if fitting else fewest))


def _spec(norm: Norm, batch_size: int, num_groups: int | None, ghost: int | None) -> str:
    if norm == "ghost":
        _require_unused("num_groups", num_groups, "up to 5", batch_size)
        size = ghost_size(batch_size) if ghost is None else require_count("ghost_batch_size", ghost)
        if size > batch_size:
            raise OptionError(
                f"ghost_batch_size={size} was given for batches of {batch_size}; a ghost batch is "
                f"a part of the batch"
            )
        return f"ghost:{size}"
    _require_unused("ghost_batch_size", ghost, "from 6 on", batch_size)
    groups = "max=32" if num_groups is None else str(require_count("num_groups", num_groups))
    return f"{'gn' if norm == 'group' else 'gbgn'}:{groups}"


def _require_unused(name: str, value: int | None, sizes: str, batch_size: int) -> None:
    if value is not None:
        raise OptionError(
            f"{name}={value} was given for batches of {batch_size}; it is for batch sizes {sizes}"
        )


def _require_norms(model: nn.Module) -> None:
    require_unwrapped(model, "convert")
    if not any(isinstance(module, KINDS) for module in model.modules()):
        raise OptionError(
            f"{type(model).__name__} has no batch norm and no group norm, which the recipe "
            f"replaces; call it with a model that has one"
        )


def _weighing(norm: Norm) -> Thing:
    name = "inference example weighing"
    if norm == "group":
        return Thing(name=name, state="not used", what="group norm has no running statistics")
    what = "after training, nk.tune_example_weight(model, held_out_batches)"
    return Thing(name=name, state="left to you", what=what)


def _ghost(norm: Norm, spec: str, batch_size: int, doing: Doing) -> Thing:
    state, verb = doing
    name = "ghost batch norm"
    if norm != "ghost":
        why = f"batches of {batch_size} are too small for parts of them"
        return Thing(name=name, state="not used", what=why)
    size = int(spec.partition(":")[2])
    what = f"norms {verb} {spec}, statistics of {size} of {batch_size} examples; tune the size"
    return Thing(name=name, state=state, what=what)


def _combined(norm: Norm, spec: str, batch_size: int, doing: Doing) -> Thing:
    state, verb = doing
    name = "batch and group norm combined"
    if norm == "batch and group":
        what = f"norms {verb} {spec}, statistics of groups of channels over all {batch_size}"
        return Thing(name=name, state=state, what=what)
    if norm == "group":
        why = f"there is one example, so norms {verb} {spec}: groups of its channels alone"
        return Thing(name=name, state=state, what=why)
    return Thing(name=name, state="not used", what="the batch is large enough for each channel")


def _decay(model: nn.Module, example_input: Any) -> tuple[bool, Thing]:
    """Decide whether norms decay: decay does not help if later norms undo its effect."""
    name = "weight decay on gamma and beta"
    what = "make the optimizer of .param_groups(weight_decay), which decays them like the weights"
    try:
        undone, _ = norms_without_residual_paths(model, example_input)
    except TraceError:
        what += "; whether norms have a residual path, without which it hurts, is not known here"
        undone = []
    if undone:
        what = (
            "no norm has a residual path to the output, where decay was found to hurt: the groups "
            "of .param_groups(weight_decay) leave it off"
        )
        return False, Thing(name=name, state="not used", what=what)
    return True, Thing(name=name, state="left to you", what=what)
