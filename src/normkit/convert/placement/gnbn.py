"""GNBN: replacing every other norm of a network by a batch-free norm."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.execute import execute_plan
from normkit.convert.placement.batch_free import batch_free
from normkit.convert.plan import layers_to_standardize, make_plan
from normkit.convert.report import Conversion
from normkit.convert.selection import Chosen, NamedNorms, find_norms
from normkit.errors import OptionError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.spec import NormSpec
from normkit.tracing.trace import trace


@all_or_nothing
def place_gnbn_(
    model: nn.Module,
    norm: str | NormSpec = "gn:4",
    *,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> Conversion:
    """Replace the first, third, fifth, ... norm of a network by a batch-free norm, in place.

    All norms, also those of shortcuts, are counted in the order of their first calls. Everything
    else is as in ``convert_norm_``.

    Args:
        model: A network with at least two norms.
        norm: Spec of a batch-free norm.
        optimizer: Edited to match the model, as in ``convert_norm_``.
        example_input: Sent through the model before and after, as in ``convert_norm_``. Also used
            to find the order of the norms if ``torch.fx`` cannot trace the model.
        dry_run: Whether to only report what would be done.

    Returns:
        A report with the model, which can be printed, pickled and reverted.

    Raises:
        OptionError: If the forward calls fewer than two norms, or the model is wrapped or compiled.
        SpecError: If the norm takes statistics over the batch, or cannot be read.
        PartitionError: If its groups do not divide the channels; the error names all such layers.
        ConversionError: If a norm to be replaced has no rule.
        TraceError: If the model cannot be traced.

    Source:
        Huang, Zhou, Wang, Luo & Liu, Delving into the Estimation Shift of Batch Normalization in a
        Network, section 4.2.2.

    Example:
        >>> stack = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8))]
        >>> done = place_gnbn_(nn.Sequential(*stack), norm="gn:2")
        >>> [change.name for change in done.changes]
        ['1', '5']
    """
    require_unwrapped(model, "convert")
    spec = batch_free(norm)
    found = find_norms(model)
    called = _called(model, found, example_input)
    if len(called) < 2:
        raise OptionError(
            f"the forward of {type(model).__name__} calls {len(called)} norms; replacing every "
            f"other one needs at least two: use convert_norm_ to replace a single one"
        )
    specs = dict.fromkeys(called[::2], spec)
    left = dict.fromkeys(found, "the forward does not call it")
    left |= {m: f"it is norm {n} of {len(called)}" for n, m in enumerate(called, 1)}
    left = {module: why for module, why in left.items() if module not in specs}
    planned = make_plan(model, found, Chosen(specs, left), None, argument="norm=")
    standardize = layers_to_standardize(model, found, specs, example_input)
    return execute_plan(model, planned, standardize, optimizer, example_input, dry_run)


def _called(model: nn.Module, found: NamedNorms, example_input: Any) -> list[nn.Module]:
    """Return the norms in the order of their first calls."""
    names = {name: norm for norm, several in found.items() for name in several}
    calls = trace(model, example_input).calls
    return list(dict.fromkeys(names[c.name] for c in calls if c.kind == "norm"))
