"""torchvision's and timm's networks, with their batch norms replaced by any norm."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import SpecError
from normkit.lab.models.architecture import NormLayer, Task
from normkit.lab.torchvision_ops import register_missing_operators

PLAIN_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchvisionModel:
    """A torchvision classifier, untrained."""

    name: str

    def build(self, task: Task, norm_layer: NormLayer | None) -> nn.Module:
        """Build it, giving the norm to its ``norm_layer=`` if it has one."""
        builder = importlib.import_module("torchvision.models").get_model_builder(self.name)
        accepted = inspect.signature(inspect.signature(builder).return_annotation).parameters
        wanted = {"init_weights": True, "aux_logits": False, "norm_layer": norm_layer}
        options = {key: value for key, value in wanted.items() if key in accepted}
        model = builder(weights=None, num_classes=task.num_classes, **options)
        take_channels(model, task.input_shape[0])
        if norm_layer is not None and "norm_layer" not in accepted:
            replace_batch_norms(model, norm_layer)
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmModel:
    """A timm classifier, untrained."""

    name: str

    def build(self, task: Task, norm_layer: NormLayer | None) -> nn.Module:
        """Build it and replace its batch norms: most of timm's models cannot take a norm."""
        model = importlib.import_module("timm").create_model(
            self.name, num_classes=task.num_classes, in_chans=task.input_shape[0]
        )
        if norm_layer is not None:
            replace_batch_norms(model, norm_layer)
        return model


class NormThenAct(nn.Module):
    """A norm followed by the drop and the activation that timm keeps inside its own."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = drop
        self.act = act

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        """Normalise, drop, activate."""
        return self.act(self.drop(self.norm(x)))


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers."""
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    return models.list_models(module=models)


def timm_names() -> list[str]:
    """Names of timm's models."""
    register_missing_operators()
    return importlib.import_module("timm").list_models()


def replace_batch_norms(model: nn.Module, norm_layer: NormLayer) -> None:
    """Replace every batch norm, in the order of the model's modules; shared ones stay shared.

    Args:
        model: Changed in place.
        norm_layer: Called once for each batch norm with its number of features.

    Raises:
        SpecError: If the model holds a kind of batch norm that is not known here.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    unknown = [f"{name} ({type(m).__name__})" for name, m in found.items() if not _is_known(m)]
    if unknown:
        raise SpecError(
            f"the model holds batch norms of a kind that cannot be replaced: {', '.join(unknown)}; "
            f"choose a model whose batch norms are torch's or timm's BatchNormAct2d"
        )
    replace_modules(model, {module: _replacement(module, norm_layer) for module in found.values()})


def _is_known(module: nn.Module) -> bool:
    return type(module) in PLAIN_BATCH_NORMS or _has_activation(module)


def _has_activation(module: nn.Module) -> bool:
    return type(module).__name__ == "BatchNormAct2d"  # timm's


def _replacement(module: _BatchNorm, norm_layer: NormLayer) -> nn.Module:
    norm = norm_layer(module.num_features)
    _carry_affine(module, norm)
    if not _has_activation(module):
        return norm
    return NormThenAct(norm, module.get_submodule("drop"), module.get_submodule("act"))


@torch.no_grad()
def _carry_affine(before: _BatchNorm, after: nn.Module) -> None:
    """Keep initial weights other than one: timm starts the last norm of a block at zero."""
    parameters = dict(after.named_parameters(recurse=False))
    for name, value in before.named_parameters(recurse=False):
        if name in parameters and parameters[name].shape == value.shape:
            parameters[name].copy_(value)


def take_channels(model: nn.Module, num_channels: int) -> None:
    """Give a model another number of input channels by renewing its first convolution."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == num_channels:
        return
    renewed = nn.Conv2d(
        num_channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    replace_modules(model, {first: renewed})


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement under every name that its original has in the model."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
