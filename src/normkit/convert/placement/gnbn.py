"""GNBN: every other norm of a stack becomes batch-free."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.carry_out import carry_out
from normkit.convert.placement.batch_free import batch_free
from normkit.convert.plan import feeding, plan
from normkit.convert.report import Conversion
from normkit.convert.selection import Chosen, Found, find_norms
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
    example_input: Any = None,  # noqa: ANN401
    dry_run: bool = False,
) -> Conversion:
    """Replace the first, third, fifth, ... norm of a stack by a batch-free norm, in place.

    Norms are counted in the order in which the forward calls them first, those of shortcuts too.
    Everything else is as in ``convert_norm_``.

    Args:
        model: A network with two norms or more.
        norm: A batch-free norm.
        optimizer: Follows, as in ``convert_norm_``.
        example_input: Sent through the model before and after, as in ``convert_norm_``; shows the
            order of the norms if ``torch.fx`` cannot trace the model.
        dry_run: Only report what would be done.

    Returns:
        The model and a report that can be printed, pickled and reverted.

    Raises:
        OptionError: If the forward calls fewer than two norms, or the model is wrapped or compiled.
        SpecError: If the norm takes statistics over the batch, or cannot be read.
        PartitionError: If its groups do not divide the channels; all such layers are named.
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
            f"the forward of {type(model).__name__} calls {len(called)} norms; every other one "
            f"needs two at least: replace a single one with convert_norm_"
        )
    specs = dict.fromkeys(called[::2], spec)
    left = dict.fromkeys(found, "the forward does not call it")
    left |= {m: f"it is norm {n} of {len(called)}" for n, m in enumerate(called, 1)}
    left = {module: why for module, why in left.items() if module not in specs}
    planned = plan(model, found, Chosen(specs, left), None, argument="norm=")
    standardize = feeding(model, found, specs, example_input)
    return carry_out(model, planned, standardize, optimizer, example_input, dry_run)


def _called(model: nn.Module, found: Found, example_input: Any) -> list[nn.Module]:  # noqa: ANN401
    """Norms in the order in which the forward calls them first."""
    names = {name: norm for norm, several in found.items() for name in several}
    calls = trace(model, example_input).calls
    return list(dict.fromkeys(names[c.name] for c in calls if c.kind == "norm"))
