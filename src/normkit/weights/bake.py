"""Turning reparametrised layers back into plain ones with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import WeightError
from normkit.passes import all_or_nothing, require_inspectable
from normkit.tracing.kinds import is_producer
from normkit.weights.attach import give_own_class, rules_of
from normkit.weights.report import WeightReport


@all_or_nothing
def bake_weights_(model: nn.Module) -> WeightReport:
    """Write every computed weight into its layer and remove the reparametrisation, in place.

    Afterwards the layers are plain ones: their outputs are the same, their state dict has the names
    of a plain layer, and computing the weight costs nothing. The weight stays the same parameter
    object. A model without reparametrised layers is not changed.

    Args:
        model: Changed in place.

    Returns:
        A report of the layers that were baked.

    Raises:
        OptionError: If the model hides its layers: it is scripted, exported, sharded or quantized.
        WeightError: If a weight has parametrizations besides normkit's, or is shared with a layer
            that computes another weight from it; nothing is changed then.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> _ = nk.standardize_weights_(model)
        >>> print(bake_weights_(model))
        baked 1 layer
          0
    """
    require_inspectable(model, "bake the weights of")
    layers = {name: m for name, m in model.named_modules() if is_producer(m) and rules_of(m)}
    for name, module in layers.items():
        _require_ours_alone(name, module)
        _require_consistent_sharing(name, module, model)
    for rule in [rule for module in layers.values() for rule in rules_of(module)]:
        if rule.cache is not None:
            rule.cache.remove()
    written: list[Tensor] = []
    for module in layers.values():
        raw = _raw_weight(module)
        # A raw weight that layers share is written once: computing it again from the written
        # values would reparametrise it twice.
        is_first = not any(raw is other for other in written)
        give_own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=is_first)
        _put_weight_first(module)
        written.append(raw)
    return WeightReport(done="baked", changed=tuple(layers), skipped={}, how="")


def _require_ours_alone(name: str, module: nn.Module) -> None:
    chain = list(module.get_submodule("parametrizations").get_submodule("weight").children())
    if len(chain) > len(rules_of(module)):
        kinds = ", ".join(type(rule).__name__ for rule in chain)
        raise WeightError(
            f"the weight of layer {name!r} is parametrised by {kinds}, not all of which are "
            f"normkit's; remove the others first (torch.nn.utils.parametrize)"
        )


def _require_consistent_sharing(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse a raw weight that another layer shares but uses in another way.

    Writing the computed weight into the parameter would change the other layer.

    Raises:
        WeightError: If there is such a layer; the error names both.
    """
    raw, own = _raw_weight(module), _weight(module)
    for other, holder in model.named_modules():
        holds_raw = any(p is raw for p in holder._parameters.values())
        shares = is_producer(holder) and _raw_weight(holder) is raw
        if "parametrizations" in other.split(".") or not (shares or holds_raw):
            continue
        if not shares or not torch.equal(_weight(holder), own):
            raise WeightError(
                f"the weight of layer {name!r} is shared with {other!r}, which computes another "
                f"weight from it; give one of them a parameter of its own first"
            )


def _raw_weight(module: nn.Module) -> Any:
    if parametrize.is_parametrized(module, "weight"):
        return module.get_submodule("parametrizations").get_submodule("weight").original
    return module._parameters.get("weight")


def _weight(module: nn.Module) -> Tensor:
    return getattr(module, "weight")  # noqa: B009 - module.weight has a union type in torch


def _put_weight_first(module: nn.Module) -> None:
    """Restore the plain layer's order of parameters: optimizers' state dicts go by this order."""
    others = {n: p for n, p in module.named_parameters(recurse=False) if n != "weight"}
    for name, parameter in others.items():
        delattr(module, name)
        module.register_parameter(name, parameter)
