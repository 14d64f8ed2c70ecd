"""From reparametrised layers back to plain ones with the same weights."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from normkit.errors import WeightError
from normkit.passes import all_or_nothing, require_layers
from normkit.tracing.kinds import is_producer
from normkit.weights.attach import rules_of, take_class_of_its_own
from normkit.weights.report import WeightReport


@all_or_nothing
def bake_weights_(model: nn.Module) -> WeightReport:
    """Write every computed weight into its layer and take the reparametrisation off, in place.

    The layers are plain ones afterwards: same outputs, the names of a plain state dict, no cost.
    The weight stays the same parameter object. A model without reparametrised layers is left
    alone.

    Args:
        model: Changed in place.

    Returns:
        The layers that were baked.

    Raises:
        OptionError: If the model's layers cannot be looked into: it is scripted, exported, ...
        WeightError: If a weight is parametrised by something else as well; nothing is changed.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> _ = nk.standardize_weights_(model)
        >>> print(bake_weights_(model))
        baked 1 layer
          0
    """
    require_layers(model, "bake the weights of")
    layers = {name: m for name, m in model.named_modules() if is_producer(m) and rules_of(m)}
    for name, module in layers.items():
        _require_ours_alone(name, module)
    for rule in [rule for module in layers.values() for rule in rules_of(module)]:
        if rule.once is not None:
            rule.once.remove()
    for module in layers.values():
        take_class_of_its_own(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        _put_weight_first(module)
    return WeightReport(done="baked", changed=tuple(layers), skipped={}, how="")


def _require_ours_alone(name: str, module: nn.Module) -> None:
    chain = list(module.get_submodule("parametrizations").get_submodule("weight").children())
    if len(chain) > len(rules_of(module)):
        kinds = ", ".join(type(rule).__name__ for rule in chain)
        raise WeightError(
            f"the weight of layer {name!r} is parametrised by {kinds}, not all of which are "
            f"normkit's; remove the others first (torch.nn.utils.parametrize)"
        )


def _put_weight_first(module: nn.Module) -> None:
    """Restore the plain layer's order of parameters, by which optimizers keep their state."""
    others = {n: p for n, p in module.named_parameters(recurse=False) if n != "weight"}
    for name, parameter in others.items():
        delattr(module, name)
        module.register_parameter(name, parameter)
