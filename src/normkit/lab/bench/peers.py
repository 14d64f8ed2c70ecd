"""The peers of a layer: torch's own layer, or compositions of torch's operators."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from normkit.errors import SpecError
from normkit.lab.bench import composites, compositions
from normkit.lab.bench.spec import Against
from normkit.layers.base import SegmentLayer
from normkit.layers.over_batch import BatchNorm
from normkit.layers.over_example import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm

Map = Float[Tensor, "n c *s"]


def _same(x: Map) -> Map:
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A module that computes the same as a layer of ours.

    Args:
        name: Name of the peer in tables.
        module: The module, which takes and returns a feature map.
        arrange: Brings examples into the order that the module takes.
        restore: Brings examples back into our order.
    """

    name: str
    module: nn.Module
    arrange: Callable[[Map], Map] = _same
    restore: Callable[[Map], Map] = _same


def peers_of(layer: nn.Module, against: Against, batch_size: int) -> list[Peer]:
    """All peers of a kind; a layer is compared with the fastest of them.

    Args:
        layer: Our layer, whose options and parameters the peers get.
        against: The kind of peer.
        batch_size: Examples of the map.

    Returns:
        The peers; none if the layer has no peer of this kind. A layer that torch has too is not
        compared with compositions.
    """
    if against == "torch":
        return _torch_layers(layer)
    if against == "compile":
        return [_compiled(layer, batch_size)]
    return [] if _torch_layers(layer) else _compositions(layer, batch_size)


def _torch_layers(layer: nn.Module) -> list[Peer]:
    if type(layer) not in _TORCH:
        return []
    module = _TORCH[type(layer)](layer)
    _copy_parameters(layer, module)
    return [Peer(name=f"nn.{type(module).__name__}", module=module)]


def _compositions(layer: nn.Module, batch_size: int) -> list[Peer]:
    if isinstance(layer, PositionalNorm):
        return [
            Peer(name="F.layer_norm of permuted axes", module=compositions.ByLayerNorm(layer)),
            Peer(name="var_mean over channels", module=compositions.ByChannelMoments(layer)),
        ]
    composed = composites.composition_of(layer)
    if composed is not None:
        return [Peer(name=_first_line(composed), module=composed)]
    if not isinstance(layer, SegmentLayer):
        raise SpecError(f"no composition of torch's operators is known for {type(layer).__name__}")
    groups = compositions.Groups.of(layer, batch_size)
    by_batch_norm = Peer(
        name=f"F.batch_norm of a view ({groups.size}, {groups.num_runs * groups.num_groups}, ...)",
        module=compositions.ByBatchNorm(layer, groups),
        arrange=groups.arrange,
        restore=groups.restore,
    )
    by_moments = Peer(name="var_mean and addcmul", module=compositions.ByMoments(layer, groups))
    return [by_batch_norm, by_moments]


def _first_line(module: nn.Module) -> str:
    """The name of a composition: the first line of its docstring."""
    return (type(module).__doc__ or "").splitlines()[0].replace("`", "").rstrip(".")


def _compiled(layer: nn.Module, batch_size: int) -> Peer:
    formula = composites.composition_of(layer)
    if formula is not None:
        pass
    elif isinstance(layer, PositionalNorm):
        formula = compositions.ByChannelMoments(layer)
    elif isinstance(layer, SegmentLayer):
        formula = compositions.ByMoments(layer, compositions.Groups.of(layer, batch_size))
    else:
        raise SpecError(f"no formula to compile is known for {type(layer).__name__}")
    torch.compiler.reset()  # compile each shape anew; otherwise torch would make sizes symbolic
    formula.compile(fullgraph=True)
    return Peer(name="torch.compile of the formula", module=formula)


def _batch_norm(layer: BatchNorm) -> nn.Module:
    return nn.BatchNorm2d(
        layer.num_features,
        layer.eps,
        layer.momentum,
        track_running_stats=layer.track_running_stats,
    )


def _instance_norm(layer: InstanceNorm) -> nn.Module:
    return nn.InstanceNorm2d(
        layer.num_features,
        layer.eps,
        0.1 if layer.momentum is None else layer.momentum,
        affine=True,
        track_running_stats=layer.track_running_stats,
    )


def _layer_norm(layer: LayerNorm) -> nn.Module:
    return nn.GroupNorm(1, layer.num_features, layer.eps)


def _group_norm(layer: GroupNorm) -> nn.Module:
    return nn.GroupNorm(layer.num_groups, layer.num_features, layer.eps)


_TORCH: dict[type[nn.Module], Callable[..., nn.Module]] = {
    BatchNorm: _batch_norm,
    InstanceNorm: _instance_norm,
    LayerNorm: _layer_norm,
    GroupNorm: _group_norm,
}


@torch.no_grad()
def _copy_parameters(layer: nn.Module, twin: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    twin.to(weight.device, weight.dtype)
    twin.get_parameter("weight").copy_(weight)
    twin.get_parameter("bias").copy_(layer.get_parameter("bias"))
