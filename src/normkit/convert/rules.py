"""Conversion rules: for each class of norm, what a new layer can take over, and what is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.convert.adapters import base_of
from normkit.convert.source import Activation, Source, Statistics
from normkit.errors import ConversionError
from normkit.inference import norm_classes
from normkit.inference.freeze import is_frozen
from normkit.layers.base import NormLayer
from normkit.recipes import METHODS

Rule = Callable[[Any], Source]

RULES: dict[str, Rule] = {}
"""The rule of each class, by the class's module and name, so that no other library is imported."""

UNBATCHED = "inputs without a batch axis"
STATISTICS_OF_EXAMPLES = "the average over examples' own statistics (ours follow the whole batch's)"


def rule(*kinds: type | str) -> Callable[[Rule], Rule]:
    """Register the conversion rule of these classes; it does not apply to their subclasses.

    Args:
        kinds: Classes, or ``"module.Name"`` of classes that need not be installed.

    Raises:
        ConversionError: If one of the classes has a rule already.

    Example:
        >>> class MyBatchNorm(nn.BatchNorm2d):
        ...     pass
        >>> register = rule(MyBatchNorm)
        >>> _ = register(RULES["torch.nn.modules.batchnorm.BatchNorm2d"])
        >>> read(MyBatchNorm(4)).num_features
        4
    """

    def register(function: Rule) -> Rule:
        for key in map(key_of, kinds):
            if key in RULES:
                raise ConversionError(
                    f"{key} has a rule already: {RULES[key].__module__}.{RULES[key].__name__}"
                )
            RULES[key] = function
        return function

    return register


def key_of(kind: type | str) -> str:
    """Return a class's module and name, joined by a dot."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def read(module: nn.Module) -> Source:
    """Read a norm by the rule of its class.

    Raises:
        ConversionError: If its class has no rule, it is not initialised, its statistics are
            frozen, or its forward or parameters were replaced.
    """
    kind = base_of(module)
    if any(map(is_frozen, module.modules())):
        raise ConversionError(
            "its statistics are frozen, but those of a new layer would not be; call "
            "normkit.thaw_statistics first and freeze the new layer afterwards, or leave it out "
            "with where="
        )
    require_unmodified(module)
    values = [*module._parameters.values(), *module._buffers.values()]
    if any(map(is_lazy, values)):
        raise ConversionError(
            f"{kind.__name__} does not know its number of channels yet; send one batch through "
            f"the model first"
        )
    if len({value.is_meta for value in values if value is not None}) > 1:
        raise ConversionError(
            "some of its values are on the meta device and others are not; load all of them first"
        )
    found = _rule_of(kind) or (_frozen if norm_classes.is_fixed(module) else None)
    if found is None:
        raise ConversionError(
            f"{key_of(kind)} has no rule; leave it out with where= or by mapping its name to "
            f"None, or register a rule with normkit.convert.rule"
        )
    return found(module)


def has_rule(kind: type[nn.Module]) -> bool:
    """Whether norms of a class can be read."""
    return _rule_of(kind) is not None


def _rule_of(kind: type[nn.Module]) -> Rule | None:
    """The rule of a class; layers that specs name have one together, that of their base class."""
    is_layer = any(recipe.layer is kind for recipe in METHODS.values())
    return RULES.get(key_of(kind)) or (RULES[key_of(NormLayer)] if is_layer else None)


def require_unmodified(module: nn.Module) -> None:
    """Refuse a layer that was modified in ways that cannot be transferred to a new layer.

    Raises:
        ConversionError: If its forward was replaced, or a parameter is computed or parametrised.
    """
    own = vars(module)
    if "forward" in own:
        raise ConversionError(
            "its forward was replaced on this layer, and a new layer would not have that forward; "
            "restore the original forward first, or leave the layer out with where="
        )
    computed = [name for name in ("weight", "bias") if isinstance(own.get(name), Tensor)]
    if computed:
        raise ConversionError(
            f"its {' and '.join(computed)} is not a parameter but computed, as by pruning; make it "
            f"permanent first (torch.nn.utils.prune.remove or remove_weight_norm), or leave the "
            f"layer out with where="
        )
    if parametrize.is_parametrized(module):
        names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
        raise ConversionError(
            f"its {' and '.join(names)} is parametrised; make it permanent first "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or leave the layer out with "
            f"where="
        )


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(layer: nn.BatchNorm2d) -> Source:
    """Read a batch norm; everything can be taken over.

    torch evaluates with the running statistics if the buffers exist, even if
    ``track_running_stats`` is False.
    """
    statistics = _statistics(layer)
    return Source(
        num_features=_num_features(layer, layer.num_features),
        options=_options(layer)
        | {"momentum": layer.momentum, "track_running_stats": statistics is not None},
        weight=layer.weight,
        bias=layer.bias,
        statistics=statistics,
        over_batch=True,
        buffers_are_frozen=statistics is not None and not layer.track_running_stats,
        equivalent_spec="bn",
        without_positions=isinstance(layer, nn.BatchNorm1d),
    )


@rule(nn.SyncBatchNorm)
def _sync_batch_norm(layer: nn.SyncBatchNorm) -> Source:
    """Read a synchronised batch norm; if it has no process group it uses all processes."""
    return replace(_batch_norm(layer), process_group=layer.process_group or "world")  # type: ignore[arg-type]


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(layer: nn.InstanceNorm2d) -> Source:
    tracked = layer.track_running_stats
    lost = (UNBATCHED, *([STATISTICS_OF_EXAMPLES] if tracked else []))
    # With tracked statistics torch's instance norm evaluates by these, not by the example's own.
    own = {"example_weight": 0.0} if tracked else {}
    momentum = {"momentum": layer.momentum, "track_running_stats": tracked}
    return Source(
        num_features=_num_features(layer, layer.num_features),
        options=_options(layer) | momentum | own,
        weight=layer.weight,
        bias=layer.bias,
        statistics=_statistics(layer) if tracked else None,
        equivalent_spec="in",
        lost=lost,
    )


@rule(nn.GroupNorm, *norm_classes.GROUP_NORMS)
def _group_norm(layer: nn.GroupNorm) -> Source:
    return Source(
        num_features=_num_features(layer, layer.num_channels),
        options=_options(layer),
        weight=layer.weight,
        bias=layer.bias,
        equivalent_spec=f"gn:{layer.num_groups}",
    )


@rule(*norm_classes.MAP_NORMS)
def _layer_norm_of_maps(layer: nn.LayerNorm) -> Source:
    """Read a layer norm of maps ``(N, C, H, W)`` over the channels at a position, as ``pn`` is."""
    if len(layer.normalized_shape) != 1:
        raise ConversionError(
            f"{type(layer).__name__} normalizes over axes of shape {layer.normalized_shape}; only "
            f"a layer norm over the channels alone can be converted; leave it out with where="
        )
    return Source(
        num_features=layer.normalized_shape[0],
        options=_options(layer),
        weight=layer.weight,
        bias=layer.bias,
        equivalent_spec="pn",
    )


@rule(nn.LayerNorm, *norm_classes.LAYER_NORMS)
def _layer_norm(layer: nn.LayerNorm) -> Source:
    """Read a layer norm whose channels are on the last axis, where they stay."""
    return replace(_layer_norm_of_maps(layer), channels_last=True, without_positions=True)


@rule(*norm_classes.FIXED)
def _frozen(layer: Any) -> Source:
    """Read a batch norm with fixed values, which become parameters without a gradient.

    Unlike the old layer, the new one updates its statistics in training.
    """
    return Source(
        num_features=layer.weight.numel(),
        # Some frozen batch norms have no ``eps`` attribute: their forward contains the number 1e-5.
        options={"eps": getattr(layer, "eps", 1e-5)},
        weight=layer.weight,
        bias=layer.bias,
        statistics=Statistics(layer.running_mean, layer.running_var, None),
        over_batch=True,
        equivalent_spec="bn",
        fixed=True,
    )


def _with_activation(read_norm: Rule) -> Rule:
    """Extend a rule to layers that apply dropout and an activation after the norm."""

    @wraps(read_norm)
    def read_both(layer: nn.Module) -> Source:
        modules = dict(layer.named_children())
        drop, act = (modules.get(name, nn.Identity()) for name in ("drop", "act"))
        return replace(read_norm(layer), activation=Activation(drop, act))

    return read_both


for _names, _rule in (
    (norm_classes.BATCH_NORM_ACTS, _batch_norm),
    (norm_classes.SYNC_BATCH_NORM_ACTS, _sync_batch_norm),
    (norm_classes.GROUP_NORM_ACTS, _group_norm),
    (norm_classes.MAP_NORM_ACTS, _layer_norm_of_maps),
    (norm_classes.LAYER_NORM_ACTS, _layer_norm),
    (norm_classes.FIXED_ACTS, _frozen),
):
    rule(*_names)(_with_activation(_rule))


def _options(layer: Any) -> dict[str, Any]:
    """Return the options according to the layer's parameters, whatever its flags say."""
    has_weight, has_bias = layer.weight is not None, layer.bias is not None
    return {"eps": layer.eps, "affine": has_weight or has_bias, "bias": has_bias or not has_weight}


def _num_features(layer: nn.Module, said: int) -> int:
    """Count the channels of the tensors; pruning libraries may not update the attribute."""
    held = (layer.weight, layer.bias, layer._buffers.get("running_mean"))
    return next((value.numel() for value in held if isinstance(value, Tensor)), said)


def _statistics(layer: nn.BatchNorm2d | nn.InstanceNorm2d) -> Statistics | None:
    if layer.running_mean is None or layer.running_var is None:
        return None
    return Statistics(layer.running_mean, layer.running_var, layer.num_batches_tracked)
