"""How each kind of norm is read: what another one takes over of it, and what is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.convert.adapters import base_of
from normkit.convert.source import Activation, Source, Statistics
from normkit.errors import ConversionError
from normkit.inference import known
from normkit.inference.freeze import is_frozen

Rule = Callable[[Any], Source]

RULES: dict[str, Rule] = {}
"""The rule of each class, by its module and name: other libraries are never imported."""

UNBATCHED = "inputs without a batch axis"
STATISTICS_OF_EXAMPLES = "the average over examples' own statistics (ours follow the whole batch's)"


def rule(*kinds: type | str) -> Callable[[Rule], Rule]:
    """Register how layers of these classes are read; subclasses are other kinds.

    Args:
        kinds: Classes, or ``"module.Name"`` of classes that need not be installed.

    Raises:
        ConversionError: If a class has a rule.

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
    """Module and name of a class."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def read(module: nn.Module) -> Source:
    """Read a norm by the rule of its class.

    Raises:
        ConversionError: If its class has no rule, its shape is not known yet, or its statistics
            are frozen.
    """
    kind = base_of(module)
    if any(map(is_frozen, module.modules())):
        raise ConversionError(
            "its statistics are frozen, which no other layer would be; call "
            "normkit.thaw_statistics first and freeze the new layer afterwards, or leave it alone "
            "with where="
        )
    _require_plain(module)
    values = [*module._parameters.values(), *module._buffers.values()]
    if any(is_lazy(value) for value in values if value is not None):
        raise ConversionError(
            f"{kind.__name__} does not know its number of channels yet; send one batch through "
            f"the model first"
        )
    if len({value.is_meta for value in values if value is not None}) > 1:
        raise ConversionError(
            "some of its values are on the meta device and others are not; load all of them first"
        )
    found = RULES.get(key_of(kind)) or (_frozen if known.is_fixed(module) else None)
    if found is None:
        raise ConversionError(
            f"{key_of(kind)} has no rule; leave it alone with where= or by mapping its name to "
            f"None, or say how it is read with normkit.convert.rule"
        )
    return found(module)


def _require_plain(module: nn.Module) -> None:
    """Refuse a layer that somebody has changed in ways that no other layer would follow.

    Raises:
        ConversionError: If its forward was replaced, or a parameter is computed or parametrised.
    """
    own = vars(module)
    if "forward" in own:
        raise ConversionError(
            "its forward was replaced on this very layer, which a new layer would not have; take "
            "that away first, or leave the layer alone with where="
        )
    computed = [name for name in ("weight", "bias") if isinstance(own.get(name), Tensor)]
    if computed:
        raise ConversionError(
            f"its {' and '.join(computed)} is no parameter but computed, as pruning does; make it "
            f"permanent first (torch.nn.utils.prune.remove or remove_weight_norm), or leave it "
            f"alone with where="
        )
    if parametrize.is_parametrized(module):
        names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
        raise ConversionError(
            f"its {' and '.join(names)} is parametrised; make it permanent first "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or leave it alone with where="
        )


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(layer: nn.BatchNorm2d) -> Source:
    """Everything is carried. Evaluation goes by the buffers that there are, whatever flags say."""
    statistics = _statistics(layer)
    return Source(
        num_features=_num_features(layer, layer.num_features),
        options=_options(layer)
        | {"momentum": layer.momentum, "track_running_stats": statistics is not None},
        weight=layer.weight,
        bias=layer.bias,
        statistics=statistics,
        over_batch=True,
        still=statistics is not None and not layer.track_running_stats,
        twin="bn",
        without_positions=isinstance(layer, nn.BatchNorm1d),
    )


@rule(nn.SyncBatchNorm)
def _sync_batch_norm(layer: nn.SyncBatchNorm) -> Source:
    """Likewise; no group means all processes."""
    return replace(_batch_norm(layer), process_group=layer.process_group or "world")  # type: ignore[arg-type]


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(layer: nn.InstanceNorm2d) -> Source:
    tracked = layer.track_running_stats
    lost = (UNBATCHED, *([STATISTICS_OF_EXAMPLES] if tracked else []))
    own = {"example_weight": 0.0} if tracked else {}  # evaluates by its running statistics
    momentum = {"momentum": layer.momentum, "track_running_stats": tracked}
    return Source(
        num_features=_num_features(layer, layer.num_features),
        options=_options(layer) | momentum | own,
        weight=layer.weight,
        bias=layer.bias,
        statistics=_statistics(layer) if tracked else None,
        twin="in",
        lost=lost,
    )


@rule(nn.GroupNorm, *known.GROUP_NORMS)
def _group_norm(layer: nn.GroupNorm) -> Source:
    """Everything is carried."""
    return Source(
        num_features=_num_features(layer, layer.num_channels),
        options=_options(layer),
        weight=layer.weight,
        bias=layer.bias,
        twin=f"gn:{layer.num_groups}",
    )


@rule(*known.MAP_NORMS)
def _layer_norm_of_maps(layer: nn.LayerNorm) -> Source:
    """The statistics of a position over its channels, in ``(N, C, H, W)``: ``pn`` keeps them."""
    if len(layer.normalized_shape) != 1:
        raise ConversionError(
            f"{type(layer).__name__} normalizes over the axes {layer.normalized_shape}; only one "
            f"over the channels alone can be converted; leave it alone with where="
        )
    return Source(
        num_features=layer.normalized_shape[0],
        options=_options(layer),
        weight=layer.weight,
        bias=layer.bias,
        twin="pn",
    )


@rule(nn.LayerNorm, *known.LAYER_NORMS)
def _layer_norm(layer: nn.LayerNorm) -> Source:
    """Likewise, with the channels in the last axis, where they stay."""
    return replace(_layer_norm_of_maps(layer), channels_last=True, without_positions=True)


@rule(*known.BATCH_NORM_ACTS)
def _batch_norm_act(layer: Any) -> Source:  # noqa: ANN401 - a class that need not be installed
    return replace(_batch_norm(layer), activation=_activation(layer))


@rule(*known.SYNC_BATCH_NORM_ACTS)
def _sync_batch_norm_act(layer: Any) -> Source:  # noqa: ANN401
    return replace(_sync_batch_norm(layer), activation=_activation(layer))


@rule(*known.GROUP_NORM_ACTS)
def _group_norm_act(layer: Any) -> Source:  # noqa: ANN401
    return replace(_group_norm(layer), activation=_activation(layer))


@rule(*known.MAP_NORM_ACTS)
def _layer_norm_act_of_maps(layer: Any) -> Source:  # noqa: ANN401
    return replace(_layer_norm_of_maps(layer), activation=_activation(layer))


@rule(*known.LAYER_NORM_ACTS)
def _layer_norm_act(layer: Any) -> Source:  # noqa: ANN401
    return replace(_layer_norm(layer), activation=_activation(layer))


@rule(*known.FIXED)
def _frozen(layer: Any) -> Source:  # noqa: ANN401
    """Values become parameters without a gradient; the statistics follow the training now."""
    return Source(
        num_features=layer.weight.numel(),
        options={"eps": getattr(layer, "eps", 1e-5)},  # detectron-style ones may write it inline
        weight=layer.weight,
        bias=layer.bias,
        statistics=Statistics(layer.running_mean, layer.running_var, None),
        over_batch=True,
        twin="bn",
        fixed=True,
    )


@rule(*known.FIXED_ACTS)
def _frozen_act(layer: Any) -> Source:  # noqa: ANN401
    return replace(_frozen(layer), activation=_activation(layer))


def _options(layer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Options by what the layer has, not by the flags that it was built with."""
    has_weight, has_bias = layer.weight is not None, layer.bias is not None
    return {"eps": layer.eps, "affine": has_weight or has_bias, "bias": has_bias or not has_weight}


def _num_features(layer: nn.Module, said: int) -> int:
    """Channels of the values that act; pruning libraries may leave the number behind."""
    held = (layer.weight, layer.bias, layer._buffers.get("running_mean"))
    return next((value.numel() for value in held if isinstance(value, Tensor)), said)


def _statistics(layer: nn.BatchNorm2d | nn.InstanceNorm2d) -> Statistics | None:
    if layer.running_mean is None or layer.running_var is None:
        return None
    return Statistics(layer.running_mean, layer.running_var, layer.num_batches_tracked)


def _activation(layer: nn.Module) -> Activation:
    modules = dict(layer.named_children())
    return Activation(modules.get("drop", nn.Identity()), modules.get("act", nn.Identity()))
