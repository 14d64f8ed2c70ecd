"""Inserting a norm after the sum of a residual block, before its activation."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from normkit.convert.adapters import adapt_
from normkit.convert.placement.blocks import Block
from normkit.convert.plan import Insertion
from normkit.convert.report import Change
from normkit.convert.rules import key_of, read
from normkit.convert.source import Activation
from normkit.errors import ConversionError
from normkit.layers.over_example import InstanceNorm
from normkit.tracing.kinds import is_norm

SUM_NORM = "sum_norm"
SHARED_ACTIVATION = (
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
)
"""Blocks that call one activation module in several places, by their module and class name."""


class _NormedBlock(nn.Module):
    """A block with a norm after its sum.

    Its class is made at run time from the original class rather than wrapping the block, so that
    the names in a state dict do not change.
    """

    base: type[nn.Module]
    mixin: type[_NormedBlock]
    sum_norm: InstanceNorm

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _empty, (self.mixin, self.base), self.__dict__


class _NormedOutput(_NormedBlock):
    """A block whose output is its sum."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the output of the original block."""
        return self.sum_norm(super().forward(x))


class _NormedSum(_NormedBlock):
    """A block of torchvision's ResNet, which calls its activation in several places."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise in turn, add the shortcut, normalise the sum, activate."""
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(self.relu(y)))
        if "bn3" in self._modules:  # a bottleneck
            y = self._modules["bn3"](self._modules["conv3"](self.relu(y)))  # type: ignore[misc]
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.sum_norm(y + shortcut))


def has_norm_after_sum(block: Block) -> bool:
    """Whether a norm takes the sum already."""
    child = _only_user(block)
    return child is not None and is_norm(child[1])


@torch.inference_mode(False)  # parameters created in inference mode could not be trained
def norm_after_sum(block: Block, model: nn.Module) -> Insertion:
    """Build the norm, and the module that will contain it; the model is not changed.

    Raises:
        ConversionError: If the block has no sum, or no place where the norm can be inserted.
    """
    if block.own.join is None:
        raise _no_place_error(block, "it adds no shortcut")
    user = _only_user(block)
    norm = _instance_norm(block)
    if key_of(type(block.own.module)) in SHARED_ACTIVATION:
        return _in_block(block, norm, _NormedSum)
    if user is not None and _appears_once(user[1], model) and _is_called_once(block, user[0]):
        return _in_activation(block, norm, *user)
    if user is None and _ends_with_sum(block):
        return _in_block(block, norm, _NormedOutput)
    raise _no_place_error(block, "its sum does not go into an activation module of its own")


def _no_place_error(block: Block, why: str) -> ConversionError:
    kind = type(block.own.module).__name__
    return ConversionError(
        f"{block.name} ({kind}) has no place for a norm after its sum: {why}; nothing was changed; "
        f"let the block call a module of its own there, such as self.act = nn.ReLU(), or use "
        f"variant='a'"
    )


def _only_user(block: Block) -> tuple[str, nn.Module] | None:
    """Return the name and module of the child that takes the sum, if nothing else takes it."""
    users = list(block.own.join.users) if block.own.join is not None else []
    if len(users) == 1 and users[0].op == "call_module":
        return str(users[0].target), block.own.child(users[0])
    return None


def _ends_with_sum(block: Block) -> bool:
    users = list(block.own.join.users) if block.own.join is not None else []
    one_argument = len(inspect.signature(block.own.module.forward).parameters) == 1
    return [user.op for user in users] == ["output"] and one_argument


def _is_called_once(block: Block, name: str) -> bool:
    def calls(node: fx.Node) -> bool:
        return node.op == "call_module" and node.target == name

    return sum(map(calls, block.own.graph.nodes)) == 1


def _appears_once(module: nn.Module, model: nn.Module) -> bool:
    """Whether this is an activation that the model contains at one place only."""
    places = [part for _, part in model.named_modules(remove_duplicate=False) if part is module]
    return len(places) == 1 and not any(module.parameters()) and not any(module.children())


def _instance_norm(block: Block) -> InstanceNorm:
    like = next(block.own.module.parameters(), torch.empty(0))
    place = {"device": like.device, "dtype": like.dtype}
    return InstanceNorm(_num_channels(block), **place).train(block.own.module.training)


def _num_channels(block: Block) -> int:
    """Count the channels of the sum, which are those of the last norm or convolution before it."""
    last = block.own.last_layer(block.own.sides()[0]) or block.norms[-1]
    return read(last).num_features if is_norm(last) else int(last.out_channels)  # type: ignore[arg-type]


def _in_activation(block: Block, norm: InstanceNorm, name: str, activation: nn.Module) -> Insertion:
    new = adapt_(norm, Activation(nn.Identity(), activation), False)
    kind = type(activation).__name__
    change = Change(
        name=f"{block.name}.{name}", old=kind, new="in", carried=(f"activation {kind}",)
    )
    return Insertion(activation, new, new, block.norms[-1], block.name, change)


def _in_block(block: Block, norm: InstanceNorm, mixin: type[_NormedBlock]) -> Insertion:
    """Create a block with the same members and the norm; the old block is not changed."""
    old = block.own.module
    new = _empty(mixin, type(old))
    new.__dict__.update(old.__dict__)
    new._modules = {**old._modules, SUM_NORM: norm}
    change = Change(name=f"{block.name}.{SUM_NORM}", old="nothing", new="in")
    return Insertion(old, new, norm, block.norms[-1], block.name, change)


@cache
def _class(mixin: type[_NormedBlock], base: type[nn.Module]) -> type[_NormedBlock]:
    attributes = {"base": base, "mixin": mixin, "__module__": __name__}
    return type(f"{base.__name__}SumNorm", (mixin, base), attributes)


def _empty(mixin: type[_NormedBlock], base: type[nn.Module]) -> _NormedBlock:
    """Create a block without state, for copying and unpickling."""
    return object.__new__(_class(mixin, base))
